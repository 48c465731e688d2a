"""Seeded signs of a nonce: for every feature after every layer, and for every pair of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...definition import seed_from_block_hash
from ...reference import philox4x32

_BITS_PER_CALL = 128


def flips_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the 64-bit seed of a nonce's flips."""
    return seed_from_block_hash(f"{block_hash}_{public_key}_nonce_{nonce}_flips")


def mix_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the 64-bit seed of the signs of a nonce's pairs of positions."""
    return seed_from_block_hash(f"{block_hash}_{public_key}_nonce_{nonce}_mix")


def sign_bits(seeds: Sequence[int], layers: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw bits, 1 for a minus: int32 [len(seeds), layers, count].

    Bit i of a layer is bit i % 128 of Philox4x32-10 with counter (i // 128, layer, 0, 0), under the row's seed.
    """
    seed = torch.tensor(seeds, dtype=torch.int64, device=device).view(-1, 1, 1)
    layer = torch.arange(layers, device=device).view(1, -1, 1)
    call = torch.arange((count + _BITS_PER_CALL - 1) // _BITS_PER_CALL, device=device).view(1, 1, -1)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    words = philox4x32((call, layer, zero, zero), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    word = torch.stack(words, dim=-1).to(torch.int32)  # [seeds, layers, calls, 4]
    place = torch.arange(32, dtype=torch.int32, device=device)
    bits = (word.unsqueeze(-1) >> place).bitwise_and_(1)
    return bits.flatten(2)[..., :count]
