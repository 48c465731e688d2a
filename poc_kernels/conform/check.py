"""A check: what the wire says of one thing, and how that is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .session import Session

Play = Callable[[Session], str]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: in the table, and of ``--only``.
        section: of docs/conform.md.
        says: what the wire says.
        play: tries it on a session; returns what was seen if that is what the wire says, else raises
            `outcome.CheckError`.
    """

    name: str
    section: str
    says: str
    play: Play


def check(name: str, section: str, says: str) -> Callable[[Play], Check]:
    """Make a check of a function."""
    return lambda play: Check(name, section, says, play)
