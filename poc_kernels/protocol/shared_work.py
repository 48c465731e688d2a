"""What provers of every form do around the forward of one engine: inputs, projections, and the time that they take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import backends
from ..definition import MAX_FEATURES
from ..projection import RandomProjection
from ..scheduling.slices import Pause
from ..scheduling.stopwatch import Stopwatch
from . import form_kernels, inputs
from .config import PoCConfig
from .engine import Engine
from .limits import NO_BOUNDS, Bounds
from .pieces import Pieces
from .prover import Row

# What a GPU computes between two pauses before it was timed.
DRAWN_AT_ONCE = 2**24
"""Random numbers."""
_PROJECTED_AT_ONCE = 2**38
"""Products of a projection."""
_MIN_PROJECTED_ROWS = 256
"""With fewer rows at once, drawing P would take the longer part."""


class SharedWork:
    """Draws inputs for an engine and projects around its forward: provers of several forms share one.

    Args:
        engine: the model that serves users.
        slice_seconds: how long to compute between two pauses, outside the engine's forward.
        bounds: on what the rows of a forward take.

    Raises:
        ValueError: the engine's hidden size is not one that projections take, or slice_seconds is not positive.
    """

    def __init__(self, engine: Engine, *, slice_seconds: float = 0.002, bounds: Bounds = NO_BOUNDS) -> None:
        if not slice_seconds > 0:
            raise ValueError(f"slice_seconds must be positive, got {slice_seconds}")
        if not 1 <= engine.hidden_size <= MAX_FEATURES:
            raise ValueError(f"engine must have a hidden size in [1, {MAX_FEATURES}], got {engine.hidden_size}")
        self.engine = engine
        self.bounds = bounds
        self.pieces = Pieces(engine.device, slice_seconds)
        self.projection = RandomProjection(0, engine.hidden_size, device=engine.device)
        self._block_hash: str | None = None

    def inputs(self, config: PoCConfig, rows: Sequence[Row], parts: Parts) -> Tensor:
        """Draw the inputs of these rows, and project them where the round wants it.

        Returns:
            [rows, seq_len, hidden_size] in the model's dtype, in the parts "inputs" and "projection".
        """
        engine = self.engine
        length = config.seq_len * engine.hidden_size
        with parts.part("inputs"):
            self._set_block(config.block_hash)
            x = torch.empty(len(rows), config.seq_len, engine.hidden_size, dtype=engine.dtype, device=engine.device)
            for some in self.pieces.of("inputs", len(rows), length, parts.pause, at_once=DRAWN_AT_ONCE // length):
                x[some] = _drawn(config, rows[some], length, engine).view_as(x[some])
        self.project(config, x.view(-1, engine.hidden_size), self.projection.pre, parts)
        return x

    def project(self, config: PoCConfig, states: Tensor, projection: Callable[[Tensor], Tensor], parts: Parts) -> None:
        """Project states [rows, hidden_size] in place, if the round wants it, some rows at a time.

        A row's bits do not depend on the others. In place, because a second tensor of this size makes a CPU's forward
        slower, by its allocations.
        """
        if not config.use_random_projection:
            return
        rows, width = states.shape
        at_once, min_rows = _PROJECTED_AT_ONCE // width**2, _MIN_PROJECTED_ROWS
        with parts.part("projection"):
            for some in self.pieces.of("projection", rows, width, parts.pause, at_once=at_once, min_rows=min_rows):
                states[some] = projection(states[some])

    def _set_block(self, block_hash: str) -> None:
        """Seed the projections for a block: 8 bytes change."""
        if self._block_hash != block_hash:
            self.projection.set_block_hash(block_hash)
            self._block_hash = block_hash

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Have a GPU's kernels for rounds checked and compiled, which takes minutes where none is on disk.

        Those of the projection too: any round may ask for it, and by then the KV cache has taken the memory.
        """
        engine = self.engine
        if engine.device.type == "cuda":
            inputs.normal([0], 1, engine.device, engine.dtype)
            inputs.hash32([0], 0, 1, engine.device)
            form_kernels.on(engine.device)
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


def _drawn(config: PoCConfig, rows: Sequence[Row], length: int, engine: Engine) -> Tensor:
    """Draw inputs [len(rows), length] by the generator that the round wants."""
    if config.stronger_rng:
        stronger = [inputs.stronger_seeds(config.block_hash, *row) for row in rows]
        return inputs.stronger_normal(stronger, length, engine.device, engine.dtype)
    seeds = [inputs.inputs_seed(config.block_hash, *row) for row in rows]
    return inputs.normal(seeds, length, engine.device, engine.dtype)


def filled(config: PoCConfig, rows: Sequence[Row]) -> list[Row]:
    """Fill the rows of a forward up to batch_size, with some whose outcomes are thrown away."""
    return [*rows] + [rows[-1]] * (config.batch_size - len(rows))


class Parts:
    """Seconds of each part of a batch. Pauses are no part of it: `pause` in place of the batch's own.

    Args:
        names: of the parts.
        device: what computes.
        pause: the batch's own.
    """

    def __init__(self, names: Sequence[str], device: torch.device, pause: Pause) -> None:
        self._names = names
        self._watch = Stopwatch(device)
        self._pause = pause

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside the block to a part."""
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
        totals = dict.fromkeys(self._names, 0.0)
        for name, seconds in self._watch.spans():
            totals[name] += seconds
        return totals
