"""The turns of a node whose pacing changes from block to block."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from poc_kernels.scheduling import Turn, Turns


class SwitchedTurns:
    """The interface of a `Turns`, behind which there is another one in each block; times what steps wait.

    So one continuous batching, with its cache and its graphs, serves all conditions.
    """

    def __init__(self, turns: Turns) -> None:
        self._now = turns
        self.waits: list[float] = []
        """Seconds that each step of inference waited for its turn."""

    @property
    def now(self) -> Turns:
        """The one that turns are taken in."""
        return self._now

    def switch(self, turns: Turns) -> None:
        """Take turns in another one from the next turn on."""
        self._now = turns

    def inference(self, busy: Callable[[], bool] | None = None) -> Any:
        return _SwitchedTurn(self, lambda turns: turns.inference(busy), self.waits)

    def proof(self, clock: Callable[[], float] | None = None) -> Any:
        return _SwitchedTurn(self, lambda turns: turns.proof(clock), None)

    @property
    def inference_paused(self) -> bool:
        return self._now.inference_paused

    @property
    def closed(self) -> bool:
        return self._now.closed

    def pause_inference(self) -> None:
        self._now.pause_inference()

    def resume_inference(self) -> None:
        self._now.resume_inference()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._now.alone():
            yield

    def close(self) -> None:
        self._now.close()


class _SwitchedTurn:
    def __init__(self, switched: SwitchedTurns, make: Callable[[Turns], Turn], waits: list[float] | None) -> None:
        self._switched, self._make, self._waits = switched, make, waits
        self._turns = switched.now
        self._turn = make(self._turns)

    def __enter__(self) -> _SwitchedTurn:
        if self._turns is not self._switched.now:
            self._turns = self._switched.now
            self._turn = self._make(self._turns)
        if self._waits is None:
            self._turn.__enter__()
        else:
            began = time.perf_counter()
            self._turn.__enter__()
            self._waits.append(time.perf_counter() - began)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turn.__exit__(kind, error, traceback)

    @property
    def waiting(self) -> bool:
        return self._turn.waiting

    @property
    def computing(self) -> bool:
        return self._turn.computing

    def pause(self) -> float:
        return self._turn.pause()

    def end(self) -> float:
        return self._turn.end()

    def cancel(self) -> None:
        self._turn.cancel()
