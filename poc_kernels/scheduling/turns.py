"""Turns: who computes on the device now.

Inference computes in *steps*: one forward for all users' requests. Proofs compute in *slices*: some milliseconds of a
forward, between two calls of `Turn.pause`. Each party enters its `Turn` for a step or slice. At most one step and one
slice compute at once, on two streams of a GPU or in two threads on a CPU; on each side, first come is first served.

Proofs have a guaranteed *share* of the device while inference computes step after step: each second of a step *owes*
them share / (1 - share) seconds of slices, which the slices that run then pay. `Turns.pacing` says who waits for whom:

- Paced: a slice waits until it is owed, or until a cap. A step never waits.
- Free, where the priorities of streams or threads protect steps: a slice never waits. A step waits for a slice where
  more is owed than a slice takes, but not for one that takes much longer than slices compute: other programs may keep
  it from the cores.
- None: neither waits for the other, and nothing is owed.

While no step computes and none is expected soon, slices follow each other without waiting.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class TurnsClosed(RuntimeError):  # noqa: N818 (a state, not a fault)
    """The turns were closed, or this turn was cancelled: nothing computes any more."""


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How steps and slices wait for each other while inference computes.

    Args:
        share: of the device's time, guaranteed to proofs that wait while inference computes step after step, in
            (0, 1): more makes validation faster and users' tokens later. From 0.5 on, paced slices never wait.
        max_wait_seconds: longest that a slice waits for steps.
        linger_seconds: how long after a step, while requests are in flight, the next step is expected: meanwhile a
            paced slice that is not owed does not begin.
        paced: let slices wait until they are owed. False where priorities give steps what they need: slices run all
            the time, and a step waits where they got less than their share.

    Raises:
        ValueError: a number is out of range.
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
        """Seconds of slices that each second of steps owes."""
        return self.share / (1 - self.share)


_DEFAULT = Pacing()
_SMOOTHING = 1 / 16  # weight of the latest length in a mean
_FIRST_SLICE_SECONDS = 1e-3  # what a slice is taken for before one has ended
_TIMER_SLACK_SECONDS = 5e-5  # a waiter looks again that much later: at the time itself, a rounded sum may fall short


@dataclass(eq=False)
class _Side:
    """The turns of inference, or those of proofs."""

    waiting: deque[Turn] = field(default_factory=deque)
    computing: Turn | None = None
    mean_seconds: float = 0.0

    @property
    def wants(self) -> bool:
        """Whether one waits or computes."""
        return bool(self.waiting) or self.computing is not None

    def average(self, seconds: float) -> None:
        """Count the length of a step or slice that ended."""
        self.mean_seconds += (seconds - self.mean_seconds) * (_SMOOTHING if self.mean_seconds > 0 else 1)


class Turn:
    """One party's claim to the device, to be entered with ``with`` as often as it likes, by one thread at a time.

    Made by `Turns.inference` and `Turns.proof`, which keep here what they know of the party.
    """

    def __init__(self, turns: Turns, side: _Side, busy: Callable[[], bool], clock: Callable[[], float] | None) -> None:
        self._turns, self._side = turns, side
        self._busy, self._clock = busy, clock
        self._cancelled = self._waiting = False
        self._since = self._clock_since = 0.0  # when it began to wait or to compute
        self._pays = False  # whether its slice pays what is owed: not while inference is idle

    @property
    def waiting(self) -> bool:
        """Whether a thread waits for this turn now."""
        return self._waiting

    @property
    def computing(self) -> bool:
        """Whether this turn has the device now."""
        return self._side.computing is self

    def __enter__(self) -> Turn:
        """Wait for the device and take it.

        Raises:
            TurnsClosed: the turns are closed or this turn is cancelled, now or while it waits.
            RuntimeError: this turn is waiting or computing already.
        """
        self._turns._take(self)
        return self

    def __exit__(self, *_: object) -> None:
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
        """Give the device back, from any thread, and return the seconds of what ended; 0 if it was not computing."""
        return self._turns._give_back(self)

    def cancel(self) -> None:
        """Let this turn never have the device again: its waiter gets `TurnsClosed`; a step that runs may end."""
        self._turns._cancel(self)


class Turns:
    """Grants the device to one step of inference and one slice of a proof at once.

    Args:
        pacing: who waits for whom; None: neither side waits for the other, and proofs are guaranteed nothing.
    """

    def __init__(self, pacing: Pacing | None = _DEFAULT) -> None:
        self._pacing = pacing
        self._condition = threading.Condition()
        self._steps, self._slices = _Side(), _Side()
        self._paused = self._alone = self._closed = False
        self._owed_seconds = 0.0
        self._due_seconds = 0.0  # how much of what is owed free slices may let steps wait for
        self._counted_until = 0.0  # of the step that computes: what it owes since then is not counted yet
        self._last_step: Turn | None = None
        self._last_step_end = 0.0

    def inference(self, busy: Callable[[], bool] | None = None) -> Turn:
        """Make a turn for steps of inference.

        Args:
            busy: whether another step will follow soon; called between steps, must not block.
        """
        return Turn(self, self._steps, busy or (lambda: False), None)

    def proof(self, clock: Callable[[], float] | None = None) -> Turn:
        """Make a turn for slices of proofs.

        Args:
            clock: seconds by which slices pay what is owed; `time.thread_time` for a thread of low priority, whose
                slices take longer than they compute. Read in the thread that computes, so that those which help it do
                not count. `time.monotonic` by default.
        """
        return Turn(self, self._slices, lambda: False, clock)

    @property
    def pacing(self) -> Pacing | None:
        """Who waits for whom. Set it at any time, from any thread: whoever waits looks again at once.

        A new pacing begins with nothing owed: a debt run up at a large share would make users wait long after the share
        was lowered. A step that computes owes to the new pacing from then on, a slice that computes is charged to it in
        full, and a slice that waits has waited since it came. The mean lengths of steps and slices are kept. Priorities
        of streams and threads do not change.
        """
        return self._pacing

    @pacing.setter
    def pacing(self, pacing: Pacing | None) -> None:
        if pacing is not None and not isinstance(pacing, Pacing):
            raise TypeError(f"pacing must be a Pacing or None, got {type(pacing).__name__}")
        with self._condition:
            self._pacing = pacing
            self._owed_seconds = self._due_seconds = 0.0
            self._counted_until = time.monotonic()
            self._condition.notify_all()

    @property
    def inference_paused(self) -> bool:
        """Whether `pause_inference` keeps steps from beginning."""
        return self._paused

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def pause_inference(self) -> None:
        """Let no step begin until `resume_inference`. Returns at once: a step that runs may end."""
        with self._condition:
            self._paused = True
            self._condition.notify_all()

    def resume_inference(self) -> None:
        """Undo `pause_inference`."""
        with self._condition:
            self._paused = False
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
                self._condition.wait_for(lambda: self._closed or self._steps.computing is None)
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

    # ---- what turns call ----

    def _take(self, turn: Turn) -> None:
        with self._condition:
            if turn.waiting or turn.computing:
                raise RuntimeError("this turn is taken already: make another with inference() or proof()")
            self._wait(turn)

    def _pause(self, turn: Turn) -> float:
        with self._condition:
            if not turn.computing:
                raise RuntimeError("this turn does not have the device: pause() goes inside its with block")
            seconds = self._give_back(turn)
            self._wait(turn)
            return seconds

    def _give_back(self, turn: Turn) -> float:
        with self._condition:
            if not turn.computing:
                return 0.0
            now = time.monotonic()
            self._count_owed(now)
            seconds = now - turn._since
            ended = self._step_ended if turn._side is self._steps else self._slice_ended
            ended(turn, seconds, now)
            turn._side.computing = None
            self._condition.notify_all()
            return seconds

    def _cancel(self, turn: Turn) -> None:
        with self._condition:
            turn._cancelled = True
            self._condition.notify_all()

    # ---- under the lock: waiting ----

    def _refuse_closed(self) -> None:
        if self._closed:
            raise TurnsClosed("no more turns: they were closed")

    def _wait(self, turn: Turn) -> None:
        turn._waiting, turn._since = True, time.monotonic()
        self._count_owed(turn._since)  # a proof that comes now is not owed for what was before
        turn._side.waiting.append(turn)
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
            turn._pays = not self._paused and (self._steps.wants or now < self._expected_until())
            turn._side.computing = turn
            turn._since = now
            if turn._side is self._steps:
                self._counted_until = now
            elif turn._clock is not None:
                turn._clock_since = turn._clock()
        finally:
            turn._waiting = False
            turn._side.waiting.remove(turn)
            self._condition.notify_all()

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        """Return 0 if ``turn`` may have the device, else when to look again; None: when something changes."""
        if turn._side.computing is not None or turn._side.waiting[0] is not turn:
            return None
        return self._seconds_to_step(now) if turn._side is self._steps else self._seconds_to_slice(turn, now)

    def _seconds_to_step(self, now: float) -> float | None:
        if self._paused or self._alone:
            return None
        if self._pacing is None or self._pacing.paced or not self._slices.wants or not self._is_owed(self._pacing, now):
            return 0.0
        if self._slices.computing is None:
            return None  # the slice begins at once
        left = self._due_left(now)
        return left + _TIMER_SLACK_SECONDS if left > 0 else 0.0

    def _seconds_to_slice(self, turn: Turn, now: float) -> float:
        pacing = self._pacing
        if self._paused or pacing is None or not pacing.paced or self._is_owed(pacing, now):
            return 0.0
        capped = turn._since + pacing.max_wait_seconds - now
        if self._steps.computing is not None:
            owed = (self._slice_seconds - self._owed_seconds) / pacing.owed_per_second
            return min(capped, owed + _TIMER_SLACK_SECONDS)
        if self._steps.waiting:
            return capped
        return max(0.0, min(capped, self._expected_until() - now))

    def _expected_until(self) -> float:
        """Return when the step after the one that ended last is no longer expected to begin."""
        if self._pacing is None or self._last_step is None or self._last_step._cancelled or not self._last_step._busy():
            return 0.0
        return self._last_step_end + self._pacing.linger_seconds

    # ---- under the lock: what is owed ----

    @property
    def _slice_seconds(self) -> float:
        return self._slices.mean_seconds or _FIRST_SLICE_SECONDS

    def _count_owed(self, now: float) -> None:
        """Count what the step that computes owes to proofs, up to now."""
        if self._steps.computing is not None:
            if self._pacing is not None and self._slices.wants:
                self._owed_seconds += (now - self._counted_until) * self._pacing.owed_per_second
            self._counted_until = now

    def _is_owed(self, pacing: Pacing, now: float) -> bool:
        """Tell whether the next slice is owed: a paced one begins, and a step waits for a free one."""
        if self._slices.waiting and now - self._slices.waiting[0]._since >= pacing.max_wait_seconds:
            return True
        self._count_owed(now)
        if pacing.paced:
            return pacing.owed_per_second >= 1 or self._owed_seconds >= self._slice_seconds
        return min(self._owed_seconds, self._due_seconds) >= self._slice_seconds

    def _due_left(self, now: float) -> float:
        """Return what is due of what is owed, less the time that steps have left to the slice that computes."""
        proof = self._slices.computing
        if proof is None or self._steps.computing is not None:
            return self._due_seconds
        return self._due_seconds - (now - max(proof._since, self._last_step_end))

    def _slice_ended(self, turn: Turn, seconds: float, now: float) -> None:
        paid = seconds if turn._clock is None else min(seconds, max(0.0, turn._clock() - turn._clock_since))
        self._slices.average(paid)
        if turn._pays:
            # Slices that were not owed, but waited too long, are not paid back without end.
            self._owed_seconds = max(self._owed_seconds - paid, -paid)
            self._due_seconds = self._due_left(now)  # a step may have waited for it

    def _step_ended(self, turn: Turn, seconds: float, now: float) -> None:
        self._steps.average(seconds)
        self._last_step, self._last_step_end = turn, now
        if self._pacing is not None:
            # What a long step owes is not paid at one go: others' next token would wait for all of it.
            self._due_seconds = self._slice_seconds + 2 * self._steps.mean_seconds * self._pacing.owed_per_second
