"""What a proof form is to a round: how its proofs are named, made, counted and judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .config import PoCConfig


class Histogram(NamedTuple):
    """A histogram of outcomes, as Prometheus shows it."""

    name: str
    description: str
    buckets: tuple[float, ...]


class ProofForm(Protocol):
    """One kind of proof. It has no tensor and no engine in it: a `Prover` computes the outcomes that it speaks of.

    A proof is a dataclass with public_key, block_hash, block_height, node_id and nonces, a length and ``to_dict``; a
    verdict is one too, with ``judged``, n_invalid, probability_honest and fraud_detected.
    """

    @property
    def name(self) -> str:
        """Name of the form in requests, logs and errors."""
        ...

    @property
    def proof_type(self) -> type[Any]:
        """Class of the proofs."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that a prover's time is made of."""
        ...

    @property
    def per_nonce(self) -> tuple[str, ...]:
        """Names of a proof's lists that have one value per nonce, the nonces first."""
        ...

    @property
    def listed_as(self) -> str:
        """Name under which the status lists the outcomes of valid nonces."""
        ...

    @property
    def histogram(self) -> Histogram:
        """Histogram of outcomes."""
        ...

    def proof(self, config: PoCConfig, nonces: list[int], outcomes: list[Any]) -> Any:
        """Return the proof that this node claims for nonces of its own."""
        ...

    def valid(self, config: PoCConfig, proof: Any) -> Any:
        """Return the part of a proof that counts, and is sent to the chain's node."""
        ...

    def outcomes(self, proof: Any) -> list[Any]:
        """Return the outcomes in a proof, one per nonce."""
        ...

    def count_valid(self, config: PoCConfig, outcomes: Sequence[Any]) -> int:
        """Return how many of the outcomes count."""
        ...

    def verdict(self, config: PoCConfig, proof: Any, outcomes: Sequence[Any]) -> Any:
        """Return the verdict on a proof from the recomputed outcomes of its nonces."""
        ...
