"""Distances in HTTP: the body of POST /validate and its answer. What needs pydantic, a round alone does not."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..config import UNSET
from .proofs import ProofBatch, ValidatedBatch


class ProofBody(BaseModel):
    """Body of /validate: a `ProofBatch`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    public_key: str
    block_hash: str
    block_height: int
    # The first wrong value ends it: a body can have a million of them.
    nonces: Annotated[list[int], Field(fail_fast=True)]
    dist: Annotated[list[float], Field(fail_fast=True)] = []
    node_id: int = UNSET

    def proof(self) -> ProofBatch:
        """Return the proof; raise a ValueError where a value is one that a proof does not take."""
        return ProofBatch(self.public_key, self.block_hash, self.block_height, self.nonces, self.dist, self.node_id)


class ValidateAnswer(BaseModel):
    """Answer of /validate; computed_distances repeats distances for older clients."""

    status: str
    nonces: list[int]
    distances: list[float]
    computed_distances: list[float]
    valid: list[bool]
    fraud_detected: bool
    n_invalid: int
    probability_honest: float

    @classmethod
    def of(cls, verdict: ValidatedBatch) -> ValidateAnswer:
        """Return the answer that tells a verdict."""
        return cls.model_construct(
            status="OK",
            nonces=verdict.nonces,
            distances=verdict.dist,
            computed_distances=verdict.dist,
            valid=[distance < verdict.r_target for distance in verdict.dist],
            fraud_detected=verdict.fraud_detected,
            n_invalid=verdict.n_invalid,
            probability_honest=verdict.probability_honest,
        )
