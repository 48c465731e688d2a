"""What the round's states need to know of a form whose outcomes are artifacts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import PoCConfig
from ..form import GeneratedBody, ProofForm
from .proofs import ArtifactBatch, ArtifactVerdict, StatTest, judge

logger = logging.getLogger("poc_kernels")

_MAX_NONCE = 2**31 - 1
"""The network stores nonces of artifacts as int32."""


@dataclass(frozen=True, kw_only=True)
class ArtifactForm(ProofForm):
    """A form whose outcome is an artifact as text (`encoding`), or None where a row has none.

    Attributes:
        k_dim: numbers of an artifact, where a round does not say it.
        stat_test: how a batch is judged that brings no test of its own.
    """

    k_dim: int
    stat_test: StatTest

    def k_dim_of(self, config: PoCConfig) -> int:
        """Return how many numbers an artifact of the round has."""
        return self.k_dim if config.k_dim is None else config.k_dim

    def forward_key(self, config: PoCConfig) -> Hashable:
        """Return what determines a forward: the same for a round that says the form's own k_dim and one that does not.

        See `ProofForm.forward_key`.
        """
        return dataclasses.replace(config, k_dim=self.k_dim_of(config)).forward_key()

    def encoding(self, config: PoCConfig) -> dict[str, Any]:
        """Return how artifacts are written, as the network's clients are told."""
        return {"dtype": "f16", "k_dim": self.k_dim_of(config), "endian": "le"}


def artifact_form(
    *,
    name: str,
    parts: tuple[str, ...],
    k_dim: int,
    stat_test: StatTest,
    check: Callable[[PoCConfig], None],
    norm_tolerance: float | None = None,
) -> ArtifactForm:
    """Make a form: see `ArtifactForm`, `ProofForm` and, for norm_tolerance, `judge`."""

    def judged(config: PoCConfig, proof: ArtifactBatch, artifacts: Sequence[str | None]) -> ArtifactVerdict:
        test = proof.stat_test or dataclasses.replace(stat_test, fraud_threshold=config.fraud_threshold)
        verdict = judge(proof, artifacts, test, k_dim=form.k_dim_of(config), norm_tolerance=norm_tolerance)
        if verdict.excluded_nonces:
            logger.warning(
                "%d of %d nonces gave no finite vector when they were recomputed here, and are left out of the verdict",
                verdict.n_excluded,
                len(proof),
            )
        return verdict

    def generated_body(config: PoCConfig, proof: ArtifactBatch) -> GeneratedBody:
        artifacts = [
            {"nonce": nonce, "vector_b64": vector} for nonce, vector in zip(proof.nonces, proof.vectors, strict=True)
        ]
        body = {**_told(proof), "artifacts": artifacts, "encoding": form.encoding(config)}
        return GeneratedBody(body, ("artifacts",))

    form = ArtifactForm(
        name=name,
        proof_type=ArtifactBatch,
        parts=parts,
        per_nonce=("nonces", "vectors"),
        listed_as=None,
        histogram=None,
        count_valid=lambda config, artifacts: sum(artifact is not None for artifact in artifacts),
        valid=lambda config, proof: proof.found(),
        verdict=judged,
        check=check,
        generated_body=generated_body,
        validated_body=_validated_body,
        max_nonce=_MAX_NONCE,
        k_dim=k_dim,
        stat_test=stat_test,
    )
    return form


def _validated_body(config: PoCConfig, verdict: ArtifactVerdict) -> dict[str, Any]:
    judged = ["n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected"]
    if verdict.excluded_nonces:
        judged += ["n_excluded", "excluded_nonces"]
    return {**_told(verdict), **{name: getattr(verdict, name) for name in judged}}


def _told(proof: ArtifactBatch) -> dict[str, Any]:
    """Return what the network's callbacks say of a node and its round."""
    told = {name: getattr(proof, name) for name in ("public_key", "block_hash", "block_height")}
    return {**told, "node_id": max(proof.node_id, 0)}  # a client may read it as a number without a sign
