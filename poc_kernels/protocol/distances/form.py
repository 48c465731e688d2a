"""What the round's states need to know of this proof form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..config import PoCConfig
from ..form import GeneratedBody, Histogram, ProofForm
from .proofs import ProofBatch, ValidatedBatch, validate_distances

# Distances gather around sqrt(2), the closer the larger the vocabulary: within 0.1 for 1,000 tokens, 0.01 for 150,000.
_OFFSETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1)
_BUCKETS = tuple(round(math.sqrt(2) + offset, 4) for offset in (*(-o for o in reversed(_OFFSETS)), 0, *_OFFSETS))


def _check(config: PoCConfig) -> None:
    if config.r_target is None:
        raise ValueError("r_target must be a positive number in a round of distances, got None")
    if config.k_dim is not None:
        raise ValueError(f"k_dim must be None in a round of distances, which has no artifacts, got {config.k_dim}")
    if config.stronger_rng:
        raise ValueError("stronger_rng must be False in a round of distances, got True")


def _r_target(config: PoCConfig) -> float:
    assert config.r_target is not None  # the configuration of a round was checked
    return config.r_target


def _verdict(config: PoCConfig, proof: ProofBatch, distances: Sequence[float]) -> ValidatedBatch:
    return validate_distances(proof, distances, _r_target(config), config.fraud_threshold)


def _generated_body(config: PoCConfig, proof: ProofBatch) -> GeneratedBody:
    return GeneratedBody({**proof.to_dict(), "r_target": config.r_target}, ("nonces", "dist"))


def _validated_body(config: PoCConfig, verdict: ValidatedBatch) -> dict[str, Any]:
    # A client may read node_id as a number without a sign.
    return {**verdict.to_dict(), "node_id": max(verdict.node_id, 0)}


DISTANCES = ProofForm(
    name="distances",
    proof_type=ProofBatch,
    parts=("inputs", "projection", "forward", "distance"),
    per_nonce=("nonces", "dist"),
    listed_as="valid_distances",
    histogram=Histogram("poc_distance", "Distances computed", _BUCKETS),
    count_valid=lambda config, distances: sum(distance < _r_target(config) for distance in distances),
    valid=lambda config, proof: proof.below(_r_target(config)),
    verdict=_verdict,
    check=_check,
    generated_body=_generated_body,
    validated_body=_validated_body,
)
"""Proof form 1: a nonce is valid if its distance is below the round's r_target."""
