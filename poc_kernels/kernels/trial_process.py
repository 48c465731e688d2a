"""A trial in a process of its own: kernels that crash or hang there cost nothing here.

An illegal access ends a CUDA context, and with it all that a process has on the GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from .trial import is_transient

logger = logging.getLogger("poc_kernels")

TIMEOUT_SECONDS = 900.0
"""A first use compiles for a minute or two; kernels that take longer than this hang."""
KILLED_SECONDS = 10.0
"""How long a process may take to be gone once it is killed; the driver of a GPU may hold it for ever."""

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from poc_kernels.kernels import trial_process; "
    "trial_process.main(sys.argv[2:])"
)
_BEGAN = b"\0poc_kernels began\n"  # no line of what may be printed before: by sitecustomize, or where torch is imported
_MAX_LAST_WORDS = 300


class SaysNothingError(Exception):
    """The process could not try the kernels: whether they are right is not known."""


def on_gpu_apart(function: str, name: str, device: torch.device, here: Callable[[], list[str]]) -> list[str]:
    """Return what the trial of ``name`` finds wrong, made in another process if ``device`` is a GPU.

    Args:
        function: "module:name" of a function (name, device) that makes the trial in another process.
        name: of what is tried.
        device: with its index.
        here: the same trial in this process: made if the device is no GPU that is there, and, with a warning, where
            another process says nothing of the kernels.

    Raises:
        Exception: those of ``here``, and those of `find_wrong` except SaysNothingError.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return here()
    try:
        return find_wrong(function, name, device)
    except SaysNothingError as reason:
        logger.warning("poc_kernels tries %s on %s in this process, as another one cannot: %s", name, device, reason)
        return here()


def find_wrong(function: str, name: str, device: torch.device) -> list[str]:
    """Return what ``function(name, device)`` finds wrong in another process, or how it ended that process.

    Args:
        function: "module:name" of a function that returns what is wrong as a list of str. An exception that it raises
            is wrong, too, except a transient one.
        name: of what is tried.
        device: with its index.

    Raises:
        SaysNothingError: no process could be started, it cannot use the device, or a transient exception was raised.
        MemoryError: the process was killed, as it is where memory is short.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise SaysNothingError("sys.executable does not say where Python is")
    path = [entry for entry in sys.path if isinstance(entry, str)]  # Python ignores others
    command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(path), function, name, str(device)]
    try:
        returncode, stdout, stderr = _run(command)
    except subprocess.TimeoutExpired:
        return [f"its trial did not end in {TIMEOUT_SECONDS:g} seconds"]
    except OSError as error:
        raise SaysNothingError(f"{type(error).__name__}: {error}") from error
    if returncode == -signal.SIGKILL:
        raise MemoryError(f"the process that tries {name} on {device} was killed, perhaps because memory is short")
    _, began, report = stdout.partition(_BEGAN)
    if not began:
        raise SaysNothingError(f"it ended too soon ({_how_it_ended(returncode)}): {_last_words(stderr)}")
    if not report:
        return [f"its trial ended the process ({_how_it_ended(returncode)}): {_last_words(stderr)}"]
    answer: dict[str, Any] = json.loads(report)
    if "says_nothing" in answer:
        raise SaysNothingError(answer["says_nothing"])
    wrong: list[str] = answer["wrong"]
    return wrong


def _run(command: list[str]) -> tuple[int, bytes, bytes]:
    """Run a command for TIMEOUT_SECONDS at most; return its exit status, standard output and standard error.

    It is killed at the end of that time, or if this thread is interrupted, with the compilers that it started.
    """
    # In a session of its own, as an interrupt at the terminal says nothing of the kernels. subprocess.run would wait
    # for a process that it killed, however long it takes, and would leave those that this has started.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_SECONDS)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        raise
    return process.returncode, stdout, stderr


def _how_it_ended(returncode: int) -> str:
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"exit status {returncode}"


def _last_words(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:_MAX_LAST_WORDS] if lines else "it said nothing"


def main(arguments: list[str]) -> None:
    """Try kernels here and write a report, as the other process asks: function, name, device."""
    function, name, device = arguments[0], arguments[1], torch.device(arguments[2])
    # Should the process that asks be killed, nobody else would end a trial that hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(math.ceil(TIMEOUT_SECONDS + KILLED_SECONDS))
    report = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no report
    torch.zeros(1, device=device)  # raises on a device that this process cannot use: one that is full or exclusive
    report.write(_BEGAN)
    report.write(json.dumps(_answer(function, name, device)).encode())
    # At once: what kernels left behind may crash an orderly end.
    os._exit(0)


def _answer(function: str, name: str, device: torch.device) -> dict[str, Any]:
    module, _, attribute = function.partition(":")
    try:
        return {"wrong": getattr(importlib.import_module(module), attribute)(name, device)}
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return {"says_nothing": words} if is_transient(error) else {"wrong": [words]}
