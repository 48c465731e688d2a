"""Fingerprints of nonces on an engine: one forward of fixed shape with sign flips, and a mix of its positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scheduling.slices import Pause
from ..artifacts.tensors import texts
from ..config import PoCConfig
from ..limits import check_length
from ..prover import Outcomes, Row
from ..shared_work import DRAWN_AT_ONCE, Parts, SharedWork, filled
from .flips import Flips
from .form import FINGERPRINT
from .mix import FIRST_POSITION, mixed, pairs_of, read
from .signs import flips_seed, mix_seed


class Fingerprints:
    """Computes fingerprints on the engine of ``work``."""

    def __init__(self, work: SharedWork) -> None:
        self.work, self.engine = work, work.engine
        self._flips: dict[int, Flips] = {}  # by their rows, all in the memory of the most

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the engine cannot compute fingerprints, or the round does not fit it."""
        _ = self.engine.layers  # raises where a transform after each is not possible
        check_length(config, self.engine.max_positions)

    @torch.inference_mode()
    def prove(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Outcomes:
        """Compute the fingerprints of 1 to batch_size rows: texts, None for a row without."""
        engine, work = self.engine, self.work
        work.pieces.forget_unread()
        parts = Parts(FINGERPRINT.parts, engine.device, pause)
        every = filled(config, rows)
        x = work.inputs(config, every, parts)
        with parts.part("inputs"):
            flips = self._drawn_flips(config, every, parts.pause)
        with parts.part("forward"):
            hidden = engine.forward(x, parts.pause, flips)
            states = hidden[: len(rows), FIRST_POSITION : FIRST_POSITION + 2 * pairs_of(config.seq_len)]
            if config.use_random_projection:
                states = states.float().contiguous()
            parts.pause()
        if config.use_random_projection:
            work.project(config, states.view(-1, engine.hidden_size), work.projection.post, parts)
        with parts.part("mix"):
            mix = self._mix(config, rows, states, parts.pause)
            artifacts = texts(read(mix, work.projection.seed))
        work.pieces.read()
        return Outcomes(artifacts, parts.seconds())

    def _drawn_flips(self, config: PoCConfig, rows: Sequence[Row], pause: Pause) -> Flips:
        flips, width = self._flips_of(len(rows)), self.engine.layers * self.engine.hidden_size
        for some in self.work.pieces.of("flips", len(rows), width, pause, at_once=max(1, DRAWN_AT_ONCE // width)):
            flips.draw(some, [flips_seed(config.block_hash, *row) for row in rows[some]])
        return flips

    def _flips_of(self, rows: int) -> Flips:
        """Return the same flips for every forward of so many rows: the engine measures and captures it with them."""
        most = max(self._flips, default=0)
        if rows > most:
            for flips in self._flips.values():
                flips.release()
            self._flips = {rows: Flips(self.engine, rows)}
        elif rows not in self._flips:
            self._flips[rows] = self._flips[most].narrowed(rows)
        return self._flips[rows]

    def _mix(self, config: PoCConfig, rows: Sequence[Row], states: Tensor, pause: Pause) -> Tensor:
        """Mix positions, some rows at a time: a row's bits do not depend on the others."""
        mix = torch.empty(len(rows), states.shape[2], device=states.device)
        width = states.shape[1] * states.shape[2]
        for some in self.work.pieces.of("mix", len(rows), width, pause, at_once=len(rows)):
            mix[some] = mixed(states[some], [mix_seed(config.block_hash, *row) for row in rows[some]])
        return mix
