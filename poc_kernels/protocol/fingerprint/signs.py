"""Seeds of a nonce's signs: for every feature after every layer, and for every pair of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...definition import seed_from_block_hash


def flips_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the 64-bit seed of a nonce's flips."""
    return seed_from_block_hash(f"{block_hash}_{public_key}_nonce_{nonce}_flips")


def mix_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the 64-bit seed of the signs of a nonce's pairs of positions."""
    return seed_from_block_hash(f"{block_hash}_{public_key}_nonce_{nonce}_mix")


def seeds_on(device: torch.device, seeds: Sequence[int]) -> Tensor:
    """Return seeds as int64 [len(seeds)] on a device. Nothing waits for a GPU: they come from pinned memory."""
    local = torch.tensor(seeds, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return local.to(device, non_blocking=True)
