"""What the round's states need to know of this proof form."""

from __future__ import annotations

from ..artifacts.form import artifact_form
from ..artifacts.proofs import StatTest
from ..config import PoCConfig

K_DIM = 64
MIN_SEQ_LEN = 16


def _check(config: PoCConfig) -> None:
    if config.k_dim not in (None, K_DIM):
        raise ValueError(f"k_dim must be {K_DIM} in a round of fingerprints, got {config.k_dim}")
    if config.seq_len < MIN_SEQ_LEN:
        raise ValueError(f"seq_len must be at least {MIN_SEQ_LEN} in a round of fingerprints, got {config.seq_len}")


FINGERPRINT = artifact_form(
    name="fingerprint",
    parts=("inputs", "projection", "forward", "mix"),
    k_dim=K_DIM,
    stat_test=StatTest(dist_threshold=0.30, p_mismatch=0.02, fraud_threshold=0.01),
    check=_check,
    norm_tolerance=0.01,
)
"""Proof form 3: a gate and a share of mismatches for models like SmolLM2-135M; both are to be measured per model."""
