"""What a backend is: kernels that compute the projection, behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..definition import Request


class Warmup(Protocol):
    """Has everything compiled that products of activations [..., dim] take on a device."""

    def __call__(self, device: torch.device, dim: int, *, dtype: torch.dtype, activation_bits: int) -> None: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute the projection. All arguments are checked before they get here (``ops.py``)."""

    name: str
    project: Callable[[Tensor, Tensor, Request], Tensor]
    """project(x, seed, request) -> y: x [M, K] with M >= 1 and any strides, y [M, columns] contiguous in its dtype."""
    entries: Callable[[Tensor, int, int, int, int, int], Tensor]
    """entries(seed, domain, k_start, k, n_start, n) -> int16 [k, n] on the device of seed."""
    unavailable: Callable[[torch.device], str | None]
    """Why it cannot run on a device, or None if it can."""
    by_name_only: tuple[str, ...] = ()
    """Types of device that it serves only where it is asked for by name, for tests."""
    wrong: Callable[[torch.device], list[str]] = lambda device: []
    """What it gets wrong on a device where it gives the known answers (`self_test`): kernels that they do not reach."""
    may_crash: bool = False
    """It is tried on a GPU in a process of its own (`trial_process`)."""
    warmup: Warmup = lambda device, dim, *, dtype, activation_bits: None
