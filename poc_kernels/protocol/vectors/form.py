"""What the round's states need to know of this proof form."""

from __future__ import annotations

from ..artifacts.form import artifact_form
from ..artifacts.proofs import StatTest
from ..config import PoCConfig

MIN_K_DIM = 2
"""With one coordinate, an artifact would be a sign."""


def _check(config: PoCConfig) -> None:
    if config.k_dim is not None and config.k_dim < MIN_K_DIM:
        raise ValueError(f"k_dim must be at least {MIN_K_DIM} in a round of vectors, got {config.k_dim}")


VECTORS = artifact_form(
    name="vectors",
    parts=("inputs", "projection", "forward", "vectors"),
    k_dim=12,
    stat_test=StatTest(dist_threshold=0.02, p_mismatch=0.001, fraud_threshold=0.01),
    check=_check,
)
"""Proof form 2: what the network's nodes exchange since January 2026; its test is that of their engines."""
