"""What the API server tells vLLM's workers, and what they answer: the arguments of one RPC method.

Dictionaries of strings, numbers and lists, made of these classes: vLLM's serialization takes them as they are. Every
rank gets the same message, and all ranks get all messages in one order, with users' steps in between.

A `Run` says what is wanted, not what is to change. So it can be repeated, and an answer that is lost loses nothing: an
outcome is answered again and again, until it is no longer wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

METHOD = "poc_kernels_call"
"""The RPC method of workers: ``(command, payload) -> payload``; commands are open, trial, begin, run and close."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """Make a session, in place of the one that there is."""

    slice_seconds: float
    cuda_graphs: bool
    arrivals: str | None = None
    """The path of `poc_kernels.engines.vllm.arrivals.Arrivals`; it may be gone after the answer."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What proofs are computed with, or the sentence that says why none are."""

    refusal: str | None = None
    model_type: str = ""
    hidden_size: int = 0
    vocab_size: int = 0
    max_positions: int = 0
    layers: int = 0
    """Decoder layers."""
    no_layers: str | None = None
    """Why there is no transform after them; None if there is."""
    windows: list[int] = field(default_factory=list)
    """How many positions attention layers look back."""
    dtype: str = ""
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Compare what proofs are computed with to the served model, and its rows with each other."""

    texts: list[list[int]]
    """Token ids of prompts with their answers."""
    served: list[list[float]]
    """Log-probabilities of the tokens of the answers: see `poc_kernels.engines.vllm.trial.scores`."""
    transforms: bool
    """Whether all ranks can have a transform after every decoder layer."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The sentence that says what is wrong; None if nothing is."""

    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Begin a round; every job of the one before is cancelled."""

    round: str
    """The API server's id of it."""
    config: Mapping[str, Any]
    """Fields of `PoCConfig`."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Whether the round can be computed; no rank computes anything before all of them have answered."""

    refusal: str | None = None
    refreshed: bool = False
    """Whether weights were replaced since the round before."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Compute a while; and how to go on between users' steps until the next message."""

    round: str
    jobs: list[str] = field(default_factory=list)
    """Ids of all jobs that are wanted, in their order. Others are cancelled, and their outcomes forgotten."""
    rows: Mapping[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Rows of those that the worker may not have yet: pairs of public key and nonce."""
    seconds: float = 0.0
    """Slices are begun for so long. With several ranks it is 0: their clocks would not agree."""
    seconds_without_users: float = 0.0
    """For so long instead, or until a user's request comes, where none is in the server at the beginning; 0 where the
    server does not count them."""
    slices: int = 0
    """And at least so many."""
    alone: bool = False
    """Whether users compute nothing, whatever the worker makes of its steps: else slices wait for a step's end."""
    share: float = 0.1
    """Fraction of the device that slices are guaranteed while users' steps follow each other."""
    slices_per_1000_steps: int = 0
    """What `share` comes to, for several ranks: all of them have to run the same slices between the same steps."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a worker is."""

    round: str | None
    """The round that it has; after a restart it has none."""
    jobs: list[str] = field(default_factory=list)
    """Ids that it knows, computed or not."""
    outcomes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of those that ended: ``values`` and ``part_seconds``, or ``error``."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """See `poc_kernels.engines.vllm.pacing.Counters`."""


_Message = TypeVar("_Message")


def pack(message: Any) -> dict[str, Any]:
    """Return a message as a dictionary."""
    return dataclasses.asdict(message)


def unpack(kind: type[_Message], payload: Mapping[str, Any]) -> _Message:
    """Return the message that a dictionary is."""
    return kind(**payload)
