"""Batches of artifacts, and the verdict on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binom

from ..batches import check_batch
from ..checks import check_float, check_probability
from ..config import UNSET
from .encoding import decode

_MAX_EXCLUDED = 0.1
"""Share of a batch's nonces that a verdict may leave out; the network's engines have it so."""


@dataclass(frozen=True)
class StatTest:
    """How a validation tells an honest batch from a forged one.

    Args:
        dist_threshold: a nonce mismatches if received and recomputed artifact are farther apart than this (L2).
        p_mismatch: probability that a nonce of an honest node mismatches.
        fraud_threshold: a batch is fraud if an honest node sends one like it with a probability below this.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    dist_threshold: float
    p_mismatch: float
    fraud_threshold: float

    def __post_init__(self) -> None:
        check_float("dist_threshold", self.dist_threshold)
        if self.dist_threshold < 0:
            raise ValueError(f"dist_threshold must be at least 0, got {self.dist_threshold}")
        check_probability("p_mismatch", self.p_mismatch)
        check_probability("fraud_threshold", self.fraud_threshold)

    def p_value(self, n_mismatch: int, n_total: int) -> float:
        """Return the probability that at least n_mismatch of n_total nonces of an honest node mismatch; 1 for none."""
        return float(binom.sf(n_mismatch - 1, n_total, self.p_mismatch)) if n_mismatch > 0 else 1.0


@dataclass(frozen=True)
class ArtifactBatch:
    """Nonces of one node in one round, and their artifacts.

    Args:
        public_key, block_hash, block_height, node_id: the node, and the round.
        nonces: distinct, each in [0, 2**63).
        vectors: one artifact per nonce as text (`encoding`), None where there is none; empty to have them computed
            without a verdict. They are taken as they come: one that is no vector is a mismatch of its nonce.
        stat_test: how this batch is judged; None for the form's own test, with the round's fraud_threshold.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    public_key: str
    block_hash: str
    block_height: int
    nonces: list[int]
    vectors: list[str | None]
    node_id: int = UNSET
    stat_test: StatTest | None = None

    def __post_init__(self) -> None:
        check_batch(self, "vectors", self.vectors, "one")
        wrong = {kind.__name__ for kind in set(map(type, self.vectors)) - {str, type(None)}}
        if wrong:
            raise TypeError(f"vectors must hold a str or None for each nonce, got {', '.join(sorted(wrong))}")
        if self.stat_test is not None and not isinstance(self.stat_test, StatTest):
            raise TypeError(f"stat_test must be a StatTest or None, got {type(self.stat_test).__name__}")

    def __len__(self) -> int:
        return len(self.nonces)

    def found(self) -> ArtifactBatch:
        """Return the batch with only those nonces that have an artifact."""
        kept = [pair for pair in zip(self.nonces, self.vectors, strict=True) if pair[1] is not None]
        return dataclasses.replace(self, nonces=[nonce for nonce, _ in kept], vectors=[vector for _, vector in kept])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without the test. The lists are the batch's own."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "stat_test"}


class NoVerdictError(RuntimeError):
    """Too much of a batch could not be recomputed here to judge who sent it, and the rest does not convict."""


@dataclass(frozen=True)
class ArtifactVerdict(ArtifactBatch):
    """An `ArtifactBatch` whose ``vectors`` were recomputed, and the verdict on it.

    ``received_vectors`` is what the node claimed, empty if it claimed nothing; then there is no verdict: n_mismatch is
    0, p_value 1 and fraud_detected false. ``excluded_nonces`` are those whose claim is a vector, but of which nothing
    was recomputed: they say nothing of the node, and are not judged.
    """

    received_vectors: list[str | None] = field(default_factory=list)
    mismatch_nonces: list[int] = field(default_factory=list)
    excluded_nonces: list[int] = field(default_factory=list)
    p_value: float = 1.0
    fraud_detected: bool = False

    @property
    def judged(self) -> bool:
        """Whether there is a verdict: the node claimed something."""
        return bool(self.received_vectors)

    @property
    def n_total(self) -> int:
        """Nonces that were asked for and are not excluded."""
        return len(self.nonces) - self.n_excluded

    @property
    def n_excluded(self) -> int:
        """Nonces that are not judged."""
        return len(self.excluded_nonces)

    @property
    def n_mismatch(self) -> int:
        """Nonces whose artifact is not the recomputed one."""
        return len(self.mismatch_nonces)

    @property
    def n_invalid(self) -> int:
        """`n_mismatch`, under the name that verdicts of every form have."""
        return self.n_mismatch

    @property
    def probability_honest(self) -> float:
        """``p_value``, under the name that verdicts of every form have."""
        return self.p_value


def judge(
    batch: ArtifactBatch,
    recomputed: Sequence[str | None],
    test: StatTest,
    *,
    k_dim: int,
    norm_tolerance: float | None = None,
) -> ArtifactVerdict:
    """Return the verdict on ``batch`` from its recomputed artifacts, in the order of its nonces.

    A nonce mismatches if its received artifact is not a vector of k_dim finite float16 numbers, if that has a norm
    farther from 1 than norm_tolerance (where that is given), or if it is farther from the recomputed one than the
    test's dist_threshold. Norms and distances are float32. Any other nonce whose recomputed artifact is no vector is
    excluded: nothing tells whether the model is at fault here or everywhere, so it is no evidence against the node.

    Where more than one nonce and more than a tenth of them are excluded, or all, the verdict is fraud or none: fraud if
    the mismatches convicted also if every excluded nonce agreed.

    Raises:
        ValueError: recomputed does not have an artifact for each nonce.
        NoVerdictError: too many nonces are excluded, and the mismatches alone do not convict.
    """
    if len(recomputed) != len(batch):
        raise ValueError(f"recomputed must have {len(batch)} artifacts, one per nonce, got {len(recomputed)}")
    mismatched: list[int] = []
    excluded: list[int] = []
    if batch.vectors:
        received, good = decode(batch.vectors, k_dim)
        expected, known = decode(recomputed, k_dim)
        if norm_tolerance is not None:
            good &= np.abs(np.linalg.norm(received, axis=1).astype(np.float64) - 1) <= norm_tolerance
        near = np.linalg.norm(received - expected, axis=1).astype(np.float64) <= test.dist_threshold
        mismatched = [batch.nonces[place] for place in np.flatnonzero(~good | (known & ~near))]
        excluded = [batch.nonces[place] for place in np.flatnonzero(good & ~known)]
    too_many = len(excluded) > max(1, _MAX_EXCLUDED * len(batch)) or 0 < len(excluded) == len(batch)
    if too_many and not test.p_value(len(mismatched), len(batch)) < test.fraud_threshold:
        raise NoVerdictError(
            f"there is no verdict: {len(excluded)} of {len(batch)} nonces gave no finite vector when they were "
            "recomputed here, which says nothing of the node"
        )
    p_value = test.p_value(len(mismatched), len(batch) - len(excluded))
    return ArtifactVerdict(
        **{**batch.to_dict(), "vectors": list(recomputed)},
        stat_test=test,
        received_vectors=batch.vectors,
        mismatch_nonces=mismatched,
        excluded_nonces=excluded,
        p_value=p_value,
        fraud_detected=p_value < test.fraud_threshold,
    )
