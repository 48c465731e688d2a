"""A round of PoC 2.0 (``docs/protocol.md``): nonces, inputs, distances, proofs, and the manager. No server in it."""

from .config import UNSET, PoCConfig, PoCState
from .distances.distance import distances, target
from .distances.proofs import ProofBatch, ValidatedBatch, probability_honest, validate_distances
from .engine import Engine
from .inputs import nonce_inputs, permutations
from .round import BatchReport, IllegalTransitionError, PoCManager, RoundEndedError

__all__ = [
    "UNSET",
    "BatchReport",
    "Engine",
    "IllegalTransitionError",
    "PoCConfig",
    "PoCManager",
    "PoCState",
    "ProofBatch",
    "RoundEndedError",
    "ValidatedBatch",
    "distances",
    "nonce_inputs",
    "permutations",
    "probability_honest",
    "target",
    "validate_distances",
]
