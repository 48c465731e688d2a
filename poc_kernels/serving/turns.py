"""Turns: who computes on the device now. Inference takes it for one step, a proof for one batch."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class TurnsClosed(RuntimeError):  # noqa: N818 (a state, not a fault)
    """The turns were closed, or this turn was cancelled: nothing computes any more."""


class Turn:
    """One party's claim to the device, to be entered with ``with`` as often as it likes, by one thread at a time.

    Made by `Turns.inference` and `Turns.proof`.
    """

    def __init__(self, turns: Turns, side: int) -> None:
        self._turns = turns
        self._side = side
        self._cancelled = False
        self._waiting = False

    @property
    def waiting(self) -> bool:
        """Whether a thread waits for this turn now."""
        return self._waiting

    @property
    def computing(self) -> bool:
        """Whether this turn has the device now."""
        return self._turns._computing is self

    def __enter__(self) -> Turn:
        """Wait for the device and take it.

        Raises:
            TurnsClosed: the turns are closed or this turn is cancelled, now or while it waits.
            RuntimeError: this turn is waiting or computing already.
        """
        self._turns._take(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Give the device back, from any thread. Nothing happens if this turn does not have it."""
        self._turns._give_back(self)

    def cancel(self) -> None:
        """Let this turn never have the device again: its waiter gets `TurnsClosed`; a step that runs may end."""
        self._turns._cancel(self)


_INFERENCE, _PROOF = 0, 1


class Turns:
    """A lock with two sides, first come first served within a side; the sides alternate while both wait.

    The one place that decides between inference and proofs.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._lines: tuple[deque[Turn], deque[Turn]] = (deque(), deque())
        self._computing: Turn | None = None
        self._last_side = _PROOF
        self._held = False
        self._closed = False

    def inference(self) -> Turn:
        """A turn for steps of continuous batching."""
        return Turn(self, _INFERENCE)

    def proof(self) -> Turn:
        """A turn for proof batches."""
        return Turn(self, _PROOF)

    @property
    def inference_held(self) -> bool:
        """Whether inference is held back by `hold_inference`."""
        return self._held

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def hold_inference(self) -> None:
        """Let no inference step begin until `release_inference`. Returns at once: a step that runs may end."""
        with self._condition:
            self._held = True

    def release_inference(self) -> None:
        """Undo `hold_inference`."""
        with self._condition:
            self._held = False
            self._condition.notify_all()

    def close(self) -> None:
        """Wake every waiter with `TurnsClosed` and refuse every later turn. A turn that runs may end."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _next(self) -> Turn | None:
        for side in (1 - self._last_side, self._last_side):
            if self._lines[side] and not (side == _INFERENCE and self._held):
                return self._lines[side][0]
        return None

    def _take(self, turn: Turn) -> None:
        with self._condition:
            if turn._waiting or self._computing is turn:
                raise RuntimeError("this turn is taken already: make another with inference() or proof()")
            turn._waiting = True
            self._lines[turn._side].append(turn)
            try:
                self._condition.wait_for(
                    lambda: self._closed or turn._cancelled or (self._computing is None and self._next() is turn)
                )
                if self._closed or turn._cancelled:
                    raise TurnsClosed("no more turns: they were closed" if self._closed else "the turn was cancelled")
                self._computing = turn
                self._last_side = turn._side
            finally:
                turn._waiting = False
                self._lines[turn._side].remove(turn)
                self._condition.notify_all()

    def _give_back(self, turn: Turn) -> None:
        with self._condition:
            if self._computing is turn:
                self._computing = None
                self._condition.notify_all()

    def _cancel(self, turn: Turn) -> None:
        with self._condition:
            turn._cancelled = True
            self._condition.notify_all()
