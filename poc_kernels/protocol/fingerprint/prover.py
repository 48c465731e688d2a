"""Fingerprints of nonces on an engine: one forward of fixed shape with sign flips, and a mix of its positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scheduling.slices import Pause
from ..artifacts.tensors import texts
from ..config import PoCConfig
from ..engine import LayerTransform
from ..limits import check_length, check_rows
from ..prover import Outcomes, Row
from ..shared_work import DRAWN_AT_ONCE, Parts, SharedWork, filled
from .flips import Flips
from .form import FINGERPRINT
from .mix import FIRST_POSITION, mixed, pairs_of, read
from .signs import flips_seed, mix_seed

_KEPT_BYTES = 2**26
"""Signs of at most so many bytes are kept, however few rows need them."""
_MAX_SPARE = 4
_SPARE_FORWARDS = 32
"""More are given back after so many forwards in a row, of any form, that need at most a fourth. Not at once: with other
flips, an engine measures and captures its forward anew."""


class Fingerprints:
    """Computes fingerprints on the engine of ``work``."""

    def __init__(self, work: SharedWork) -> None:
        self.work, self.engine = work, work.engine
        self._flips: dict[int, Flips] = {}  # by their rows, all in the memory of the most
        self._spared = 0  # the latest forwards in a row that needed at most a fourth of it

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the engine cannot compute fingerprints, or the round does not fit it."""
        layers, width = self.engine.layers, self.engine.hidden_size  # raises where no transform is possible
        check_length(config, self.engine.max_positions)
        what = f"in a round of fingerprints with {layers} x {width} signs per row"
        check_rows(config, per_row=layers * width, bound=self.work.bounds.signs, what=what)

    def transforms(self, config: PoCConfig) -> list[LayerTransform | None]:
        """Return the flips of a round's forwards, if there are some by now: see `FormProver.transforms`."""
        return [flips for rows, flips in self._flips.items() if rows == config.batch_size]

    def passed(self) -> None:
        """Count a forward of another form, which needs no signs."""
        self._count(0)

    def release(self) -> None:
        """Give back the memory of signs; later forwards have other flips, and graphs with these are not replayed."""
        kept, self._flips, self._spared = self._flips, {}, 0  # first: whatever fails then, none is used without memory
        for flips in kept.values():
            flips.release()

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
        self._count(rows)
        most = max(self._flips, default=0)
        if rows > most:
            self.release()
            self._flips[rows] = Flips(self.engine, rows)
        elif rows not in self._flips:
            self._flips[rows] = self._flips[most].narrowed(rows)
        return self._flips[rows]

    def _count(self, rows: int) -> None:
        """Count a forward that needs signs of so many rows; give back what is kept if many needed little of it."""
        most = max(self._flips, default=0)
        kept_bytes = self._flips[most].masks.nbytes if most else 0
        self._spared = self._spared + 1 if rows * _MAX_SPARE <= most and kept_bytes > _KEPT_BYTES else 0
        if self._spared == _SPARE_FORWARDS:
            self.release()

    def _mix(self, config: PoCConfig, rows: Sequence[Row], states: Tensor, pause: Pause) -> Tensor:
        """Mix positions, some rows at a time: a row's bits do not depend on the others."""
        mix = torch.empty(len(rows), states.shape[2], dtype=torch.float32, device=states.device)
        width = states.shape[1] * states.shape[2]
        for some in self.work.pieces.of("mix", len(rows), width, pause, at_once=len(rows)):
            mix[some] = mixed(states[some], [mix_seed(config.block_hash, *row) for row in rows[some]])
        return mix
