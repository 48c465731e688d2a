"""Trials of kernels that another process makes: functions (name, device) -> what is wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import torch


def right(name: str, device: torch.device) -> list[str]:
    print("a library that prints")
    os.write(1, b"and one that writes to the descriptor\n")
    return []


def wrong(name: str, device: torch.device) -> list[str]:
    return [f"{name} on {device.type}"]


def raises(name: str, device: torch.device) -> list[str]:
    raise RuntimeError("a kernel that does not launch")


def short_of_memory(name: str, device: torch.device) -> list[str]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def segfault(name: str, device: torch.device) -> list[str]:
    ctypes.string_at(0)
    return []


def abort(name: str, device: torch.device) -> list[str]:
    sys.stderr.write("an illegal memory access was encountered\n")
    sys.stderr.flush()
    os.abort()


def exits(name: str, device: torch.device) -> list[str]:
    os._exit(3)


def killed(name: str, device: torch.device) -> list[str]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def hangs(name: str, device: torch.device) -> list[str]:
    time.sleep(3600)
    return []


def crash_at_the_end(name: str, device: torch.device) -> list[str]:
    import atexit

    atexit.register(os.abort)
    return []


def alarm(name: str, device: torch.device) -> list[str]:
    """Whether an alarm would end this process, and in how many seconds."""
    ends = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    blocked = signal.SIGALRM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return [f"{'ends' if ends and not blocked else 'goes on'} {signal.alarm(0)}"]
