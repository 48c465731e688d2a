"""Processes of the benchmarks, which import the package that the tests import."""

import os
import subprocess
import sys
import time
from pathlib import Path

import poc_kernels
from bench.gpu_check.steps import Command

ROOT = Path(__file__).parents[2]
PYTEST_ALONE = ["-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull]
WAITS = "import time; print('waits', flush=True); time.sleep(300)"
FIRST_INTERRUPT, SECOND_INTERRUPT, KILL = 90.0, 105.0, 120.0
"""Of a step that a `LogClock` watches, in seconds."""


def with_package(*search, **environment):
    """The environment of such a process; ``search`` are folders that it looks into first."""
    paths = [*search, Path(poc_kernels.__file__).parents[1], os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path), **environment}


def run_python(*arguments, search=()):
    """What Python did with ``arguments``, in the folder where the benchmarks lie."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=with_package(*search),
        capture_output=True,
        text=True,
        timeout=240,
    )


def step_command(code, *arguments, **environment):
    """What a step runs ``code`` with."""
    return Command([sys.executable, "-c", code, *map(str, arguments)], environment)


class LogClock:
    """A check's time: it stands still until a text is in a step's log, goes to that text's moment, and so on.

    After the last it runs. However long a machine takes to start a process, no step is late before its text is there;
    but it runs after a minute in any case.
    """

    def __init__(self, log, moments):
        self._log, self._moments, self._now = log, dict(moments), 0.0
        self._latest = time.monotonic() + 60
        self._runs_since = None

    def monotonic(self):
        while self._moments and (self._logged(next(iter(self._moments))) or time.monotonic() > self._latest):
            self._now = self._moments.pop(next(iter(self._moments)))
            self._runs_since = None if self._moments else time.monotonic()
        return self._now + (0.0 if self._runs_since is None else time.monotonic() - self._runs_since)

    def sleep(self, seconds):
        time.sleep(seconds)

    def _logged(self, text):
        return self._log.exists() and text in self._log.read_text()
