"""Distances of nonces on an engine: one forward of fixed shape, and the two random projections around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scheduling.slices import Pause
from ..config import PoCConfig
from ..engine import LayerTransform
from ..inputs import permutations_of
from ..prover import Outcomes, Row
from ..shared_work import DRAWN_AT_ONCE, Parts, SharedWork, filled
from .distance import distances, permutation_seed, target
from .form import DISTANCES
from .limits import check_fits


class Distances:
    """Computes distances on the engine of ``work``."""

    def __init__(self, work: SharedWork) -> None:
        self.work, self.engine = work, work.engine
        # Of the round that was proved last.
        self._block_hash: str | None = None
        self._target = torch.empty(0)

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the round does not fit the engine."""
        engine, max_logits = self.engine, self.work.bounds.logits
        check_fits(config, max_positions=engine.max_positions, vocab_size=engine.vocab_size, max_logits=max_logits)

    def transforms(self, config: PoCConfig) -> list[LayerTransform | None]:
        """Return that forwards have no transform: see `FormProver.transforms`."""
        return [None]

    def passed(self) -> None:
        """Keep what there is while other forms are computed: it is small."""

    def release(self) -> None:
        """Keep what there is: it is small."""

    @torch.inference_mode()
    def prove(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Outcomes:
        """Compute the distances of 1 to batch_size rows."""
        engine, work = self.engine, self.work
        work.pieces.forget_unread()
        parts = Parts(DISTANCES.parts, engine.device, pause)
        every = filled(config, rows)
        x = work.inputs(config, every, parts)
        with parts.part("inputs"):
            self._begin_round(config.block_hash)
            permutation = self._permutations(config, every, parts.pause)
        with parts.part("forward"):
            hidden = engine.forward(x, parts.pause)[:, -1].clone(memory_format=torch.contiguous_format)
            parts.pause()
        work.project(config, hidden, work.projection.post, parts)
        with parts.part("forward"):
            logits = engine.compute_logits(hidden)
            parts.pause()
        with parts.part("distance"):
            computed: list[float] = distances(logits, permutation, self._target).tolist()[: len(rows)]
        work.pieces.read()
        return Outcomes(computed, parts.seconds())

    def _begin_round(self, block_hash: str) -> None:
        """Make what all nonces of a round share."""
        if self._block_hash != block_hash:
            self._target = target(block_hash, self.engine.vocab_size, self.engine.device)
            self._block_hash = block_hash

    def _permutations(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Tensor:
        """Draw permutations, some rows at a time: no number depends on the others."""
        engine, vocab_size = self.engine, self.engine.vocab_size
        permutation = torch.empty(len(rows), vocab_size, dtype=torch.int64, device=engine.device)
        seeds = [permutation_seed(config.block_hash, *row) for row in rows]
        at_once = DRAWN_AT_ONCE // vocab_size
        for some in self.work.pieces.of("permutations", len(rows), vocab_size, pause, at_once=at_once):
            permutation[some] = permutations_of(seeds[some], vocab_size, engine.device)
        return permutation
