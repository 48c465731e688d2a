"""The device that users and proofs share, as whoever computes proofs sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from ..scheduling import InFlight, Pacing, PriorityLanes, Turns


class SliceTimes(NamedTuple):
    """Seconds of the slice that ended, and those waited until the next could begin."""

    slice: float
    waited: float


class Device(Protocol):
    """Where users are served and proofs computed: pauses users, and lets the proofs' thread have the device.

    `lane` is entered once, by the thread that computes; `take`, `pause` and `give_back` are called in it. The other
    methods may be called from any thread.
    """

    def lane(self) -> AbstractContextManager[None]:
        """Return what the proofs' thread runs in: a stream, a priority."""

    def take(self) -> float:
        """Wait until a first slice may begin; return the seconds waited.

        Raises:
            TurnsClosed: there is no device any more, or `cancel` was called.
        """

    def pause(self) -> SliceTimes:
        """End a slice and wait until the next may begin.

        Raises:
            TurnsClosed: as `take`; the device is given back.
        """

    def give_back(self) -> float:
        """End the last slice; return its seconds, 0 if there was none."""

    def cancel(self) -> None:
        """Let the proofs' thread never have the device again: its `take` or `pause` raises TurnsClosed."""

    @property
    def waiting(self) -> bool:
        """Whether the proofs' thread waits for the device now."""

    @property
    def pacing(self) -> Pacing | None:
        """How slices share the device now; None where proofs are guaranteed nothing."""

    def drain_users(self, timeout_seconds: float) -> bool:
        """Wait until no user's request is in flight; return whether none is."""

    def pause_users(self) -> None:
        """Let users' requests in flight compute nothing until `resume_users`."""

    def resume_users(self) -> None:
        """Undo `pause_users`. Idempotent."""


class TurnsDevice:
    """A device in this process whose users and proofs take turns (`Turns`) on two priorities (`PriorityLanes`).

    Args:
        turns: shared with users' steps.
        lanes: proofs run in the lane of validation.
        drain: waits up to that many seconds until no user's request is in flight; returns whether none is.
        max_slices_in_flight: slices that a GPU is given before the first of them is done.
        low_priority: give the proofs' thread the lowest priority, where threads have priorities: for turns that are
            not paced.
    """

    def __init__(
        self,
        turns: Turns,
        lanes: PriorityLanes,
        drain: Callable[[float], bool],
        *,
        max_slices_in_flight: int = 2,
        low_priority: bool = False,
    ) -> None:
        self._turns = turns
        self._lanes = lanes
        self._low_priority = low_priority and lanes.lowers_threads
        # A thread of low priority stands still while inference computes: it pays with what it computed itself.
        self._turn = turns.proof(time.thread_time if self._low_priority else None)
        self._in_flight = InFlight(lanes.device, max_slices_in_flight)
        self.drain_users = drain

    @property
    def waiting(self) -> bool:
        """Whether the proofs' thread waits for its turn now."""
        return self._turn.waiting

    @property
    def pacing(self) -> Pacing | None:
        """The turns' pacing."""
        return self._turns.pacing

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        """Run the proofs' thread in the lane of validation, with low priority where it is to have that."""
        if self._low_priority:
            self._lanes.lower_thread()
        with self._lanes.validation():
            yield

    def take(self) -> float:
        """Wait for a turn: see `Device.take`."""
        asked = time.monotonic()
        self._turn.__enter__()
        return time.monotonic() - asked

    def pause(self) -> SliceTimes:
        """End a slice and wait for the next turn: see `Device.pause`."""
        self._in_flight.mark()
        asked = time.monotonic()
        seconds = self._turn.pause()
        return SliceTimes(seconds, time.monotonic() - asked)

    def give_back(self) -> float:
        """End the last slice: see `Device.give_back`."""
        return self._turn.end()

    def cancel(self) -> None:
        """Take no turn any more: see `Device.cancel`."""
        self._turn.cancel()

    def pause_users(self) -> None:
        """Let no step of inference begin until `resume_users`; one that runs may end."""
        self._turns.pause_inference()

    def resume_users(self) -> None:
        """Undo `pause_users`."""
        self._turns.resume_inference()
