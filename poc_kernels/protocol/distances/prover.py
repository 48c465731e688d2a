"""Distances of nonces on an engine: one forward of fixed shape, and the two random projections around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ... import backends
from ...definition import MAX_FEATURES
from ...projection import RandomProjection
from ...scheduling.slices import Pause, Slices
from ...scheduling.stopwatch import Stopwatch
from .. import inputs
from ..config import PoCConfig
from ..engine import Engine, never
from ..pieces import Pieces
from ..prover import Outcomes, Row
from .distance import distances, permutation_seed, permutations_of, target
from .form import DISTANCES
from .limits import check_fits

# What a GPU computes between two pauses before it was timed.
_DRAWN_AT_ONCE = 2**24
"""Random numbers."""
_PROJECTED_AT_ONCE = 2**38
"""Products of a projection."""
_MIN_PROJECTED_ROWS = 256
"""With fewer rows at once, drawing P would take the longer part."""


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

    form = DISTANCES

    def __init__(self, engine: Engine, *, slice_seconds: float = 0.002, max_logits: int | None = None) -> None:
        if not slice_seconds > 0:
            raise ValueError(f"slice_seconds must be positive, got {slice_seconds}")
        if not 1 <= engine.hidden_size <= MAX_FEATURES:
            raise ValueError(f"engine must have a hidden size in [1, {MAX_FEATURES}], got {engine.hidden_size}")
        self.engine = engine
        self._max_logits = max_logits
        self._pieces = Pieces(engine.device, slice_seconds)
        # Of the round that was proved last.
        self._block_hash: str | None = None
        self._target = torch.empty(0)
        self._projection = RandomProjection(0, engine.hidden_size, device=engine.device)

    @property
    def slices(self) -> Slices | None:
        """The slices of the engine's forward; None until they are measured."""
        return self.engine.slices

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the round does not fit the engine."""
        engine = self.engine
        check_fits(
            config, max_positions=engine.max_positions, vocab_size=engine.vocab_size, max_logits=self._max_logits
        )

    @torch.inference_mode()
    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        """Compute the distances of 1 to batch_size rows, and nothing of ``then``: see `Prover.prove`."""
        engine = self.engine
        self._pieces.forget_unread()
        parts = _Parts(engine.device, pause)
        filled = [*rows] + [rows[-1]] * (config.batch_size - len(rows))
        with parts.part("inputs"):
            self._begin_round(config.block_hash)
            x, permutation = self._draw(config, filled, parts.pause)
        if config.use_random_projection:
            with parts.part("projection"):
                self._project(x.view(-1, engine.hidden_size), self._projection.pre, parts.pause)
        with parts.part("forward"):
            hidden = engine.forward(x, parts.pause)[:, -1].clone(memory_format=torch.contiguous_format)
            parts.pause()
        if config.use_random_projection:
            with parts.part("projection"):
                self._project(hidden, self._projection.post, parts.pause)
        with parts.part("forward"):
            logits = engine.compute_logits(hidden)
            parts.pause()
        with parts.part("distance"):
            computed: list[float] = distances(logits, permutation, self._target).tolist()[: len(rows)]
        self._pieces.read()
        return Outcomes(computed, parts.seconds())

    def _begin_round(self, block_hash: str) -> None:
        """Make what all nonces of a round share. Of the projections, only the 8-byte seed changes."""
        if self._block_hash != block_hash:
            self._target = target(block_hash, self.engine.vocab_size, self.engine.device)
            self._projection.set_block_hash(block_hash)
            self._block_hash = block_hash

    def _draw(self, config: PoCConfig, rows: list[Row], pause: Pause) -> tuple[Tensor, Tensor]:
        """Draw inputs and permutations, some rows at a time: no number depends on the others."""
        engine, block_hash = self.engine, config.block_hash
        length, vocab_size = config.seq_len * engine.hidden_size, engine.vocab_size
        x = torch.empty(len(rows), config.seq_len, engine.hidden_size, dtype=engine.dtype, device=engine.device)
        permutation = torch.empty(len(rows), vocab_size, dtype=torch.int64, device=engine.device)
        seeds = [inputs.inputs_seed(block_hash, *row) for row in rows]
        for some in self._pieces.of("inputs", len(rows), length, pause, at_once=_DRAWN_AT_ONCE // length):
            x[some] = inputs.normal(seeds[some], length, engine.device, engine.dtype).view_as(x[some])
        seeds = [permutation_seed(block_hash, *row) for row in rows]
        for some in self._pieces.of("permutations", len(rows), vocab_size, pause, at_once=_DRAWN_AT_ONCE // vocab_size):
            permutation[some] = permutations_of(seeds[some], vocab_size, engine.device)
        return x, permutation

    def _project(self, states: Tensor, projection: Callable[[Tensor], Tensor], pause: Pause) -> None:
        """Project [rows, hidden_size] in place, some rows at a time: a row's bits do not depend on the others.

        In place, because a second tensor of this size makes a CPU's forward slower, by its allocations.
        """
        rows, width = states.shape
        at_once = _PROJECTED_AT_ONCE // width**2
        for some in self._pieces.of("projection", rows, width, pause, at_once=at_once, min_rows=_MIN_PROJECTED_ROWS):
            states[some] = projection(states[some])

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Have a GPU's kernels for rounds checked and compiled, which takes minutes where none is on disk.

        Those of the projection too: any round may ask for it, and by then the KV cache has taken the memory.
        """
        engine = self.engine
        if engine.device.type == "cuda":
            inputs.normal([0], 1, engine.device, engine.dtype)
            inputs.hash32([0], 0, 1, engine.device)
            backends.warmup(engine.device, engine.hidden_size, dtype=engine.dtype)

    @torch.inference_mode()
    def measure_slices(self) -> None:
        """Measure and capture a GPU's forward of a round's default shape, before the KV cache takes the memory.

        A CPU measures the first forwards of a round: one more could take minutes there.
        """
        engine = self.engine
        if engine.device.type == "cuda":
            length = min(PoCConfig.seq_len, engine.max_positions)
            # Real inputs: zeros would be zeros in every layer, and the check of a captured graph would see nothing.
            seeds = list(range(PoCConfig.batch_size))
            x = inputs.normal(seeds, length * engine.hidden_size, engine.device, engine.dtype)
            engine.forward(x.view(len(seeds), length, engine.hidden_size))


class _Parts:
    """Seconds of each part of a batch. Pauses are no part of it: `pause` in place of the batch's own."""

    def __init__(self, device: torch.device, pause: Pause) -> None:
        self._watch = Stopwatch(device)
        self._pause = pause

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._watch.begin(name)
        yield
        self._watch.end()

    def pause(self) -> None:
        """Pause inside a part."""
        name = self._watch.end()
        self._pause()
        self._watch.begin(name)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part. Call it after the batch's results were read: it waits for nothing then."""
        totals = dict.fromkeys(DISTANCES.parts, 0.0)
        for name, seconds in self._watch.spans():
            totals[name] += seconds
        return totals
