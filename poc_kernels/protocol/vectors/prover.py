"""Vectors of nonces on an engine: one forward of fixed shape, with a reflection after every decoder layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scheduling.slices import Pause
from ..artifacts.tensors import texts
from ..config import PoCConfig
from ..engine import LayerTransform
from ..limits import check_length
from ..prover import Outcomes, Row
from ..shared_work import DRAWN_AT_ONCE, Parts, SharedWork, filled
from .form import VECTORS
from .reflections import Reflections
from .vector import picks, rotation_axes, vectors

_ROUTED_BY_TOKENS = ("deepseek_v4",)
"""Model types for which the network's nodes hand in token ids beside the input embeddings."""


class Vectors:
    """Computes vectors on the engine of ``work``."""

    def __init__(self, work: SharedWork) -> None:
        self.work, self.engine = work, work.engine
        self._reflections: Reflections | None = None

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the engine cannot compute vectors, or the round does not fit it."""
        engine = self.engine
        if engine.model_type in _ROUTED_BY_TOKENS:
            raise ValueError(
                f"proof must be another form than vectors for a model of type {engine.model_type}, which routes by "
                "token ids: the engine takes input embeddings alone"
            )
        _ = engine.layers  # raises where a transform after each is not possible
        check_length(config, engine.max_positions)
        k = VECTORS.k_dim_of(config)
        if k > engine.hidden_size:
            raise ValueError(f"k_dim must be at most the hidden size {engine.hidden_size} of the model, got {k}")

    def transforms(self, config: PoCConfig) -> list[LayerTransform | None]:
        """Return the reflections of a round's forwards, if there are some by now: see `FormProver.transforms`."""
        return [] if self._reflections is None else [self._reflections]

    def passed(self) -> None:
        """Keep what there is while other forms are computed: it is small."""

    def release(self) -> None:
        """Keep what there is: it is small."""

    @torch.inference_mode()
    def prove(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Outcomes:
        """Compute the vectors of 1 to batch_size rows: texts, None for a row without."""
        engine, work = self.engine, self.work
        work.pieces.forget_unread()
        parts = Parts(VECTORS.parts, engine.device, pause)
        x = work.inputs(config, filled(config, rows), parts)
        with parts.part("forward"):
            if self._reflections is None:
                self._reflections = Reflections(engine)
            self._reflections.set_block(config.block_hash)
            states = engine.forward(x, parts.pause, self._reflections)
            hidden = states[: len(rows), -1].clone(memory_format=torch.contiguous_format)
            parts.pause()
        work.project(config, hidden, work.projection.post, parts)
        with parts.part("vectors"):
            artifacts = self._artifacts(config, rows, hidden, parts.pause)
        work.pieces.read()
        return Outcomes(artifacts, parts.seconds())

    def _artifacts(self, config: PoCConfig, rows: Sequence[Row], hidden: Tensor, pause: Pause) -> list[str | None]:
        """Make artifacts of last hidden states, some rows at a time: a row's bits do not depend on the others."""
        block_hash, k, (_, dim) = config.block_hash, VECTORS.k_dim_of(config), hidden.shape
        artifacts: list[str | None] = []
        width = dim + k * k
        for some in self.work.pieces.of("vectors", len(rows), width, pause, at_once=DRAWN_AT_ONCE // width):
            picked = picks(block_hash, rows[some], dim, k, hidden.device)
            axes = rotation_axes(block_hash, rows[some], k, hidden.device)
            artifacts += texts(vectors(hidden[some], picked, axes))
        return artifacts
