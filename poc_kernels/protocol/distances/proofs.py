"""Proof batches, and the test that tells an honest batch from a forged one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from ..config import MAX_NONCE, UNSET, check_float, check_int, check_text

HONEST_INVALID_RATE = 5e-4
"""How often an honest node's nonce fails to validate, at most."""


@dataclass(frozen=True)
class ProofBatch:
    """Nonces of one node in one round, and their distances.

    Args:
        public_key, block_hash, block_height, node_id: whose, and of which round.
        nonces: distinct, each in [0, 2**63).
        dist: one distance a nonce, finite and not negative; empty to have them computed without a verdict.

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
        check_text("public_key", self.public_key)
        check_text("block_hash", self.block_hash)
        check_int("block_height", self.block_height, 0, MAX_NONCE)
        check_int("node_id", self.node_id, UNSET, 2**31)
        for name, values in (("nonces", self.nonces), ("dist", self.dist)):
            if not isinstance(values, list):
                raise TypeError(f"{name} must be a list, got {type(values).__name__}")
        for nonce in self.nonces:
            check_int("nonces", nonce, 0, MAX_NONCE)
        if len(set(self.nonces)) != len(self.nonces):
            raise ValueError(f"nonces must be distinct, got {len(self.nonces) - len(set(self.nonces))} repeated")
        if len(self.dist) not in (0, len(self.nonces)):
            raise ValueError(
                f"dist must be empty or have a distance for each of the {len(self.nonces)} nonces, got {len(self.dist)}"
            )
        for distance in self.dist:
            check_float("dist", distance)
            if distance < 0:
                raise ValueError(f"dist must hold distances of at least 0, got {distance}")

    def __len__(self) -> int:
        return len(self.nonces)

    def below(self, r_target: float) -> ProofBatch:
        """The batch with only its valid nonces: those whose distance is below ``r_target``."""
        kept = [pair for pair in zip(self.nonces, self.dist, strict=True) if pair[1] < r_target]
        return dataclasses.replace(self, nonces=[nonce for nonce, _ in kept], dist=[distance for _, distance in kept])

    def to_dict(self) -> dict[str, Any]:
        """The batch as JSON has it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ValidatedBatch(ProofBatch):
    """A `ProofBatch` whose ``dist`` was recomputed, and what came of it.

    ``received_dist`` is what the node claimed, empty if it claimed nothing; then there is no verdict: n_invalid is 0,
    probability_honest 1 and fraud_detected false.
    """

    received_dist: list[float] = dataclasses.field(default_factory=list)
    r_target: float = 0.0
    fraud_threshold: float = 0.0
    n_invalid: int = 0
    probability_honest: float = 1.0
    fraud_detected: bool = False


def probability_honest(n_invalid: int, n: int) -> float:
    """p-value of the one-sided binomial test: at least ``n_invalid`` of ``n`` invalid, each with 5e-4. 1 for none.

    Raises:
        TypeError, ValueError: not 0 <= n_invalid <= n, in ints.
    """
    check_int("n", n, 0, MAX_NONCE)
    check_int("n_invalid", n_invalid, 0, n)
    if n == 0:
        return 1.0
    return float(binomtest(n_invalid, n, HONEST_INVALID_RATE, alternative="greater").pvalue)


def validate_distances(
    batch: ProofBatch, recomputed: Sequence[float], r_target: float, fraud_threshold: float
) -> ValidatedBatch:
    """The verdict on ``batch`` from its recomputed distances, in the order of its nonces.

    A nonce is invalid if its received distance is not below r_target, or its recomputed one is above it.

    Raises:
        ValueError: recomputed does not have a distance for each nonce.
    """
    if len(recomputed) != len(batch.nonces):
        raise ValueError(f"recomputed must have {len(batch.nonces)} distances, one a nonce, got {len(recomputed)}")
    claims = zip(batch.dist, recomputed, strict=False)  # none where nothing was claimed
    n_invalid = sum(not (claimed < r_target and distance <= r_target) for claimed, distance in claims)
    honest = probability_honest(n_invalid, len(batch.dist))
    return ValidatedBatch(
        public_key=batch.public_key,
        block_hash=batch.block_hash,
        block_height=batch.block_height,
        nonces=batch.nonces,
        dist=list(recomputed),
        node_id=batch.node_id,
        received_dist=batch.dist,
        r_target=r_target,
        fraud_threshold=fraud_threshold,
        n_invalid=n_invalid,
        probability_honest=honest,
        fraud_detected=honest < fraud_threshold,
    )
