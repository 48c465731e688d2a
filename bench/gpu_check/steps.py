"""Runs steps one after another, each within its time, and notes what came of each."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench import ROOT
from bench.gpu_check.archive import pack

MIN_SECONDS = 2.0
"""No step begins with less."""
GRACE_SECONDS = 10.0
"""Between the interrupt that a late step gets, upon which pytest writes what it has, and its end. Halfway it gets
another."""


class Command(NamedTuple):
    """The arguments of a process, and what is added to its environment."""

    arguments: list[str]
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """The result of a step."""

    name: str
    result: str
    """"ok", "FAILED ...", "not done ..." or "skipped: ..."."""
    seconds: float
    skipped: tuple[str, ...] = ()
    """What the step itself left out."""


class _Process:
    """Runs a command in a process group of its own; its output goes to the terminal and a log meanwhile."""

    def __init__(self, command: Command, log: Path, label: str) -> None:
        self._process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._copy, args=(log, label), daemon=True)
        self._reader.start()

    def _copy(self, log: Path, label: str) -> None:
        assert self._process.stdout is not None
        with log.open("a", buffering=1) as file:
            for line in self._process.stdout:
                self.lines.append(line.rstrip("\n"))
                file.write(label + line)
                print(label + line, end="", flush=True)

    @property
    def ended(self) -> bool:
        # Not reaped before `finish`, so that the group keeps its number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def interrupt(self) -> None:
        """Interrupt the whole group, as Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)

    def finish(self) -> int:
        """End what is left of the group; returns the command's exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._reader.join(5)
        return status


class Check:
    """Runs steps and keeps their results.

    Args:
        out: folder for the logs and the table, which is written after every step.
        device: "cuda" or "cpu".
        plan: seconds for each step, in their order.
        total: seconds that all steps have together.
        grace: seconds between the interrupt of a late step and its end.
        elapsed: seconds of the total that are over. If less than the plan is left, all steps are shortened alike.
        results: folder that gets the table and an archive of ``out``, after every step.

    Raises:
        ValueError: the plan is longer than the total.
    """

    def __init__(
        self,
        out: Path,
        device: str,
        plan: Mapping[str, float],
        total: float,
        grace: float = GRACE_SECONDS,
        elapsed: float = 0.0,
        results: Path | None = None,
    ) -> None:
        planned = sum(plan.values())
        if planned > total:
            raise ValueError(f"plan must add up to at most total, {total:g} s, got {planned:g} s")
        self.out, self.device, self.results = out, device, results
        self.outcomes: list[Outcome] = []
        self.summary = ""
        """Text above the table."""
        self._grace = grace
        self._ends: dict[str, float] = {}
        left = max(0.0, total - elapsed)
        end = time.monotonic() + max(0.0, left - planned)
        for name, seconds in plan.items():
            self._ends[name] = end = end + seconds * min(1.0, left / planned)

    def left(self, name: str) -> float:
        """Return the seconds that a step may take before it is interrupted."""
        left = self._ends[name] - time.monotonic()
        return left - min(self._grace, left / 4)

    def run(
        self,
        name: str,
        *commands: Command,
        must_end: bool = True,
        error: str | None = None,
        unsupported: str | None = None,
    ) -> bool:
        """Run the commands of a step at the same time, until its planned time is over; True if all of them succeed.

        A step that is not done by then has failed if it ``must_end``. One with a line that matches the regular
        expression ``error`` has failed in any case, and one with a line that matches ``unsupported`` counts as skipped.
        """
        limit = self.left(name)
        if limit < MIN_SECONDS:
            self.skip(name, "no time left")
            return False
        start, end = time.monotonic(), self._ends[name]
        # Twice: a library may swallow the first.
        interrupts = [start + limit, (start + limit + end) / 2]
        log = self.out / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        processes: list[_Process] = []
        late = False
        try:
            for number, command in enumerate(commands, 1):
                print(" ".join(part if len(part) < 200 else "..." for part in command.arguments), flush=True)
                with _signals_wait():
                    processes.append(_Process(command, log, f"[{number}] " if len(commands) > 1 else ""))
            while not all(process.ended for process in processes) and time.monotonic() < end:
                if interrupts and time.monotonic() > interrupts[0]:
                    interrupts.pop(0)
                    late = True
                    for process in processes:
                        if not process.ended:
                            process.interrupt()
                time.sleep(0.05)
        finally:
            statuses = [process.finish() for process in processes]
        failed = [str(status) for status in statuses if status != 0]
        result = f"FAILED with {', '.join(failed)}" if failed else "ok"
        if late:
            result = f"{'FAILED: ' if must_end else ''}not done after {limit:.0f} s"
        lines = [line for process in processes for line in process.lines]
        if refused := next((line for line in lines if unsupported and re.match(unsupported, line)), None):
            result = f"skipped: {refused}"
        if wrong := next((line for line in lines if error and re.match(error, line)), None):
            result = f"FAILED: {wrong}"
        self._add(Outcome(name, result, time.monotonic() - start, _skips(processes)))
        return result == "ok"

    def skip(self, name: str, reason: str) -> None:
        """Note that a step does not run, and why."""
        self._add(Outcome(name, f"skipped: {reason}", 0.0))

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.save()

    def save(self) -> None:
        """Write the table so far, after the summary."""
        table = self.out / f"gpu-check-{self.device}.txt"
        table.write_text(f"{self.summary}\n{self.table()}\n".lstrip())
        if self.results is not None:
            shutil.copy(table, self.results)
            pack(self.out, self.results / f"gpu-check-{self.device}.tgz")

    def table(self) -> str:
        """Return a line for each step, and for what it skipped."""
        lines = [f"{'step':<24}{'seconds':>8}  result"]
        for outcome in self.outcomes:
            lines.append(f"{outcome.name:<24}{outcome.seconds:>8.0f}  {outcome.result}")
            lines += [f"{'':<34}skipped {skip}" for skip in outcome.skipped]
        return "\n".join(lines)


def _skips(processes: list[_Process]) -> tuple[str, ...]:
    """Return pytest's lines on skipped tests, with the counts of all processes added."""
    counts: Counter[str] = Counter()
    for process in processes:
        for line in process.lines:
            if found := re.match(r"SKIPPED \[(\d+)\] (.*)", line):
                counts[found[2]] += int(found[1])
    return tuple(f"[{count}] {reason}" for reason, count in counts.items())


def take_signals() -> None:
    """Let SIGTERM end this process by an exception, so that the step that runs ends too.

    SIGINT is taken as well: a shell lets jobs in the background ignore it, which their steps would inherit, and a step
    that is out of time could not be told to write down what it has.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Delay signals that raise until after the block, so that a process that starts in it is known and ended too."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if callable(handler)}  # not what is ignored
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
