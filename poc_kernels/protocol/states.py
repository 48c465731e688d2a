"""The states of a node's round, and which may follow which."""

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

TRANSITIONS = {
    PoCState.IDLE: {PoCState.IDLE, *PHASES, PoCState.STOPPED},
    PoCState.GENERATING: {*PHASES, PoCState.STOPPED},
    PoCState.VALIDATING: {*PHASES, PoCState.STOPPED},
    PoCState.STOPPED: {PoCState.STOPPED},
}
"""The states that may follow a state within a round; a new round begins from IDLE or STOPPED."""


class IllegalTransitionError(RuntimeError):
    """The state does not allow what was asked for."""


class RoundEndedError(RuntimeError):
    """The round was stopped, or another one begun, while a batch was computed; its result is thrown away."""
