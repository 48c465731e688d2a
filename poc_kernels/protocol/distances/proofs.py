"""Proof batches of distances, and the verdict on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..batches import check_batch
from ..checks import check_float
from ..config import UNSET
from ..honesty import probability_honest


@dataclass(frozen=True)
class ProofBatch:
    """Nonces of one node in one round, and their distances.

    Args:
        public_key, block_hash, block_height, node_id: the node, and the round.
        nonces: distinct, each in [0, 2**63).
        dist: one distance per nonce, finite and not negative; empty to have them computed without a verdict.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    public_key: str
    block_hash: str
    block_height: int
    nonces: list[int]
    dist: list[float]
    node_id: int = UNSET

    def __post_init__(self) -> None:
        check_batch(self, "dist", self.dist, "a distance")
        _check_distances(self.dist)

    def __len__(self) -> int:
        return len(self.nonces)

    def below(self, r_target: float) -> ProofBatch:
        """Return the batch with only its valid nonces: those whose distance is below ``r_target``."""
        kept = [pair for pair in zip(self.nonces, self.dist, strict=True) if pair[1] < r_target]
        return dataclasses.replace(self, nonces=[nonce for nonce, _ in kept], dist=[distance for _, distance in kept])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them. The lists are the batch's own."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _check_distances(dist: list[float]) -> None:
    if dist and not (set(map(type, dist)) == {float} and all(map(math.isfinite, dist)) and min(dist) >= 0):
        for distance in dist:
            check_float("dist", distance)
            if distance < 0:
                raise ValueError(f"dist must hold distances of at least 0, got {distance}")


@dataclass(frozen=True)
class ValidatedBatch(ProofBatch):
    """A `ProofBatch` whose ``dist`` was recomputed, and the verdict on it.

    ``received_dist`` is what the node claimed, empty if it claimed nothing; then there is no verdict: n_invalid is 0,
    probability_honest 1 and fraud_detected false.
    """

    received_dist: list[float] = dataclasses.field(default_factory=list)
    r_target: float = 0.0
    fraud_threshold: float = 0.0
    n_invalid: int = 0
    probability_honest: float = 1.0
    fraud_detected: bool = False

    @property
    def judged(self) -> bool:
        """Whether there is a verdict: the node claimed something."""
        return bool(self.received_dist)


def validate_distances(
    batch: ProofBatch, recomputed: Sequence[float], r_target: float, fraud_threshold: float
) -> ValidatedBatch:
    """Return the verdict on ``batch`` from its recomputed distances, in the order of its nonces.

    A nonce is invalid if its received distance is not below r_target, or its recomputed one is above it.

    Raises:
        ValueError: recomputed does not have a distance for each nonce.
    """
    if len(recomputed) != len(batch.nonces):
        raise ValueError(f"recomputed must have {len(batch.nonces)} distances, one per nonce, got {len(recomputed)}")
    claims = zip(batch.dist, recomputed, strict=False)  # none where nothing was claimed
    n_invalid = sum(not (claimed < r_target and distance <= r_target) for claimed, distance in claims)
    honest = probability_honest(n_invalid, len(batch.dist))
    return ValidatedBatch(
        **{**batch.to_dict(), "dist": list(recomputed)},
        received_dist=batch.dist,
        r_target=r_target,
        fraud_threshold=fraud_threshold,
        n_invalid=n_invalid,
        probability_honest=honest,
        fraud_detected=honest < fraud_threshold,
    )
