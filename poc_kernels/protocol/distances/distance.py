"""From logits to distances: permute, normalise, compare with the round's target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import normal, permutations_of, seed32

FARTHEST = 2.0
"""Largest distance of two unit vectors; also what logits that are zero or not finite get."""


def permutation_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the seed of a nonce's permutation of the logits."""
    return seed32(f"{block_hash}_{public_key}_nonce_{nonce}_permutations")


def permutations(
    block_hash: str, public_key: str, nonces: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw permutations of the vocabulary: int64 [len(nonces), vocab_size], for ``logits.gather(1, permutations)``."""
    seeds = [permutation_seed(block_hash, public_key, nonce) for nonce in nonces]
    return permutations_of(seeds, vocab_size, device)


def target(block_hash: str, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the round's unit vector: float32 [vocab_size], the same for every node and nonce."""
    direction = normal([seed32(f"{block_hash}_target")], vocab_size, device)[0].double()
    return (direction / _norm(direction)).float()


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt_()


def distances(logits: Tensor, permutation: Tensor, unit_target: Tensor) -> Tensor:
    """Compute the distance of each row's permuted, normalised logits to the target.

    Args:
        logits: [rows, vocab_size], taken as float32.
        permutation: int64 [rows, vocab_size], of `permutations`.
        unit_target: float32 [vocab_size], of `target`.

    Returns:
        float32 [rows] in [0, 2], 2 where the logits of a row are all zero or hold a NaN or an infinity. Sums are
        float64, so the order of summation is rounded away.
    """
    permuted = logits.float().gather(1, permutation).double()
    unit = permuted / _norm(permuted)
    distance = _norm(unit.sub_(unit_target)).squeeze(1).float()
    return torch.where(distance <= FARTHEST, distance, FARTHEST)
