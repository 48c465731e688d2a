"""The seam above an engine: nonces in, outcomes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..scheduling.slices import Pause, Slices
from .config import PoCConfig
from .engine import never
from .form import ProofForm


class Outcomes(NamedTuple):
    """What a prover computed for some nonces."""

    values: list[Any]
    """One per nonce, in their order; what they are is the proof form's to say."""
    part_seconds: Mapping[str, float]
    """Seconds of each of the form's parts. Pauses do not count; on a CPU, other programs on its cores do."""


class Prover(Protocol):
    """Computes proofs of one form on the weights that serve users: in this process, or wherever its engine runs.

    Called from one thread at a time. Outcomes depend neither on their place in a batch nor on its other nonces.
    """

    @property
    def form(self) -> ProofForm:
        """The proof form."""
        ...

    @property
    def slices(self) -> Slices | None:
        """The slices of its forward; None where they are not measured yet, or are not cut here."""
        ...

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if it cannot prove a round of this configuration."""
        ...

    def prove(self, config: PoCConfig, public_key: str, nonces: Sequence[int], pause: Pause = never) -> Outcomes:
        """Compute the outcomes of one forward.

        Args:
            config: the round; every forward of a round has the same shape, whatever the number of nonces.
            public_key: the node whose nonces they are.
            nonces: 1 to batch_size.
            pause: called between two slices of the work; what it raises ends the work and comes through.
        """
        ...
