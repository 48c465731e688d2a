"""The states of a node's round.

A round begins in IDLE or a phase, in place of the one before; it goes between its phases, and ends in STOPPED.
"""

from __future__ import annotations

import enum


class PoCState(str, enum.Enum):
    """State of a node: no phase running, looking for nonces, recomputing proofs of others, round over."""

    IDLE = "IDLE"
    GENERATING = "GENERATING"
    VALIDATING = "VALIDATING"
    STOPPED = "STOPPED"


PHASES = (PoCState.GENERATING, PoCState.VALIDATING)
"""What a round does between its beginning and its end."""


class IllegalTransitionError(RuntimeError):
    """The state does not allow what was asked for."""


class RoundEndedError(RuntimeError):
    """The round was stopped, or another one begun, while a batch was computed; its result is thrown away."""
