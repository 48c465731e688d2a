"""Kernels are tried once per device, before they serve there; other kernels serve where they are wrong."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger("poc_kernels")

lock = threading.RLock()
"""Held while kernels are tried or chosen."""
verdicts: dict[tuple[str, torch.device], list[str]] = {}
"""What the kernels of a name get wrong on a device, once they were tried there."""


def _renew_lock() -> None:
    """Have a free lock in a forked process: the thread that held it is not there."""
    global lock
    lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def verdict(kernels: str, device: torch.device, find_wrong: Callable[[], list[str]]) -> list[str]:
    """Return what ``kernels`` get wrong on ``device``, empty if they may serve there, from their only trial there.

    Args:
        kernels: their name in logs and errors.
        device: with its index.
        find_wrong: the trial; what it finds is logged as an error. Whatever exception it raises is wrong, too: such
            kernels are not to be used. Except one that `is_transient`.

    Raises:
        RuntimeError: they were not tried yet and a CUDA graph is being captured, in which they cannot be.
        Exception: a transient one of the trial, which is not remembered.
    """
    with lock:
        key = kernels, device
        if key in verdicts:
            return verdicts[key]
        # A trial reads results back; a graph cannot.
        if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernels} on {device} cannot be chosen while a CUDA graph is being captured: make one call before "
                "the capture, as poc_kernels.backends.warmup does for the projection"
            )
        try:
            wrong = find_wrong()
        except Exception as error:
            if is_transient(error):
                raise
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            logger.error(
                "poc_kernels %s gives wrong answers on %s and will not be used there: %s",
                kernels,
                device,
                "; ".join(wrong),
            )
        verdicts[key] = wrong
        return wrong


def trust(kernels: str, device: torch.device) -> None:
    """Take ``kernels`` to be right on ``device``, untried, in this process."""
    with lock:
        verdicts[kernels, device] = []


def is_transient(error: Exception) -> bool:
    """Tell whether an exception is of a condition that passes: no memory left, or a CUDA graph that is being captured.

    Triton's are RuntimeErrors with the driver's words, those of torch on a CPU with "can't allocate memory"; a capture
    in another thread can make any allocation fail.
    """
    words = str(error).lower()
    passing = any(part in words for part in ("out of memory", "allocate memory", "captur"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and passing)
