"""Slices of a model's forward: it stops between two calls of torch, where others may have the device, and goes on.

Every kernel, shape and order is that of a forward that runs in one go, so no bit changes. Where it stops is measured,
not guessed: the first forwards of a shape are timed call by call, and consecutive calls put together to slices that
take no longer than asked for, as far as a single call allows.
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
"""Called where computing may be interrupted: it returns when it may go on, or raises to give it up."""

Result = TypeVar("Result")

MEASURED_FORWARDS = 4
"""Forwards of a shape that are timed; the shortest time of each call counts."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """Where a forward stops, and how long its slices took on their own.

    Args:
        cuts: before which of the calls of torch, counted from 0, ascending.
        seconds: of each slice, the one before the first cut first.
        longest_call: name of the call that took longest: no slice can be shorter.
    """

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]
    longest_call: str

    @property
    def longest_seconds(self) -> float:
        """Of the longest slice."""
        return max(self.seconds)


class SlicedForward:
    """Runs forwards of one shape in slices, from one thread at a time.

    Args:
        device: where they compute.
        slice_seconds: longest that a slice should take.

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
        """Of the forwards; None until they are measured."""
        return self._slices

    def forget(self) -> None:
        """Measure anew: the forwards that follow have another shape."""
        self._timings.clear()
        self._slices = None

    def run_unmeasured(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """What ``forward`` returns, with ``pause`` called between all its calls: for one that makes other calls."""
        with _Cut(None, pause):
            return forward()

    def run(self, forward: Callable[[], Result], pause: Pause) -> Result:
        """What ``forward`` returns, with ``pause`` called between its slices: between all its calls until measured."""
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
    """As many consecutive calls to a slice as slice_seconds take, each as long as in the forward where it was shortest.

    Args:
        timings: of the calls of several forwards, one forward at least, in order, each until the next call. Where a
            forward has others than the first, because it depends on data, those of the first count.
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
    longest = max(range(len(seconds)), key=seconds.__getitem__, default=None)
    return Slices(tuple(cuts), tuple(lengths), "" if longest is None else timings[0][longest].name)


class _Calls(TorchFunctionMode):
    """Counts calls of torch; what they call in turn does not count, nor do looks at a tensor's attributes."""

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
    """Pauses before chosen calls; None: before all but the first."""

    def __init__(self, cuts: frozenset[int] | None, pause: Pause) -> None:
        super().__init__()
        self._cuts, self._pause = cuts, pause

    def _before(self, place: int, name: str) -> None:
        if place > 0 if self._cuts is None else place in self._cuts:
            self._pause()


class _Measured(_Calls):
    """Pauses before every call but the first, and times each until the next."""

    def __init__(self, device: torch.device, pause: Pause) -> None:
        super().__init__()
        self._pause = pause
        # What the thread itself computes: others may have the cores between.
        self._watch = Stopwatch(device, time.thread_time)

    def _before(self, place: int, name: str) -> None:
        if place > 0:
            self._watch.end()
            self._pause()
        self._watch.begin(name)

    def timings(self) -> list[Span]:
        """Of the calls, once the forward is over."""
        if self._count > 0:
            self._watch.end()
        return self._watch.spans()
