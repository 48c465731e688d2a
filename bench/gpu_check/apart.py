"""Calls functions in processes of their own, several at once: one that crashes, hangs or raises loses only itself.

They are forked, so that what this process has imported need not be imported again. It must not have used CUDA.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

OUT_OF_TIME = "out of time"
"""So begins the error of a task that the end of all came before: it says nothing of the task."""

_FORK = multiprocessing.get_context("fork")


class Task(NamedTuple):
    """A call: its result must be picklable."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0
    """After which it is killed."""


class Done(NamedTuple):
    """What came of a task."""

    task: Task
    result: Any
    """None if there is an error."""
    error: str | None
    """Why there is no result."""
    seconds: float


class _Running:
    """A task under way; what it prints goes to a file."""

    def __init__(self, task: Task, log: Path) -> None:
        self.task, self.log, self.began = task, log, time.monotonic()
        self._receiver, sender = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_call, args=(task, log, sender), daemon=True)
        self._process.start()
        sender.close()

    def done(self, end: float) -> Done | None:
        """Return what came of it, None if it may go on."""
        seconds = time.monotonic() - self.began
        result, error = None, None
        if self._receiver.poll():
            try:
                result, error = self._receiver.recv()
            except EOFError:
                self._process.join()
                error = f"ended with {self._process.exitcode}: {_last_line(self.log)}"
        elif seconds > self.task.seconds:
            error = f"not done after {seconds:.0f} s"
        elif time.monotonic() > end:
            error = f"{OUT_OF_TIME} after {seconds:.0f} s"
        else:
            return None
        self.kill()
        return Done(self.task, result, error, seconds)

    def kill(self) -> None:
        """End the process, if it is not over, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(5)  # a driver may hold it for longer
        self._receiver.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _call(task: Task, log: Path, sender: Connection) -> None:
    """Call it, in its process, which is a group of its own with what it starts."""
    os.setsid()
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    try:
        sender.send((task.function(*task.arguments), None))
    except BaseException as error:  # whatever it is, it is the task's result
        traceback.print_exc()
        words = str(error).strip().splitlines() or [""]
        sender.send((None, f"{type(error).__name__}: {words[0][:300]}"))
    os._exit(0)  # without what other threads and libraries would do at an end


def run(tasks: Sequence[Task], workers: int, end: float, logs: Path) -> Iterator[Done]:
    """Run tasks, ``workers`` at once and in their order, until ``end`` by time.monotonic(); yields each that is over.

    What has not begun by then is yielded too. Each task's output goes to a file in the folder ``logs``.
    """
    waiting, running = list(tasks), []
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < end:
                task = waiting.pop(0)
                running.append(_Running(task, logs / f"{task.name.replace(' ', '-').replace('/', '-')}.log"))
            for each in list(running):
                done = each.done(end)
                if done is not None:
                    running.remove(each)
                    yield done
            if time.monotonic() > end:
                yield from (Done(task, None, f"{OUT_OF_TIME} before it began", 0.0) for task in waiting)
                waiting.clear()
            time.sleep(0.01)
    finally:
        for each in running:
            each.kill()
