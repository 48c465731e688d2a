"""From tensors to artifacts."""

from __future__ import annotations

import torch
from torch import Tensor

from .encoding import encode


def norms(x: Tensor) -> Tensor:
    """Compute the norms of float32 rows [..., n]: float32 [..., 1]. The order of float64 sums is rounded away."""
    return x.double().square().sum(-1, keepdim=True).sqrt().float()


def texts(units: Tensor) -> list[str | None]:
    """Return the artifacts of rows of norm 1, float32 [rows, k]: None for a row of zeros or one that is not finite."""
    good = (units.isfinite().all(1) & units.any(1)).tolist()
    halves = units.to(torch.float16).cpu().numpy()
    return [encode(half) if has else None for half, has in zip(halves, good, strict=True)]
