"""Records of what happened in the demonstration, from which the table and the report are made.

Times are seconds since the server was ready; rates are per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jinja2.filters import do_filesizeformat

FIRST, BETWEEN = "first token", "between tokens"
ALONE, VALIDATING = "users alone", "while validating"


@dataclass(frozen=True)
class Check:
    """Something that should be true, and whether it was."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Chat:
    """One chat as its user saw it.

    ``state`` is the node's state when the chat began; ``arrivals`` the times of the pieces of text; ``status`` the HTTP
    status, or 0 if the answer is missing or broke off; ``error`` the text of a refusal or failure.
    """

    state: str
    began: float
    ended: float
    arrivals: tuple[float, ...] = ()
    text: str = ""
    status: int = 200
    retry_after: str | None = None
    error: str = ""

    @property
    def served(self) -> bool:
        """Whether the whole answer arrived, with text in it."""
        return self.status == 200 and bool(self.arrivals)

    @property
    def gaps(self) -> list[float]:
        """Times between tokens, in seconds."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Callback:
    """A message that the receiver got, and the status that it answered.

    ``vectors`` are the fingerprints of the nonces, where it has some; ``total`` is the number of nonces that it is of,
    where it does not list them.
    """

    at: float
    path: str
    answered: int
    signed: bool
    block_hash: str
    public_key: str
    nonces: tuple[int, ...]
    fraud_detected: bool | None
    vectors: tuple[str, ...] = ()
    total: int = 0

    @property
    def count(self) -> int:
        """Number of nonces that it is of."""
        return len(self.nonces) or self.total


@dataclass(frozen=True)
class Claim:
    """What somebody claims to be the node's fingerprints of some nonces.

    ``spared`` says what of an honest node's work was not done for it; ``vectors`` has one fingerprint per nonce.
    """

    name: str
    spared: str
    vectors: tuple[str | None, ...]
    honest: bool = False


@dataclass(frozen=True)
class Judged:
    """A claim, and what came of it.

    ``distances`` is how far its fingerprints are from the node's own (NaN for what is no fingerprint), ``mismatches``
    how many of its nonces the validator counted as wrong, and ``p_value`` the probability that an honest node has that
    many.
    """

    claim: Claim
    distances: tuple[float, ...]
    mismatches: int
    p_value: float
    fraud_detected: bool

    @property
    def median(self) -> float:
        """Median of the distances that there are, or NaN."""
        there = [distance for distance in self.distances if not math.isnan(distance)]
        return float(np.median(there)) if there else math.nan

    def below(self, threshold: float) -> int:
        """Return how many of the distances are not above the threshold."""
        return sum(distance <= threshold for distance in self.distances)


@dataclass(frozen=True)
class Band:
    """The time from ``began`` to ``ended`` in which the node was in a state."""

    state: str
    began: float
    ended: float


@dataclass(frozen=True)
class Sample:
    """Nonces of the phase so far at the time ``at``: checked and valid, or recomputed; NaN for what is not counted.

    A sample with no number begins a phase.
    """

    at: float
    checked: float = math.nan
    valid: float = math.nan
    recomputed: float = math.nan


@dataclass(frozen=True)
class Latency:
    """Waits of one kind, in milliseconds: ``what`` users waited for, and ``when``."""

    what: str
    when: str
    milliseconds: Sequence[float]

    def percentile(self, percent: float) -> float:
        """Return a percentile in milliseconds, interpolated, or NaN if nobody waited."""
        return float(np.percentile(self.milliseconds, percent)) if self.milliseconds else math.nan

    def __str__(self) -> str:
        if not self.milliseconds:
            return "not measured"
        return f"p50 {self.percentile(50):.1f} ms, p99 {self.percentile(99):.1f} ms, {len(self.milliseconds)} samples"


@dataclass
class Results:
    """The whole demonstration.

    Args:
        about: names and values of what was run, and where.
        vocab_size: the size of the model's vocabulary.
        r_target, expected_share: the round's threshold, and the share of nonces expected below it.
        retained_bytes, stored_bytes: what the two projections retain, which is their seed, and what their matrices P
            would take if they were stored.
        geometric: whether the mean of the logits is known to be zero, so that geometry alone predicts distances;
            otherwise r_target and expected_share come from a survey.
        dist_threshold: how far apart two fingerprints of a nonce may be.
        noise: how far apart those of two honest nodes with different arithmetic are, by which the threshold was set.
        fingerprints: number of fingerprints that the round computed.
        judged: what was claimed to be the fingerprints of the round, and what came of it.
        parts: seconds of the round of fingerprints by part: inputs, projection, forward, mix.
        generating_rate, validating_rate: fingerprints per second.
        checked, valid: nonces that were checked in the round of distances, and valid ones among them.
        survey: recomputed distances of consecutive nonces, which nobody selected.
    """

    about: dict[str, str]
    vocab_size: int
    r_target: float
    expected_share: float
    retained_bytes: int
    stored_bytes: int
    geometric: bool = True
    dist_threshold: float = math.nan
    noise: list[float] = field(default_factory=list)
    fingerprints: int = 0
    judged: list[Judged] = field(default_factory=list)
    checked: int = 0
    valid: int = 0
    checks: list[Check] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    survey: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    generating_rate: float = 0.0
    validating_rate: float = 0.0

    @property
    def failed(self) -> int:
        """Number of checks that failed."""
        return sum(not check.passed for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether there were checks, and all of them passed."""
        return bool(self.checks) and not self.failed

    @property
    def accepted(self) -> int:
        """Number of honest claims that were accepted."""
        return sum(judged.claim.honest and not judged.fraud_detected for judged in self.judged)

    @property
    def caught(self) -> int:
        """Number of claims of cheats that were detected."""
        return sum(judged.fraud_detected and not judged.claim.honest for judged in self.judged)

    @property
    def forged(self) -> int:
        """Number of claims of cheats."""
        return sum(not judged.claim.honest for judged in self.judged)

    @property
    def valid_share(self) -> float:
        """Share of the checked nonces that are valid."""
        return self.valid / self.checked if self.checked else 0.0

    @property
    def rate_kept(self) -> float:
        """The validating rate as a share of the generating rate."""
        return self.validating_rate / self.generating_rate if self.generating_rate else 0.0

    @property
    def projection_share(self) -> float:
        """Share of the round's compute that the two projections took."""
        total = sum(self.parts.values())
        return self.parts.get("projection", 0.0) / total if total else 0.0

    def latencies(self) -> list[Latency]:
        """Return the waits for first tokens and for later ones, each with users alone and while validating.

        Users are alone before and after the round, so that what changes in the course of a run does not count.
        """
        waits = []
        for what, of in (
            (FIRST, lambda chat: [chat.arrivals[0] - chat.began]),
            (BETWEEN, lambda chat: chat.gaps),
        ):
            for when, states in ((ALONE, ("IDLE", "STOPPED")), (VALIDATING, ("VALIDATING",))):
                chats = [chat for chat in self.chats if chat.served and chat.state in states]
                waits.append(Latency(what, when, [1e3 * wait for chat in chats for wait in of(chat)]))
        return waits

    def summary(self) -> list[tuple[str, str]]:
        """Return the rows of the closing table: what was measured, and its value."""
        stored = do_filesizeformat(self.stored_bytes, binary=True)
        return [
            ("proofs while GENERATING", f"{self.generating_rate:.1f} fingerprints per second"),
            (
                "proofs while users are served",
                f"{self.validating_rate:.1f} fingerprints per second, {self.rate_kept:.0%}",
            ),
            (
                f"fingerprints within {self.dist_threshold:.3f}",
                f"{self.accepted} of {len(self.judged) - self.forged} honest claims accepted, "
                f"{self.caught} of {self.forged} cheats caught",
            ),
            (
                f"valid nonces, distance below {self.r_target:.4f}",
                f"{self.valid} of {self.checked}: {self.valid_share:.1%}, expected {self.expected_share:.1%}",
            ),
            ("share of the two projections in the compute", f"{self.projection_share:.2%}"),
            ("memory for P", f"0 bytes, and {self.retained_bytes} for its seed; stored, P would take {stored}"),
            *((f"{wait.what}, {wait.when}", str(wait)) for wait in self.latencies()),
        ]
