"""The mix of a forward's positions, and what is read of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import random_projection
from ..artifacts.tensors import norms
from ..form_kernels import on
from .form import K_DIM
from .signs import seeds_on

FIRST_POSITION = 8
"""Those before it see too little to be worth mixing."""
_DOMAIN = 2


def pairs_of(seq_len: int) -> int:
    """Return how many pairs of neighbouring positions are mixed."""
    return (seq_len - FIRST_POSITION) // 2


def mixed(states: Tensor, seeds: list[int]) -> Tensor:
    """Sum the differences of neighbouring positions, with a seeded sign for each pair.

    Args:
        states: hidden states [rows, 2 * pairs, hidden_size] from position `FIRST_POSITION` on, taken as float32.
        seeds: the mix's seed of each row.

    Returns:
        float32 [rows, hidden_size]. Differences are float32, their sum is float64 and rounded once.
    """
    device = states.device
    masks = torch.empty(1, len(seeds), states.shape[1] // 2, dtype=torch.int32, device=device)
    functions = on(device)
    functions.sign_masks(seeds_on(device, seeds), masks)
    result: Tensor = functions.mixed(states, masks[0])
    return result


def read(mix: Tensor, seed: Tensor) -> Tensor:
    """Project a mix [rows, hidden_size] to `K_DIM` numbers, and divide them by their norm: float32 [rows, K_DIM].

    Args:
        mix: of `mixed`.
        seed: of the block, as projections take it.
    """
    y = random_projection(mix, seed, K_DIM, domain=_DOMAIN, std=1.0)
    return y / norms(y)
