"""How far roundings alone may take a model's results: its tensors, changed at random by a rounding of their dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Relative changes that a module's output may have by rounding. That of float32 is eight of its roundings: long sums
are added up in an order that depends on the kernel."""


def rounded_otherwise(tensor: Tensor, generator: torch.Generator, relative: float) -> Tensor:
    """Return ``tensor`` with each element changed at random, by at most ``relative`` times itself."""
    by = torch.rand(tensor.shape, generator=generator, device=tensor.device) * 2 - 1
    return (tensor.float() * (1 + relative * by)).to(tensor.dtype)
