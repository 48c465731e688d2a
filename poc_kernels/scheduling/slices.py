"""Slices of a model's forward: it stops between two calls of torch, where others may take the device, and goes on.

Kernels, shapes and their order are those of a forward that runs in one go, so no bit changes. Where it stops comes from
measurements: the first forwards of a shape are timed call by call, and consecutive calls are put together into slices
that take no longer than asked for, unless a single call does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from .stopwatch import Span, Stopwatch

Pause = Callable[[], None]
"""Called where computing may be interrupted: returns when it may go on, or raises to give it up."""

Result = TypeVar("Result")

MEASURED_FORWARDS = 4
"""How many forwards of a shape are timed; the shortest time of each call counts."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """Where a forward stops, and how long its slices take without interruptions.

    Args:
        cuts: indices of the calls of torch, counted from 0, before which it stops; ascending.
        seconds: length of each slice, in order: one more than there are cuts.
    """

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def longest_seconds(self) -> float:
        """Length of the longest slice."""
        return max(self.seconds)


class SlicedForward:
    """Runs forwards of one shape in slices, from one thread at a time.

    Args:
        device: where they compute.
        slice_seconds: how long a slice should take at most.

    Raises:
        ValueError: slice_seconds is not positive.
    """

    def __init__(self, device: torch.device, slice_seconds: float) -> None:
        if not slice_seconds > 0:
            raise ValueError(f"slice_seconds must be positive, got {slice_seconds}")
        self._device = device
        self._slice_seconds = slice_seconds
        self._timings: list[list[Span]] = []
        self._slices: Slices | None = None

    @property
    def slices(self) -> Slices | None:
        """Slices of a forward of this shape; None until enough forwards were measured."""
        return self._slices

    def forget(self) -> None:
        """Measure anew, because the forwards that follow have another shape."""
        self._timings.clear()
        self._slices = None

    def run_unmeasured(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """Run a forward whose calls are not those of `run`'s, with ``pause`` between all of them; return its result."""
        with _Cut(None, pause):
            return forward()

    def run(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """Run ``forward``, with ``pause`` between slices (between all calls until measured); return its result."""
        if self._slices is not None:
            with _Cut(frozenset(self._slices.cuts), pause):
                return forward()
        measured = _Measured(self._device, pause)
        with measured:
            result = forward()
        self._timings.append(measured.timings())
        if len(self._timings) == MEASURED_FORWARDS:
            self._slices = plan(self._timings, self._slice_seconds)
        return result


def plan(timings: Sequence[Sequence[Span]], slice_seconds: float) -> Slices:
    """Put as many consecutive calls into each slice as take slice_seconds.

    Args:
        timings: for each forward, at least one, its calls in order, each timed until the next. A call counts with the
            shortest time that it took. Where data made a forward call something else than the first did, only the
            first counts.
        slice_seconds: how long a slice should take at most.
    """
    seconds = [timing.seconds for timing in timings[0]]
    for other in timings[1:]:
        for place, (timing, first) in enumerate(zip(other, timings[0], strict=False)):
            if timing.name == first.name:
                seconds[place] = min(seconds[place], timing.seconds)
    cuts: list[int] = []
    lengths = [0.0]
    for place, length in enumerate(seconds):
        if place > 0 and lengths[-1] + length > slice_seconds:
            cuts.append(place)
            lengths.append(0.0)
        lengths[-1] += length
    return Slices(tuple(cuts), tuple(lengths))


class _Calls(TorchFunctionMode):
    """Counts calls of torch, but neither the calls that they make in turn nor the reading of a tensor's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":
            self._before(self._count, name)
            self._count += 1
        return func(*args, **(kwargs or {}))

    def _before(self, place: int, name: str) -> None:
        raise NotImplementedError


class _Cut(_Calls):
    """Pauses before the calls in ``cuts``; with None, before all except the first."""

    def __init__(self, cuts: frozenset[int] | None, pause: Pause) -> None:
        super().__init__()
        self._cuts, self._pause = cuts, pause

    def _before(self, place: int, name: str) -> None:
        if place > 0 if self._cuts is None else place in self._cuts:
            self._pause()


class _Measured(_Calls):
    """Pauses before every call except the first, and times each until the next."""

    def __init__(self, device: torch.device, pause: Pause) -> None:
        super().__init__()
        self._pause = pause
        # The time that the thread computes: others may have the cores in between.
        self._watch = Stopwatch(device, time.thread_time)

    def _before(self, place: int, name: str) -> None:
        if place > 0:
            self._watch.end()
            self._pause()
        self._watch.begin(name)

    def timings(self) -> list[Span]:
        """Return the timings of all calls, once the forward is over."""
        if self._count > 0:
            self._watch.end()
        return self._watch.spans()
