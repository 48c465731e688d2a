"""What the round's states need to know of this proof form: its names, its proofs and its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import PoCConfig
from ..form import Histogram
from .proofs import ProofBatch, ValidatedBatch, validate_distances

# Distances gather around sqrt(2), the closer the larger the vocabulary: within 0.1 for 1,000 tokens, 0.01 for 150,000.
_OFFSETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1)


class DistanceForm:
    """Proof form 1: a nonce is valid if its distance is below the round's r_target."""

    name = "distances"
    proof_type = ProofBatch
    parts = ("inputs", "projection", "forward", "distance")
    per_nonce = ("nonces", "dist")
    listed_as = "valid_distances"
    histogram = Histogram(
        "poc_distance",
        "Distances computed",
        tuple(round(math.sqrt(2) + offset, 4) for offset in (*(-o for o in reversed(_OFFSETS)), 0, *_OFFSETS)),
    )

    def proof(self, config: PoCConfig, nonces: list[int], outcomes: list[float]) -> ProofBatch:
        """Return the batch that this node claims."""
        return ProofBatch(
            config.public_key, config.block_hash, config.block_height, nonces, outcomes, node_id=config.node_id
        )

    def valid(self, config: PoCConfig, proof: ProofBatch) -> ProofBatch:
        """Return the part of a batch that counts."""
        return proof.below(config.r_target)

    def outcomes(self, proof: ProofBatch) -> list[float]:
        """Return the distances of a batch."""
        return proof.dist

    def count_valid(self, config: PoCConfig, outcomes: Sequence[float]) -> int:
        """Return how many of the outcomes are below the round's r_target."""
        return sum(distance < config.r_target for distance in outcomes)

    def verdict(self, config: PoCConfig, proof: ProofBatch, outcomes: Sequence[float]) -> ValidatedBatch:
        """Return the verdict on a batch from its recomputed distances."""
        return validate_distances(proof, outcomes, config.r_target, config.fraud_threshold)


DISTANCES = DistanceForm()
