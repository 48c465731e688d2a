"""Distances of nonces on an engine: one forward of fixed shape, and the two random projections around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...scheduling.slices import Pause, Slices
from ..config import PoCConfig
from ..engine import Engine, never
from ..form import ProofForm, form_of
from ..prover import Outcomes, Row
from ..shared_work import DRAWN_AT_ONCE, Parts, SharedWork, filled
from .distance import distances, permutation_seed, permutations_of, target
from .form import DISTANCES
from .limits import check_fits


class DistanceProver:
    """Computes distances on an engine in this process: a `Prover`.

    Every forward has the round's shape, [batch_size, seq_len]: fewer rows are filled up with some that are thrown away.
    So a nonce's distance depends neither on its place in a forward nor on its neighbours, whatever nodes they are of.

    Args:
        engine: the model that serves users.
        slice_seconds: how long to compute between two pauses, outside the engine's forward.
        max_logits: bound on batch_size * vocab_size of a round; None for no bound.

    Raises:
        ValueError: the engine's hidden size is not one that projections take, or slice_seconds is not positive.
    """

    forms: Mapping[str, ProofForm] = {DISTANCES.name: DISTANCES}

    def __init__(self, engine: Engine, *, slice_seconds: float = 0.002, max_logits: int | None = None) -> None:
        self._use(SharedWork(engine, slice_seconds=slice_seconds, max_logits=max_logits))

    @classmethod
    def on(cls, work: SharedWork) -> DistanceProver:
        """Make one that shares ``work`` with provers of other forms."""
        prover = cls.__new__(cls)
        prover._use(work)
        return prover

    def _use(self, work: SharedWork) -> None:
        self.work, self.engine = work, work.engine
        # Of the round that was proved last.
        self._block_hash: str | None = None
        self._target = torch.empty(0)

    @property
    def slices(self) -> Slices | None:
        """The slices of the engine's forward; None until they are measured."""
        return self.engine.slices

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the round is not one of distances, or does not fit the engine."""
        form_of(config, self.forms)
        engine, max_logits = self.engine, self.work.max_logits
        check_fits(config, max_positions=engine.max_positions, vocab_size=engine.vocab_size, max_logits=max_logits)

    @torch.inference_mode()
    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        """Compute the distances of 1 to batch_size rows, and nothing of ``then``: see `Prover.prove`."""
        engine, work = self.engine, self.work
        work.pieces.forget_unread()
        parts = Parts(DISTANCES.parts, engine.device, pause)
        every = filled(config, rows)
        with parts.part("inputs"):
            self._begin_round(config.block_hash)
            permutation = self._permutations(config, every, parts.pause)
        x = work.inputs(config, every, parts)
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

    def compile_kernels(self) -> None:
        """Have a GPU's kernels for rounds checked and compiled: see `SharedWork.compile_kernels`."""
        self.work.compile_kernels()

    def measure_slices(self) -> None:
        """Measure and capture a GPU's forward of a round's default shape: see `SharedWork.measure_slices`."""
        self.work.measure_slices()
