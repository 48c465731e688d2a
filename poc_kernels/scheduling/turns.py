"""Turns: who computes on the device now. Inference takes it for one step, a proof for one slice.

A step and a slice may run at once: on two streams of a GPU, or in two threads on cores. While inference is idle a
proof has the device. Who waits while inference computes step after step is said by `Turns.pacing`:

- Paced: a step never waits. A proof does, except for the share of the device that is guaranteed to it, and at most
  until a cap: slices that are owed to it run beside steps.
- Free, where priorities alone protect steps: slices run beside steps all the time. A step waits for one only where
  slices got less than their share, and not for one that takes much longer than slices compute: other programs may
  keep it from the cores.
- None: nobody waits for the other side.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType


class TurnsClosed(RuntimeError):  # noqa: N818 (a state, not a fault)
    """The turns were closed, or this turn was cancelled: nothing computes any more."""


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How steps and slices wait for each other while inference computes.

    Args:
        share: of the device's time, guaranteed to proofs that wait while inference computes step after step, in
            (0, 1): more makes validation faster and users' tokens later. Slices run for share / (1 - share) of the
            time of steps; paced, from 0.5 on all the time.
        max_wait_seconds: longest that a slice waits while no other slice runs.
        linger_seconds: for so long after a step, requests being in flight, the next step is expected, and a proof that
            is owed nothing does not begin.
        paced: let slices wait while inference computes. False where priorities give steps what they need: slices run
            all the time, and a step waits where they got less than their share.
    """

    share: float = 0.1
    max_wait_seconds: float = 1.0
    linger_seconds: float = 0.005
    paced: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        for name in ("max_wait_seconds", "linger_seconds"):
            if not 0 <= getattr(self, name) < threading.TIMEOUT_MAX:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")

    @property
    def owed_per_second(self) -> float:
        """Seconds of slices that are owed to proofs for each second of steps."""
        return self.share / (1 - self.share)


_DEFAULT = Pacing()


