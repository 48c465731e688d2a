"""What a proof form is to a round: how its proofs are named, made, counted, judged and told."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .checks import MAX_NONCE
from .config import PoCConfig


class Histogram(NamedTuple):
    """A histogram of what outcomes measure, as Prometheus shows it."""

    name: str
    description: str
    buckets: tuple[float, ...]
    measure: Callable[[Any], float] = float
    """What is measured of an outcome."""


class GeneratedBody(NamedTuple):
    """The body of the callback /generated."""

    body: dict[str, Any]
    per_nonce: tuple[str, ...]
    """Names of its lists that have one value per nonce: bodies that differ in nothing else may be sent as one."""


@dataclass(frozen=True, kw_only=True)
class ProofForm:
    """One kind of proof. There is no tensor and no engine in it: a `Prover` computes the outcomes that it speaks of.

    A proof is a dataclass with public_key, block_hash, block_height, node_id and nonces, a length and ``to_dict``; a
    verdict has all of that, and ``judged``, n_invalid, probability_honest and fraud_detected.

    Attributes:
        name: of the form in configurations, requests, logs and errors.
        proof_type: class of the proofs.
        parts: names of the parts that a prover's time is made of.
        per_nonce: names of a proof's lists that have one value per nonce, the nonces first, then the outcomes.
        listed_as: name under which the status lists the outcomes of valid nonces; None to list none.
        histogram: of outcomes; None for none.
        count_valid: how many of the outcomes count in a round.
        valid: the part of a proof that counts, and is sent to the chain's node.
        verdict: the verdict on a proof from the recomputed outcomes of its nonces; raises a NoVerdictError where these
            allow none.
        check: raises a ValueError that names a setting of a configuration which the form does not take.
        generated_body: the callback /generated of a proof's valid part.
        validated_body: the body of the callback /validated of a verdict.
        max_nonce: the largest nonce that validators take: a node generates none above it.
    """

    name: str
    proof_type: type[Any]
    parts: tuple[str, ...]
    per_nonce: tuple[str, str]
    listed_as: str | None
    histogram: Histogram | None
    count_valid: Callable[[PoCConfig, Sequence[Any]], int]
    valid: Callable[[PoCConfig, Any], Any]
    verdict: Callable[[PoCConfig, Any, Sequence[Any]], Any]
    check: Callable[[PoCConfig], None]
    generated_body: Callable[[PoCConfig, Any], GeneratedBody]
    validated_body: Callable[[PoCConfig, Any], dict[str, Any]]
    max_nonce: int = MAX_NONCE

    def proof(self, config: PoCConfig, nonces: list[int], outcomes: list[Any]) -> Any:
        """Return the proof that this node claims for nonces of its own."""
        of_round = {name: getattr(config, name) for name in ("public_key", "block_hash", "block_height", "node_id")}
        return self.proof_type(**of_round, **dict(zip(self.per_nonce, (nonces, outcomes), strict=True)))

    def forward_key(self, config: PoCConfig) -> Hashable:
        """Return what determines a forward of a round of this form: rounds that have it in common may share one."""
        return config.forward_key()

    def outcomes(self, proof: Any) -> list[Any]:
        """Return the outcomes in a proof, one per nonce."""
        outcomes: list[Any] = getattr(proof, self.per_nonce[1])
        return outcomes


def form_of(config: PoCConfig, forms: Mapping[str, ProofForm]) -> ProofForm:
    """Return the form of a round; raise a ValueError if it is not among ``forms`` or does not take the settings."""
    form = forms.get(config.proof)
    if form is None:
        raise ValueError(f"proof must be one of {', '.join(forms)}, got {config.proof!r}")
    form.check(config)
    return form
