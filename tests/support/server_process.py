"""A server in a process of its own, that tests start, ask and end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from web import TIMEOUT, eventually

import poc_kernels

READY_SECONDS = 120  # several processes import torch at once


class ServerProcess:
    """A command that serves on a port that it chooses, in a process group of its own, with this package.

    Args:
        command: what to run.
        directory: where to run it.
        listening: a regular expression of the line of its log that says that it listens; its group is the port, unless
            it was given one.
        environ: variables besides those of this process; None removes one of them.
        ready_seconds: how long it may take until it listens.
        port: that the command was given.
        folders: of further modules that it can import.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        listening: str,
        environ: Mapping[str, str | None] | None = None,
        ready_seconds: float = READY_SECONDS,
        port: int | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        ours = (*folders, Path(poc_kernels.__file__).parents[1])
        found = os.pathsep.join([*map(str, ours), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        variables = {**os.environ, **own, **(environ or {})}
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={name: value for name, value in variables.items() if value is not None},
            start_new_session=True,
        )
        self.log: list[str] = []
        self.deaf = threading.Event()
        """Set to read no more of its log."""
        self._listening, self._port = listening, port
        self._ready_seconds = ready_seconds
        self._url = ""
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log.append(line)
            if found := re.search(self._listening, line):
                self._url = f"http://127.0.0.1:{self._port or found[1]}"
                self._listens.set()
            if self.deaf.is_set():
                self.popen.wait(TIMEOUT)

    def url(self) -> str:
        """Where it listens, once it does."""
        eventually(lambda: self._listens.is_set() or self.popen.poll() is not None, self._ready_seconds)
        assert self._listens.is_set(), "".join(self.log)
        return self._url

    def end(self, number: signal.Signals, within_seconds: float) -> int:
        """Send a signal; the exit status, once nothing of the process is left."""
        self.popen.send_signal(number)
        return self.ended(within_seconds)

    def ended(self, within_seconds: float) -> int:
        """The exit status, once nothing of the process is left."""
        code = self.popen.wait(within_seconds)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.popen.pid, 0)
        self._reader.join(TIMEOUT)
        assert not self._reader.is_alive()
        return code

    def logged(self) -> list[str]:
        """What the process wrote to standard error, to its end."""
        return self.log

    def kill(self) -> None:
        """Whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(TIMEOUT)
