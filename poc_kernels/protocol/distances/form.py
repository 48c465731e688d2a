"""What the round's states need to know of this proof form."""

from __future__ import annotations

import math

from ..form import Histogram, ProofForm
from .proofs import ProofBatch, validate_distances

# Distances gather around sqrt(2), the closer the larger the vocabulary: within 0.1 for 1,000 tokens, 0.01 for 150,000.
_OFFSETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1)
_BUCKETS = tuple(round(math.sqrt(2) + offset, 4) for offset in (*(-o for o in reversed(_OFFSETS)), 0, *_OFFSETS))

DISTANCES = ProofForm(
    name="distances",
    proof_type=ProofBatch,
    parts=("inputs", "projection", "forward", "distance"),
    per_nonce=("nonces", "dist"),
    listed_as="valid_distances",
    histogram=Histogram("poc_distance", "Distances computed", _BUCKETS),
    count_valid=lambda config, distances: sum(distance < config.r_target for distance in distances),
    valid=lambda config, proof: proof.below(config.r_target),
    verdict=lambda config, proof, distances: validate_distances(
        proof, distances, config.r_target, config.fraud_threshold
    ),
)
"""Proof form 1: a nonce is valid if its distance is below the round's r_target."""
