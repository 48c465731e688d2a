"""How many slices of proofs go between two steps of users."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

_SMOOTHING = 1 / 16
"""Weight of the latest length in a mean."""
_FIRST_SLICE_SECONDS = 1e-3
"""What a slice is taken for before one has ended."""


@dataclass
class Counters:
    """What a worker has computed, and for how long."""

    steps: int = 0
    """Steps of users."""
    tokens: int = 0
    """Tokens in them."""
    steps_followed: int = 0
    """Those that another follows at once."""
    step_seconds: float = 0.0
    """Of these, from the beginning of each to that of the next, without slices."""
    mean_step_seconds: float = 0.0
    slices: int = 0
    slice_seconds: float = 0.0
    mean_slice_seconds: float = 0.0
    longest_slice_seconds: float = 0.0
    slices_between_steps: int = 0
    """Those that a step had to wait for."""
    seconds_between_steps: float = 0.0

    def count_step(self, seconds: float) -> None:
        """Count the seconds of a step that another follows."""
        self.steps_followed += 1
        self.step_seconds += seconds
        self.mean_step_seconds = averaged(self.mean_step_seconds, seconds)

    def count_slice(self, seconds: float, between_steps: bool) -> None:
        """Count a slice, and whether a step waits for it."""
        self.slices += 1
        self.slice_seconds += seconds
        self.mean_slice_seconds = averaged(self.mean_slice_seconds, seconds)
        self.longest_slice_seconds = max(self.longest_slice_seconds, seconds)
        if between_steps:
            self.slices_between_steps += 1
            self.seconds_between_steps += seconds

    def told(self) -> dict[str, float]:
        """Return all of them by name."""
        return dataclasses.asdict(self)


class Debt(Protocol):
    """What steps owe to proofs: no slice goes between two steps unless it is owed."""

    def owe(self, seconds: float) -> None:
        """Count a step of so many seconds."""

    def due(self) -> bool:
        """Tell whether a slice is owed."""

    def can_wait(self) -> bool:
        """Tell whether what is due may wait for another step: it is less than two slices, and nothing of it is lost."""

    def pay(self, seconds: float) -> None:
        """Count a slice of so many seconds."""

    def forgive(self) -> None:
        """Owe nothing: users have paused."""


class ClockedDebt:
    """Owes seconds, by the share of the device that proofs are guaranteed.

    Args:
        counters: has the mean lengths of steps and slices.
    """

    def __init__(self, counters: Counters) -> None:
        self.share = 0.0
        self._counters = counters
        self._seconds = 0.0

    def owe(self, seconds: float) -> None:
        """Count a step. What a long one owes is not paid at one go: the next token would wait for all of it."""
        self._seconds = min(self._seconds + seconds * self._per_second, self._most)

    def due(self) -> bool:
        """Tell whether steps owe a slice of the mean length."""
        return self.share > 0 and self._seconds >= self._slice_seconds

    def can_wait(self) -> bool:
        """Tell whether steps owe less than two slices of the mean length, and less than is kept."""
        return self._seconds < min(2 * self._slice_seconds, self._most)

    def pay(self, seconds: float) -> None:
        """Count a slice."""
        self._seconds -= seconds

    def forgive(self) -> None:
        """Owe nothing."""
        self._seconds = 0.0

    @property
    def _per_second(self) -> float:
        """Seconds owed for one of steps."""
        return self.share / (1 - self.share)

    @property
    def _most(self) -> float:
        """Seconds that are owed at most."""
        return self._slice_seconds + 2 * self._counters.mean_step_seconds * self._per_second

    @property
    def _slice_seconds(self) -> float:
        return self._counters.mean_slice_seconds or _FIRST_SLICE_SECONDS


class CountedDebt:
    """Owes a number of slices per step: the same on every rank, whatever their clocks say."""

    def __init__(self) -> None:
        self.slices_per_1000_steps = 0
        self._thousandths = 0

    def owe(self, seconds: float) -> None:
        """Count a step, however long."""
        self._thousandths = min(self._thousandths + self.slices_per_1000_steps, self._most)

    def due(self) -> bool:
        """Tell whether steps owe a whole slice."""
        return self._thousandths >= 1000

    def can_wait(self) -> bool:
        """Tell whether steps owe less than two slices, and less than is kept."""
        return self._thousandths < min(2000, self._most)

    def pay(self, seconds: float) -> None:
        """Count a slice, however long."""
        self._thousandths -= 1000

    def forgive(self) -> None:
        """Owe nothing."""
        self._thousandths = 0

    @property
    def _most(self) -> int:
        return 1000 + 2 * self.slices_per_1000_steps


def slices_per_1000_steps(share: float, mean_step_seconds: float, mean_slice_seconds: float) -> int:
    """Return how many slices are ``share`` of the device beside 1000 steps, from what rank 0 has measured."""
    if mean_step_seconds <= 0 or mean_slice_seconds <= 0:
        return 0
    return round(1000 * share / (1 - share) * mean_step_seconds / mean_slice_seconds)


def averaged(mean: float, latest: float) -> float:
    """Return a mean in which the latest number counts a little, or alone if it is the first."""
    return mean + (latest - mean) * (_SMOOTHING if mean > 0 else 1)
