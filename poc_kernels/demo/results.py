"""Records of what happened in the demonstration, from which the table and the report are made.

Times are seconds since the server was ready; rates are per second.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2.filters import do_filesizeformat


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
    """A message that the receiver got, and the status that it answered."""

    at: float
    path: str
    answered: int
    signed: bool
    block_hash: str
    public_key: str
    nonces: tuple[int, ...]
    fraud_detected: bool | None


@dataclass(frozen=True)
class Band:
    """The time from ``began`` to ``ended`` in which the node was in a state."""

    state: str
    began: float
    ended: float


@dataclass(frozen=True)
class Sample:
    """How many nonces of the round were checked, and how many of them valid, at the time ``at``."""

    at: float
    checked: int
    valid: int


@dataclass
class Results:
    """The whole demonstration.

    Args:
        about: names and values of what was run, and where.
        vocab_size: the size of the model's vocabulary.
        r_target, expected_share: the round's threshold, and the share of nonces expected below it.
        retained_bytes, stored_bytes: what the two projections retain for their matrices P, and what stored matrices
            would take.
        geometric: whether the mean of the logits is known to be zero, so that geometry alone predicts distances;
            otherwise r_target and expected_share come from a survey.
        survey: recomputed distances of consecutive nonces, which nobody selected.
        parts: seconds of the round by part: inputs, projection, forward, distance.
        generating_rate, validating_rate: nonces per second.
    """

    about: dict[str, str]
    vocab_size: int
    r_target: float
    expected_share: float
    retained_bytes: int
    stored_bytes: int
    geometric: bool = True
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
    def passed(self) -> bool:
        """Whether there were checks, and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def checked(self) -> int:
        """Nonces that were checked in the round."""
        return self.samples[-1].checked if self.samples else 0

    @property
    def valid(self) -> int:
        """Valid nonces that were found in the round."""
        return self.samples[-1].valid if self.samples else 0

    @property
    def projection_share(self) -> float:
        """Share of the round's compute that the two projections took."""
        total = sum(self.parts.values())
        return self.parts.get("projection", 0.0) / total if total else 0.0

    def firsts(self, state: str) -> list[float]:
        """Return the times to the first token of the chats served in a state, in seconds."""
        return [chat.arrivals[0] - chat.began for chat in self.chats if chat.state == state and chat.served]

    def gaps(self, state: str) -> list[float]:
        """Return the times between tokens of the chats served in a state, in seconds."""
        return [gap for chat in self.chats if chat.state == state and chat.served for gap in chat.gaps]

    def summary(self) -> list[tuple[str, str]]:
        """Return the rows of the closing table: what was measured, and its value."""
        size = functools.partial(do_filesizeformat, binary=True)
        found = self.valid / self.checked if self.checked else 0.0
        rows = [
            ("nonces checked while generating", f"{self.generating_rate:.1f} per second"),
            ("nonces recomputed while users are served", f"{self.validating_rate:.1f} per second"),
            (
                f"valid nonces, distance below {self.r_target:.4f}",
                f"{self.valid} of {self.checked}: {found:.1%}, expected {self.expected_share:.1%}",
            ),
            ("share of the round spent in the two projections", f"{self.projection_share:.2%}"),
            ("memory for P", f"{size(self.retained_bytes)}, its seed; stored, P would take {size(self.stored_bytes)}"),
        ]
        for name, values in (("time to first token", self.firsts), ("time between tokens", self.gaps)):
            rows += [
                (f"{name}, {state}", median_and_tail(values(word)))
                for state, word in (("idle", "IDLE"), ("validating", "VALIDATING"))
            ]
        return rows


def median_and_tail(seconds: Sequence[float]) -> str:
    """Format the median and the 95th percentile in milliseconds."""
    if not seconds:
        return "not measured"
    tail = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return f"median {statistics.median(seconds) * 1e3:.1f} ms, 95th percentile {tail * 1e3:.1f} ms"
