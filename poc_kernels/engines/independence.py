"""The proof, made before a node begins, that what a round reads of a row has bits that depend on nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol import PoCConfig
from ..protocol.distances.form import DISTANCES
from ..protocol.engine import Engine, never
from ..protocol.fingerprint.flips import Flips
from ..protocol.fingerprint.form import FINGERPRINT, MIN_SEQ_LEN
from ..protocol.fingerprint.mix import FIRST_POSITION
from ..protocol.vectors.form import VECTORS
from ..protocol.vectors.reflections import Reflections

logger = logging.getLogger("poc_kernels")

_BATCH, _LENGTH = 4, MIN_SEQ_LEN
"""Shape in which rows are tried on a CPU, where one of a round may take minutes."""

_BITS = {2: torch.int16, 4: torch.int32}


class _Rows(NamedTuple):
    """Rows of a forward: inputs [batch, length, hidden_size], and the seed of each row's flips."""

    inputs: Tensor
    seeds: Sequence[int]

    def pick(self, places: Sequence[int]) -> _Rows:
        """Return the rows at these places."""
        return _Rows(self.inputs[list(places)], [self.seeds[place] for place in places])


_Compute = Callable[[_Rows], list[Tensor]]
"""Computes what is read of rows, [batch, ...] each."""


def refusal(engine: Engine, cure: str, *, transforms: bool) -> str | None:
    """Say in a sentence on what a row's bits depend besides its input; None if on nothing.

    Rows are computed among others, again, permuted, beside others, and alone, as rounds do it: in one shape. On a GPU
    it is that of a round with default settings, whose forward is measured and captured with it. Compared is what the
    forms read: the last position and its logits of a plain forward, the last position of one with reflections, and all
    positions that fingerprints mix of one with sign flips. A form whose states are not finite is warned of: it is
    served, and its rounds find nothing. To be called on all ranks of a model, with the same arguments.

    Args:
        engine: what computes proofs.
        cure: what an operator can do, as the end of the sentence.
        transforms: whether the forms with a transform after every decoder layer are offered.
    """
    batch, length = (PoCConfig.batch_size, PoCConfig.seq_len) if engine.device.type == "cuda" else (_BATCH, _LENGTH)
    length = min(length, engine.max_positions)
    generator = torch.Generator().manual_seed(0)

    def random(first_seed: int) -> _Rows:
        x = torch.randn(batch, length, engine.hidden_size, generator=generator, device="cpu")
        return _Rows(x.to(engine.device, engine.dtype), range(first_seed, first_seed + batch))

    rows, others = random(0), random(batch)
    others.inputs[0] = rows.inputs[0]
    beside = _Rows(others.inputs, [rows.seeds[0], *others.seeds[1:]])
    reverse, alone = range(batch - 1, -1, -1), [0] * batch
    ways: list[tuple[str, _Rows, Sequence[int], Sequence[int]]] = [  # rows, which of them are computed, and compared
        ("the call", rows, range(batch), range(batch)),
        ("its place in the batch", rows, reverse, reverse),
        ("the rows beside it", beside, range(batch), alone[:1]),
        ("the rows beside it", rows, alone, alone),
    ]
    finite, depends = True, ""
    for form, where, compute in _computations(engine, batch, transforms):
        expected, found = compute(rows), []
        if not all(bool(part.isfinite().all()) for part in expected):
            finite = finite and form != DISTANCES.name
            logger.warning(
                "rounds of %s will have no proofs: hidden states of random inputs are not finite%s", form, where
            )
        for what, some, computed, places in ways:  # all: other ranks compute them, and would wait for this one
            parts = zip(expected, compute(some.pick(computed)), strict=True)
            if not all(torch.equal(_bits(part[: len(places)]), _bits(right[list(places)])) for right, part in parts):
                found.append(f"{what}{where}")
        depends = found[0] if found else depends
    if not finite:
        return "proofs need finite logits, which this model does not compute of random inputs: serve another model"
    if depends:
        return f"proofs need rows whose bits depend on nothing else, here they depend on {depends}: {cure}"
    return None


def _computations(engine: Engine, batch: int, transforms: bool) -> Iterator[tuple[str, str, _Compute]]:
    """Return what computes rows as the forms do, with the form's name and where this differs from a plain forward.

    The plain forward is the last: on a GPU it is what stays captured.
    """
    if transforms:
        flips = Flips(engine, batch)

        def flipped(rows: _Rows) -> list[Tensor]:
            flips.draw(slice(0, batch), rows.seeds)
            states = engine.forward(rows.inputs, never, flips)
            return [states[:, min(FIRST_POSITION, states.shape[1] - 1) :].to("cpu", copy=True)]

        yield FINGERPRINT.name, " where signs are flipped after its layers", flipped
        flips.release()
        reflections = Reflections(engine)
        reflections.set_block("trial")

        def reflected(rows: _Rows) -> list[Tensor]:
            return [engine.forward(rows.inputs, never, reflections)[:, -1].to("cpu", copy=True)]

        yield VECTORS.name, " where states are reflected after its layers", reflected

    def plain(rows: _Rows) -> list[Tensor]:
        hidden = engine.forward(rows.inputs)[:, -1].clone(memory_format=torch.contiguous_format)
        return [hidden.cpu(), engine.compute_logits(hidden).cpu()]

    yield DISTANCES.name, "", plain


def _bits(x: Tensor) -> Tensor:
    """Return x as integers: a NaN is equal to itself."""
    return x.contiguous().view(_BITS[x.element_size()])