class Turn:
    """One party's claim to the device, to be entered with ``with`` as often as it likes, by one thread at a time.

    Made by `Turns.inference` and `Turns.proof`.
    """

    def __init__(
        self,
        turns: Turns,
        side: int,
        busy: Callable[[], bool] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._turns = turns
        self._side = side
        self._busy = busy or (lambda: False)
        self._clock = clock
        self._cancelled = False
        self._waiting = False
        self._since = 0.0
        self._clock_since = 0.0
        self._owed = False

    @property
    def waiting(self) -> bool:
        """Whether a thread waits for this turn now."""
        return self._waiting

    @property
    def computing(self) -> bool:
        """Whether this turn has the device now."""
        return self._turns._computing[self._side] is self

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

    def pause(self) -> float:
        """End a slice: let others have the device if it is theirs now, and take it again. For a proof, inside ``with``.

        Returns:
            Seconds of the slice that ended.

        Raises:
            TurnsClosed: as `__enter__`; the device is given back.
            RuntimeError: this turn does not have the device.
        """
        return self._turns._pause(self)

    def end(self) -> float:
        """Give the device back, from any thread. Nothing happens if this turn does not have it.

        Returns:
            Seconds of the step or slice that ended; 0 without one.
        """
        return self._turns._give_back(self)

    def cancel(self) -> None:
        """Let this turn never have the device again: its waiter gets `TurnsClosed`; a step that runs may end."""
        self._turns._cancel(self)


_INFERENCE, _PROOF = 0, 1
_SMOOTHING = 1 / 16
"""Weight of the latest of lengths that are averaged."""
_FIRST_SLICE = 1e-3
"""Seconds that a slice is taken for before one has ended."""
_A_LITTLE_LATER = 5e-5


class Turns:
    """Who computes on a device: one step of inference and one slice of a proof at once, each side in order of arrival.

    Args:
        pacing: how proofs are paced; None: neither side ever waits for the other, and proofs are guaranteed nothing.
    """

    def __init__(self, pacing: Pacing | None = _DEFAULT) -> None:
        self._pacing = pacing
        self._condition = threading.Condition()
        self._lines: tuple[deque[Turn], deque[Turn]] = (deque(), deque())
        self._computing: list[Turn | None] = [None, None]
        self._held = False
        self._alone = False
        self._closed = False
        self._owed_seconds = 0.0
        self._counted_until = 0.0
        self._due_seconds = 0.0
        self._mean_step = 0.0
        self._mean_slice = 0.0
        self._last_step: Turn | None = None
        self._last_step_end = 0.0

    def inference(self, busy: Callable[[], bool] | None = None) -> Turn:
        """A turn for steps of inference.

        Args:
            busy: whether another step will follow soon; called between steps, must not block.
        """
        return Turn(self, _INFERENCE, busy)

    def proof(self, clock: Callable[[], float] | None = None) -> Turn:
        """A turn for slices of proofs.

        Args:
            clock: seconds by which slices pay what is owed; `time.thread_time` for a thread of low priority, whose
                slices take longer than they compute. Read in the thread that computes, so that those which help it do
                not count. `time.monotonic` by default.
        """
        return Turn(self, _PROOF, clock=clock)

    @property
    def pacing(self) -> Pacing | None:
        """How proofs are paced. It can be set at any time, from any thread: whoever waits looks again at once.

        A new pacing begins with nothing owed: a debt that was run up at a large share would make users wait long after
        the share was lowered. A step that runs owes to the new pacing from then on, a slice that runs is charged to it
        in full, and who waits has waited since it came. The measured lengths of steps and slices are kept. Priorities
        of threads and streams do not change.
        """
        return self._pacing

    @pacing.setter
    def pacing(self, pacing: Pacing | None) -> None:
        with self._condition:
            self._pacing = pacing
            self._owed_seconds = self._due_seconds = 0.0
            self._counted_until = time.monotonic()
            self._condition.notify_all()

    @property
    def inference_paused(self) -> bool:
        """Whether inference is held back by `pause_inference`."""
        return self._held

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def pause_inference(self) -> None:
        """Let no inference step begin until `resume_inference`. Returns at once: a step that runs may end."""
        with self._condition:
            self._held = True
            self._condition.notify_all()

    def resume_inference(self) -> None:
        """Undo `pause_inference`."""
        with self._condition:
            self._held = False
            self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let no step run inside the block, from a proof that has its turn: for what two may not do at once.

        Raises:
            TurnsClosed: the turns are closed, now or while it waits for a step to end.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._closed or not self._alone)
            self._refuse_closed()
            self._alone = True  # no step begins from here on
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._computing[_INFERENCE] is None)
                self._refuse_closed()
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()

    def close(self) -> None:
        """Wake every waiter with `TurnsClosed` and refuse every later turn. A turn that runs may end."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    # ---- under the lock ----

    def _refuse_closed(self) -> None:
        if self._closed:
            raise TurnsClosed("no more turns: they were closed")

    @property
    def _steps_wait(self) -> bool:
        """Whether steps wait for slices that are owed, rather than slices for steps."""
        return self._pacing is not None and not self._pacing.paced

    def _proof_wants(self) -> bool:
        return bool(self._lines[_PROOF]) or self._computing[_PROOF] is not None

    def _count_owed(self, now: float) -> None:
        """Count what the step that runs owes to proofs, up to now."""
        if self._computing[_INFERENCE] is not None:
            if self._pacing is not None and self._proof_wants():
                self._owed_seconds += (now - self._counted_until) * self._pacing.owed_per_second
            self._counted_until = now

    def _is_owed(self, now: float) -> bool:
        """Whether the first proof goes before inference, which then waits for it where it waits for slices at all."""
        if self._pacing is None:
            return True
        line = self._lines[_PROOF]
        if line and now - line[0]._since >= self._pacing.max_wait_seconds:
            return True
        self._count_owed(now)
        owed = self._owed_seconds
        if self._steps_wait:
            owed = min(owed, self._due_seconds)
        elif self._pacing.owed_per_second >= 1:
            return True
        return owed >= self._slice_seconds

    def _due_left(self, now: float) -> float:
        """What is due of what is owed, less the time that steps have left to the slice that runs."""
        proof = self._computing[_PROOF]
        if proof is None or self._computing[_INFERENCE] is not None:
            return self._due_seconds
        return self._due_seconds - (now - max(proof._since, self._last_step_end))

    @property
    def _slice_seconds(self) -> float:
        return self._mean_slice or _FIRST_SLICE

    def _seconds_to_owed(self) -> float:
        """When the step that runs, if it does, will owe a slice."""
        if self._computing[_INFERENCE] is None:
            return threading.TIMEOUT_MAX
        assert self._pacing is not None
        # Not at the time itself, where a rounded sum may fall short of it.
        return (self._slice_seconds - self._owed_seconds) / self._pacing.owed_per_second + _A_LITTLE_LATER

    def _expected_until(self) -> float:
        """When inference that has just ended a step is no longer expected to begin the next."""
        if self._pacing is None or self._last_step is None or self._last_step._cancelled or not self._last_step._busy():
            return 0.0
        return self._last_step_end + self._pacing.linger_seconds

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        """0 if ``turn`` may have the device, else when to look again; None: when something changes."""
        if self._computing[turn._side] is not None or self._lines[turn._side][0] is not turn:
            return None
        other = self._computing[1 - turn._side]
        if turn._side == _INFERENCE:
            if self._held or self._alone:
                return None
            if not (self._steps_wait and self._proof_wants() and self._is_owed(now)):
                return 0.0
            if other is None:
                return None
            left = self._due_left(now)
            return left + _A_LITTLE_LATER if left > 0 else 0.0
        if self._held or self._pacing is None or not self._pacing.paced or self._is_owed(now):
            return 0.0
        capped = turn._since + self._pacing.max_wait_seconds - now
        if self._lines[_INFERENCE] or other is not None:
            return min(capped, self._seconds_to_owed())
        return max(0.0, min(capped, self._expected_until() - now))

    def _take(self, turn: Turn) -> None:
        with self._condition:
            if turn._waiting or self._computing[turn._side] is turn:
                raise RuntimeError("this turn is taken already: make another with inference() or proof()")
            self._wait(turn)

    def _wait(self, turn: Turn) -> None:
        turn._waiting, turn._since = True, time.monotonic()
        self._count_owed(turn._since)  # a proof that comes now is not owed for what was before
        self._lines[turn._side].append(turn)
        try:
            while True:
                self._refuse_closed()
                if turn._cancelled:
                    raise TurnsClosed("the turn was cancelled")
                now = time.monotonic()
                seconds = self._seconds_to_wait(turn, now)
                if seconds == 0.0:
                    break
                self._condition.wait(seconds)
            inference_wants = bool(self._lines[_INFERENCE]) or self._computing[_INFERENCE] is not None
            turn._owed = not self._held and (inference_wants or now < self._expected_until())
            self._computing[turn._side] = turn
            turn._since = now
            if turn._side == _INFERENCE:
                self._counted_until = now
            elif turn._clock is not None:
                turn._clock_since = turn._clock()
        finally:
            turn._waiting = False
            self._lines[turn._side].remove(turn)
            self._condition.notify_all()

    def _pause(self, turn: Turn) -> float:
        with self._condition:
            if self._computing[turn._side] is not turn:
                raise RuntimeError("this turn does not have the device: pause() goes inside its with block")
            seconds = self._account(turn)
            self._computing[turn._side] = None
            if any(self._lines):
                self._condition.notify_all()
            self._wait(turn)
            return seconds

    def _give_back(self, turn: Turn) -> float:
        with self._condition:
            if self._computing[turn._side] is not turn:
                return 0.0
            seconds = self._account(turn)
            self._computing[turn._side] = None
            self._condition.notify_all()
            return seconds

    def _account(self, turn: Turn) -> float:
        now = time.monotonic()
        self._count_owed(now)
        seconds = now - turn._since
        if turn._side == _PROOF:
            paid = seconds
            if turn._clock is not None:
                paid = min(seconds, max(0.0, turn._clock() - turn._clock_since))
            self._mean_slice += (paid - self._mean_slice) * (_SMOOTHING if self._mean_slice > 0 else 1)
            if turn._owed:
                # Slices that were not owed, but waited too long, are not paid back without end.
                self._owed_seconds = max(self._owed_seconds - paid, -paid)
                self._due_seconds = self._due_left(now)  # a step may have waited for it
        else:
            self._mean_step += (seconds - self._mean_step) * (_SMOOTHING if self._mean_step > 0 else 1)
            self._last_step, self._last_step_end = turn, now
            if self._pacing is not None:
                # What a long step owes is not paid at one go: others' next token would wait for all of it.
                self._due_seconds = self._slice_seconds + 2 * self._mean_step * self._pacing.owed_per_second
        return seconds

    def _cancel(self, turn: Turn) -> None:
        with self._condition:
            turn._cancelled = True
            self._condition.notify_all()
