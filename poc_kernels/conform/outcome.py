"""What comes of a check: it returns what it saw, or raises one of these."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Outcome(str, enum.Enum):
    """How a check ended."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"
    HOLE = "hole"
    """The endpoint does what published implementations do as well, although a forger gains by it."""


def fit(text: str, most: int) -> str:
    """Return the first ``most`` characters of a text, fit for a terminal."""
    begins = "".join(character if character.isprintable() else " " for character in text[:most])
    return begins if len(text) <= most else f"{begins}..."


class CheckError(Exception):
    """A check that did not pass; the text is what was seen."""

    outcome = Outcome.FAIL


class FailedError(CheckError):
    """The endpoint does not do what the wire says."""


class NoAnswerError(FailedError):
    """The endpoint did not answer, not in time, or not in HTTP."""


class SkippedError(CheckError):
    """The check does not apply, or what it needs is not there."""

    outcome = Outcome.SKIPPED


class HoleError(CheckError):
    """The endpoint has a hole that published implementations are known to have."""

    outcome = Outcome.HOLE


@dataclass(frozen=True)
class Result:
    """One check's outcome.

    Attributes:
        name: of the check.
        section: of docs/conform.md, which says where the wire is published.
        says: what the wire says.
        seen: what the endpoint did, or why the check was skipped.
        seconds: how long the check took.
    """

    name: str
    section: str
    says: str
    outcome: Outcome
    seen: str
    seconds: float


def require(condition: bool, seen: str) -> None:
    """Raise `FailedError` with what was seen unless a condition holds."""
    if not condition:
        raise FailedError(seen)
