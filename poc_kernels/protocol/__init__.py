"""A round of PoC 2.0 (``docs/protocol.md``): its states, nonces, proofs and verdicts. No server in it."""

from .artifacts.form import ArtifactForm
from .artifacts.proofs import ArtifactBatch, ArtifactVerdict, NoVerdictError, StatTest
from .config import UNSET, PoCConfig
from .distances.distance import permutations, target
from .distances.proofs import ProofBatch, ValidatedBatch, validate_distances
from .engine import Engine
from .engine_prover import DistanceProver, EngineProver
from .form import ProofForm
from .forms import FORMS
from .honesty import probability_honest
from .inputs import nonce_inputs
from .prover import Outcomes, Prover, Row
from .round import BatchReport, PoCManager, Round, Validation
from .states import IllegalTransitionError, PoCState, RoundEndedError

__all__ = [
    "FORMS",
    "UNSET",
    "ArtifactBatch",
    "ArtifactForm",
    "ArtifactVerdict",
    "BatchReport",
    "DistanceProver",
    "Engine",
    "EngineProver",
    "IllegalTransitionError",
    "NoVerdictError",
    "Outcomes",
    "PoCConfig",
    "PoCManager",
    "PoCState",
    "ProofBatch",
    "ProofForm",
    "Prover",
    "Round",
    "RoundEndedError",
    "Row",
    "StatTest",
    "ValidatedBatch",
    "Validation",
    "nonce_inputs",
    "permutations",
    "probability_honest",
    "target",
    "validate_distances",
]
