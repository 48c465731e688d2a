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

    Attributes:
        slices: slices of a forward of this shape; None until enough forwards were measured.

    Raises:
        ValueError: slice_seconds is not positive.
    """

    def __init__(self, device: torch.device, slice_seconds: float) -> None:
        if not slice_seconds > 0:
            raise ValueError(f"slice_seconds must be positive, got {slice_seconds}")
        self._device = device
        self._slice_seconds = slice_seconds
        self._timings: list[list[Span]] = []
        self.slices: Slices | None = None

    def forget(self) -> None:
        """Measure anew, because the forwards that follow have another shape."""
        self._timings.clear()
        self.slices = None

    def run_unmeasured(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """Run a forward whose calls are not those of `run`'s, with ``pause`` between all of them; return its result."""
        with _BeforeCalls(lambda place, _: pause() if place > 0 else None):
            return forward()

    def run(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """Run ``forward``, with ``pause`` between slices (between all calls until measured); return its result."""
        if self.slices is not None:
            cuts = frozenset(self.slices.cuts)
            with _BeforeCalls(lambda place, _: pause() if place in cuts else None):
                return forward()
        # The time that the thread computes: others may have the cores in between.
        watch = Stopwatch(self._device, time.thread_time)

        def time_from_here(place: int, name: str) -> None:
            if place > 0:
                watch.end()
                pause()
            watch.begin(name)

        with _BeforeCalls(time_from_here) as calls:
            result = forward()
        if calls.count > 0:
            watch.end()
        self._timings.append(watch.spans())
        if len(self._timings) == MEASURED_FORWARDS:
            self.slices = plan(self._timings, self._slice_seconds)
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


class _BeforeCalls(TorchFunctionMode):
    """Calls ``before`` with the place and the name of each call of torch, before it.

    Neither the calls that these make in turn nor the reading of a tensor's attributes count.
    """

    def __init__(self, before: Callable[[int, str], None]) -> None:
        super().__init__()
        self._before = before
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":
            self._before(self.count, name)
            self.count += 1
        return func(*args, **(kwargs or {}))
