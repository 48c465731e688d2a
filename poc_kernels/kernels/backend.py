"""What a backend is: kernels that compute the projection, behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One way to compute the projection. All arguments are checked before they get here (``ops.py``)."""

    name: str
    project: Callable[..., Tensor]
    """project(x, seed, *, domain, coefficient, activation_bits, row_mask, column_start, columns, residual) -> y:
    x [M, K] with M >= 1 and any strides, row_mask [M] bool or None, y [M, columns] contiguous in the dtype of x."""
    entries: Callable[..., Tensor]
    """entries(seed, domain, k_start, k, n_start, n) -> int16 [k, n] on the device of seed."""
    unavailable: Callable[[torch.device], str | None]
    """Why it cannot run on a device, or None if it can."""
