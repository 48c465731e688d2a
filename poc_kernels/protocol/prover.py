"""The seam above an engine: nonces in, outcomes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..scheduling.slices import Pause, Slices
from .config import PoCConfig
from .engine import never
from .form import ProofForm

AHEAD = 2
"""How many forwards a prover is told of before they are asked for."""


class Row(NamedTuple):
    """A row of a forward: a nonce of a node."""

    public_key: str
    nonce: int


class Outcomes(NamedTuple):
    """What a prover computed for the rows of a forward."""

    values: list[Any]
    """One per row, in their order; what they are is the proof form's to say."""
    part_seconds: Mapping[str, float]
    """Seconds of each of the form's parts. Pauses do not count; on a CPU, other programs on its cores do."""


class Prover(Protocol):
    """Computes proofs on the weights that serve users: in this process, or wherever its engine runs.

    Called from one thread at a time. An outcome depends neither on the place of its row nor on the other rows.
    """

    forms: Mapping[str, ProofForm]
    """What it can prove, by the name that `PoCConfig.proof` has; the first is what a node speaks of before a round."""

    @property
    def slices(self) -> Slices | None:
        """The slices of its forward; None where they are not measured yet, or are not cut here."""

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if it cannot prove a round of this configuration."""

    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        """Compute the outcomes of one forward.

        Args:
            config: the round; every forward of a round has the same shape, whatever the number of rows. An equal
                configuration that is another object is another round, before which weights may have been replaced.
            rows: 1 to batch_size, of one node or of several.
            pause: called between two slices of the work; what it raises ends the work and comes through.
            then: rows of the forwards of this round that are likely to be asked for next, in their order. A prover far
                away may begin them, so as not to wait for a round trip; nobody is owed their outcomes.
        """
