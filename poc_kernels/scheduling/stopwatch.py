"""Measures how long a device computes: by events of the current stream on CUDA, by a clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Span(NamedTuple):
    """The name of something that was computed, and how long it took."""

    name: str
    seconds: float


class Stopwatch:
    """Measures spans, one after another, without making the host wait.

    Args:
        device: what computes; on a GPU, a span is what its current stream is given between `begin` and `end`.
        clock: measures on a CPU; `time.perf_counter` by default.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self._device = device
        self._clock = clock
        self._names: list[str] = []
        self._begins: list[Any] = []
        self._ends: list[Any] = []

    def begin(self, name: str) -> None:
        """Begin a span. The one before must have ended."""
        self._names.append(name)
        self._begins.append(self._now())

    def end(self) -> str:
        """End the span that was begun last and return its name."""
        self._ends.append(self._now())
        return self._names[-1]

    def spans(self) -> list[Span]:
        """Return all spans that have ended. On a GPU, wait until the last of them is done."""
        times = zip(self._names, self._begins, self._ends, strict=False)
        if self._device.type != "cuda":
            return [Span(name, end - begin) for name, begin, end in times]
        if self._ends:
            self._ends[-1].synchronize()
        return [Span(name, 1e-3 * begin.elapsed_time(end)) for name, begin, end in times]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return (self._clock or time.perf_counter)()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
