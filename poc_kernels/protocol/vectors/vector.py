"""From a nonce's last hidden state to its vector: pick some coordinates, rotate, normalise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..artifacts.tensors import norms
from ..inputs import normal, permutations_of, seed32
from ..prover import Row

_SMALL = 1e-8
"""Added to a norm before something is divided by it."""


def picks(block_hash: str, rows: Sequence[Row], dim: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Choose the k coordinates with the smallest hashes: int64 [len(rows), k].

    In the order in which the network's nodes have them, which comes from their GPUs' selection, as the source of
    torch's topk has it: those before the k-th smallest by their index, then the k-th smallest itself. First light
    compares it with a GPU's; no GPU has run it yet.
    """
    seeds = [seed32(f"{block_hash}_{row.public_key}_nonce_{row.nonce}_pick_{k}") for row in rows]
    smallest = permutations_of(seeds, dim, device)[:, :k]
    return torch.cat([smallest[:, :-1].sort(dim=1).values, smallest[:, -1:]], dim=1)


def rotation_axes(block_hash: str, rows: Sequence[Row], k: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the unit vectors of a rotation, which is k - 1 reflections: float32 [len(rows), k - 1, k]."""
    seeds = [
        seed32(f"{block_hash}_{row.public_key}_nonce_{row.nonce}_haar_hh_{k}_{place}")
        for row in rows
        for place in range(k - 1)
    ]
    directions = normal(seeds, k, device)
    return (directions / norms(directions)).view(len(rows), k - 1, k)


def vectors(hidden: Tensor, picked: Tensor, axes: Tensor) -> Tensor:
    """Compute the unit vectors of last hidden states.

    Args:
        hidden: [rows, dim], taken as float32.
        picked: int64 [rows, k], of `picks`.
        axes: float32 [rows, k - 1, k], of `rotation_axes`.

    Returns:
        float32 [rows, k]: NaN in a row that holds a NaN or an infinity, zeros in one whose picked coordinates are.
    """
    h = hidden.float()
    h = torch.where(h.isfinite().all(1, keepdim=True), h, torch.nan)
    y = (h / (norms(h) + _SMALL)).gather(1, picked)
    for axis in axes.unbind(1):
        along = (y.double() * axis).sum(1, keepdim=True).float()
        y = y - 2 * along * axis
    return y / (norms(y) + _SMALL)
