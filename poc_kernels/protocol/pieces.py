"""Pieces of a batch's rows that take as long as a slice should: for what is computed outside the forward."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ..scheduling.slices import Pause
from ..scheduling.stopwatch import Stopwatch


class Pieces:
    """Chooses how many rows to compute between two pauses, by the fastest so far.

    Args:
        device: what computes.
        slice_seconds: how long a piece should take.
    """

    def __init__(self, device: torch.device, slice_seconds: float) -> None:
        self._device = device
        self._slice_seconds = slice_seconds
        self._row_seconds: dict[tuple[str, int], float] = {}
        self._unread: list[tuple[tuple[str, int], int, Stopwatch]] = []

    def of(self, work: str, rows: int, width: int, pause: Pause, *, at_once: int, min_rows: int = 1) -> Iterator[slice]:
        """Divide ``rows`` into pieces, with a pause after each.

        Args:
            work: what is computed; for another ``width`` of rows it is timed anew.
            pause: called after each piece.
            at_once: rows that a GPU is given before it was timed; a CPU begins with ``min_rows``.
            min_rows: minimum number of rows of a piece.
        """
        key, start = (work, width), 0
        on_gpu = self._device.type == "cuda"
        while start < rows:
            known = self._row_seconds.get(key)
            first = at_once if on_gpu else min_rows
            size = first if known is None else int(min(rows, self._slice_seconds / known))
            piece = slice(start, min(rows, start + max(size, min_rows)))
            watch = Stopwatch(self._device, time.thread_time)
            watch.begin(work)
            yield piece
            watch.end()
            self._unread.append((key, piece.stop - piece.start, watch))
            if not on_gpu:
                self.read()
            start = piece.stop
            pause()

    def read(self) -> None:
        """Learn from pieces that are done. On a GPU it waits for the last: call it when results were read."""
        for key, rows, watch in self._unread:
            (span,) = watch.spans()
            seconds = max(span.seconds, 1e-9) / rows
            self._row_seconds[key] = min(seconds, self._row_seconds.get(key, seconds))
        self._unread.clear()

    def forget_unread(self) -> None:
        """Forget the pieces of a batch that was given up."""
        self._unread.clear()
