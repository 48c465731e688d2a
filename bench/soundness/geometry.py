"""Distances over blocks: whether as many nonces are valid in each as random directions would have it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.soundness.figures import Array, interval
from bench.soundness.forwards import Subject
from poc_kernels.demo.theory import agreement, distance_at
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.engine import Engine

SHARE = 0.2
"""Of nonces that theory has valid."""


def blocks_of(
    engine: Engine, config: PoCConfig, blocks: Sequence[str], nonces: Sequence[int]
) -> tuple[Array, list[Tensor]]:
    """Return distances [blocks, nonces], and each block's last hidden states [nonces, hidden_size]."""
    found, states = [], []
    for block_hash in blocks:
        seen = Subject(engine, dataclasses.replace(config, block_hash=block_hash)).see(
            nonces, positions=slice(-1, None)
        )
        found.append(seen.outcomes)
        states.append(seen.states[:, -1])
    return np.array(found), states


def of_blocks(distances: Array, vocab_size: int) -> dict[str, Any]:
    """Sum up distances [blocks, nonces] against theory; intervals redraw blocks."""
    blocks, nonces = distances.shape
    r_target = distance_at(SHARE, vocab_size)
    shares = (distances < r_target).mean(1)
    width = (distance_at(0.8413, vocab_size) - distance_at(0.1587, vocab_size)) / 2  # a standard deviation

    def spread(values: Array) -> float:
        return float(values.std(ddof=1))

    each = [agreement(block.tolist(), vocab_size) for block in distances]
    return {
        "blocks": blocks,
        "nonces": nonces,
        "r_target": r_target,
        "shares": shares.tolist(),
        "share": {"mean": float(shares.mean()), **_ends(interval(shares, lambda values: float(values.mean())))},
        "spread": {"value": spread(shares), **_ends(interval(shares, spread))},
        "spread_in_theory": math.sqrt(SHARE * (1 - SHARE) / nonces),
        "none_valid": int((shares == 0).sum()),
        "most_valid": int((shares > 0.5).sum()),
        "agreement": agreement(distances.ravel().tolist(), vocab_size),
        "blocks_that_disagree": float(np.mean(np.array(each) < 0.01)),
        "width": float(distances.std(1, ddof=1).mean() / width),
    }


def _ends(ends: tuple[float, float]) -> dict[str, float]:
    return {"low": ends[0], "high": ends[1]}


def likeness(states: Tensor) -> float:
    """Return the mean cosine of hidden states [nonces, hidden_size] of different nonces."""
    units = torch.nn.functional.normalize(states.float(), dim=-1)
    cosines = units @ units.T
    count = len(units)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
