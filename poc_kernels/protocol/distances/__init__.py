"""Proof form 1: the distance of a nonce's permuted logits to the round's target."""

from .distance import distances, permutations, target
from .form import DISTANCES
from .proofs import ProofBatch, ValidatedBatch, validate_distances
from .prover import DistanceProver

__all__ = [
    "DISTANCES",
    "DistanceProver",
    "ProofBatch",
    "ValidatedBatch",
    "distances",
    "permutations",
    "target",
    "validate_distances",
]
