"""Turns in every order in which their threads can run; and that broken ones are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interleaving import Event, Instruments, World, explore
from scenarios import LONG, MODES, THOROUGH, Record, turns_of

from poc_kernels.scheduling import Pacing, Turn, Turns, TurnsClosed


class Watched:
    """Turns whose every grant is checked against what their documentation promises."""

    def __init__(self, world: World, turns: Turns) -> None:
        self.world, self.turns = world, turns
        self.sides: tuple[list[Turn], list[Turn]] = ([], [])
        self._waiting: tuple[list[Turn], list[Turn]] = ([], [])
        self._had: tuple[Turn | None, Turn | None] = (None, None)
        self._paused = False
        world.observe = self.observe

    def inference(self) -> Turn:
        self.sides[0].append(self.turns.inference())
        return self.sides[0][-1]

    def proof(self) -> Turn:
        self.sides[1].append(self.turns.proof())
        return self.sides[1][-1]

    def observe(self) -> None:
        """Called between all operations."""
        have: list[Turn | None] = []
        for side, waiting, had in zip(self.sides, self._waiting, self._had, strict=True):
            computing = [turn for turn in side if turn.computing]
            assert len(computing) <= 1
            have.append(computing[0] if computing else None)
            waiting += [turn for turn in side if turn.waiting and turn not in waiting]
            granted = have[-1]
            if granted is not None and granted is not had:
                assert had is None, "two compute at once"
                assert waiting[:1] in ([], [granted]), "not first come first served"
                if side is self.sides[0]:
                    assert not (self._paused and self.turns.inference_paused), "granted while paused"
                    assert not self._owes_a_slice(), "granted before a slice that is owed"
            waiting[:] = [turn for turn in waiting if turn.waiting]
        self._had = (have[0], have[1])
        self._paused = self.turns.inference_paused

    def _owes_a_slice(self) -> bool:
        if any(turn.computing for turn in self.sides[1]) or not any(turn.waiting for turn in self.sides[1]):
            return False
        return self.turns._owed_seconds > LONG / 2  # as `Owing` begins, until its pacing changes

    def compute(self, turn: Turn, times: int = 1, slices: int = 1) -> str:
        """Take the turn ``times`` times, for ``slices`` slices each; return what ended it."""
        try:
            for _ in range(times):
                with turn:
                    for cut in range(slices):
                        if cut > 0:
                            turn.pause()
                        assert turn.computing
        except TurnsClosed:
            assert not turn.computing
            return "closed"
        return "done"

    def check(self, until: float = 0.0) -> None:
        """Nothing is left, and nobody was woken by a time-out after ``until``."""
        assert not any(turn.waiting or turn.computing for side in self.sides for turn in side)
        assert self.world.now <= until, "somebody slept until a deadline: a wake-up is missing"


Parties = Callable[[World, Watched], None]


def steps_and_slices(world: World, watched: Watched) -> None:
    step, proof = watched.inference(), watched.proof()
    world.spawn("inference", lambda: watched.compute(step, times=2))
    world.spawn("proof", lambda: watched.compute(proof, slices=3 if THOROUGH else 2))


def _once_each(world: World, watched: Watched, steps: int, proofs: int) -> None:
    for place, make in enumerate([watched.inference] * steps + [watched.proof] * proofs):
        turn = make()
        world.spawn(f"party {place}", lambda turn=turn: watched.compute(turn))


def several_steps_and_a_proof(world: World, watched: Watched) -> None:
    _once_each(world, watched, 3 if THOROUGH else 2, 1)


def three_steps(world: World, watched: Watched) -> None:
    _once_each(world, watched, 3, 0)


def a_step_and_several_proofs(world: World, watched: Watched) -> None:
    _once_each(world, watched, 1, 3 if THOROUGH else 2)


def two_proofs_with_slices(world: World, watched: Watched) -> None:
    for name, turn in (("proof", watched.proof()), ("other proof", watched.proof())):
        world.spawn(name, lambda turn=turn: watched.compute(turn, slices=3))


def pause_and_resume(world: World, watched: Watched) -> None:
    steps_and_slices(world, watched)

    def pause() -> None:
        watched.turns.pause_inference()
        watched.turns.resume_inference()

    world.spawn("pause", pause)


def cancel_a_step(world: World, watched: Watched) -> None:
    step, proof, other = watched.inference(), watched.proof(), watched.inference()
    world.spawn("inference", lambda: watched.compute(step))
    world.spawn("proof", lambda: watched.compute(proof, slices=2))
    world.spawn("cancelled", lambda: watched.compute(other))
    world.spawn("cancel", other.cancel)


def cancel_a_waiting_step(world: World, watched: Watched) -> None:
    watched.turns.pause_inference()
    step = watched.inference()
    world.spawn("cancelled", lambda: watched.compute(step))
    world.spawn("cancel", step.cancel)


def cancel_a_proof(world: World, watched: Watched) -> None:
    steps_and_slices(world, watched)
    world.spawn("cancel", watched.sides[1][0].cancel)


def close_all(world: World, watched: Watched) -> None:
    step, proof = watched.inference(), watched.proof()
    world.spawn("inference", lambda: watched.compute(step, times=2))
    world.spawn("proof", lambda: watched.compute(proof, slices=2))

    def pause_and_close() -> None:
        watched.turns.pause_inference()
        watched.turns.close()

    world.spawn("close", pause_and_close)


def end_from_outside(world: World, watched: Watched) -> None:
    step, proof = watched.inference(), watched.proof()

    def hang() -> None:
        try:
            with step:
                world.at("device")
        except TurnsClosed:
            pass
        assert not step.computing

    def stop() -> None:
        step.cancel()
        step.end()

    world.spawn("hanging", hang)
    world.spawn("stop", stop)
    world.spawn("proof", lambda: watched.compute(proof, slices=2))


def alone(world: World, watched: Watched) -> None:
    step, proof = watched.inference(), watched.proof()
    world.spawn("inference", lambda: watched.compute(step, times=2))

    def prove() -> None:
        with proof, watched.turns.alone():
            assert not step.computing
            world.at("device")
            assert not step.computing

    world.spawn("proof", prove)


def change_pacing(world: World, watched: Watched) -> None:
    steps_and_slices(world, watched)
    paced = watched.turns.pacing

    def change() -> None:
        watched.turns.pacing = None
        watched.turns.pacing = paced

    world.spawn("change", change)


def free_a_proof(world: World, watched: Watched) -> None:
    """Paced, the proof would wait for a step that waits for the proof."""
    step, proof = watched.inference(), watched.proof()
    proved = Event(world)

    def infer() -> None:
        with step:
            proved.wait()

    def prove() -> None:
        watched.compute(proof, slices=2)
        proved.set()

    def free() -> None:
        watched.turns.pacing = None

    world.spawn("inference", infer)
    world.spawn("proof", prove)
    world.spawn("free", free)


def free_a_step(world: World, watched: Watched) -> None:
    """Where slices are owed, the step would wait for a slice that waits for the step."""
    step, proof = watched.inference(), watched.proof()
    stepped = Event(world)

    def infer() -> None:
        watched.compute(step, times=2)
        stepped.set()

    def prove() -> None:
        with proof:
            stepped.wait()

    def free() -> None:
        watched.turns.pacing = None

    world.spawn("inference", infer)
    world.spawn("proof", prove)
    world.spawn("free", free)


ALL = [
    steps_and_slices,
    three_steps,
    several_steps_and_a_proof,
    a_step_and_several_proofs,
    two_proofs_with_slices,
    pause_and_resume,
    cancel_a_step,
    cancel_a_waiting_step,
    cancel_a_proof,
    close_all,
    end_from_outside,
    alone,
    change_pacing,
    free_a_proof,
    free_a_step,
]


def explored(instruments: Instruments, parties: Parties, turns: Callable[[], Turns]) -> int:
    def scenario(world: World) -> Callable[[], None]:
        watched = Watched(world, turns())
        parties(world, watched)
        return watched.check

    return explore(instruments, scenario)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parties", ALL, ids=lambda parties: parties.__name__)
def test_turns(instruments: Instruments, record_property: Record, parties: Parties, mode: str) -> None:
    record_property("interleavings", explored(instruments, parties, lambda: turns_of(mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("early_ticks", [1, 2])
def test_turns_while_time_passes(
    instruments: Instruments, record_property: Record, early_ticks: int, mode: str
) -> None:
    """Caps and lingering end at any point between others' operations."""

    def scenario(world: World) -> Callable[[], None]:
        watched = Watched(world, turns_of(mode, share=0.4, max_wait=2.0, linger=1.0))
        step, proof = watched.turns.inference(lambda: True), watched.proof()
        watched.sides[0].append(step)
        world.spawn("inference", lambda: watched.compute(step, times=2))
        world.spawn("proof", lambda: watched.compute(proof, slices=2))
        return lambda: watched.check(LONG / 2)

    record_property("interleavings", explore(instruments, scenario, early_ticks=early_ticks))


class Owing(Turns):
    """Turns that owe more than any scenario pays, and count how often a step waits for that."""

    waits = 0

    def __init__(self) -> None:
        super().__init__(Pacing(share=0.25, max_wait_seconds=LONG, linger_seconds=0.0, paced=False))
        self._owed_seconds = self._due_seconds = LONG

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        seconds = super()._seconds_to_wait(turn, now)
        if seconds != 0 and turn._side is self._steps and not (self._paused or self._alone or self._steps.computing):
            type(self).waits += 1
        return seconds


@pytest.mark.parametrize("parties", ALL, ids=lambda parties: parties.__name__)
def test_free_turns_whose_steps_wait_for_slices(
    instruments: Instruments, record_property: Record, monkeypatch: pytest.MonkeyPatch, parties: Parties
) -> None:
    monkeypatch.setattr(Owing, "waits", 0)
    record_property("interleavings", explored(instruments, parties, Owing))
    if parties not in (three_steps, two_proofs_with_slices, cancel_a_waiting_step):  # one side alone
        assert Owing.waits > 0


class OwingInSilence(Owing):
    """Does not tell a step that waits for a slice that the slice has ended."""

    def _give_back(self, turn: Turn) -> float:
        with self._condition:
            if turn.computing:
                turn._side.computing = None
        return 0.0


def test_a_slice_that_ends_in_silence_is_found(instruments: Instruments) -> None:
    with pytest.raises(AssertionError, match=r"nothing can wake|a wake-up is missing"):
        explored(instruments, steps_and_slices, OwingInSilence)


class OwingInSilentPacing(Owing):
    """Does not tell a step that waits for a slice that the pacing has changed."""

    @property
    def pacing(self) -> Pacing | None:
        return self._pacing

    @pacing.setter
    def pacing(self, pacing: Pacing | None) -> None:
        with self._condition:
            self._pacing = pacing


def test_a_pacing_that_changes_in_silence_is_found_by_a_step(instruments: Instruments) -> None:
    with pytest.raises(AssertionError, match="a wake-up is missing"):
        explored(instruments, free_a_step, OwingInSilentPacing)


class SilentEnd(Turns):
    """Tells nobody that the device is free."""

    def _give_back(self, turn: Turn) -> None:
        with self._condition:
            if turn.computing:
                turn._side.computing = None


class SilentCancel(Turns):
    """Does not wake a turn that is cancelled."""

    def _cancel(self, turn: Turn) -> None:
        with self._condition:
            turn._cancelled = True


class SilentPacing(Turns):
    """Tells nobody that the pacing has changed."""

    @property
    def pacing(self) -> Pacing | None:
        return self._pacing

    @pacing.setter
    def pacing(self, pacing: Pacing | None) -> None:
        with self._condition:
            self._pacing = pacing


class LooksBeforeTheLock(Turns):
    """Looks whether the device is free in one critical section, and takes it in another."""

    def _take(self, turn: Turn) -> None:
        while True:
            with self._condition:
                free = turn._side.computing is None
                if not free:
                    self._condition.wait()
            if free:
                break
        with self._condition:
            turn._side.computing = turn
            turn._since = 0.0


class LastComeFirstServed(Turns):
    """Lets whoever came last go first."""

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        turn._side.waiting.reverse()
        try:
            return super()._seconds_to_wait(turn, now)
        finally:
            turn._side.waiting.reverse()


class DeafToPausing(Turns):
    """Lets steps begin while inference is paused."""

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        paused, self._paused = self._paused, False
        try:
            return super()._seconds_to_wait(turn, now)
        finally:
            self._paused = paused


@pytest.mark.parametrize(
    ("broken", "parties", "found"),
    [
        (SilentEnd, steps_and_slices, "nothing can wake|a wake-up is missing"),
        (SilentCancel, cancel_a_waiting_step, "nothing can wake|a wake-up is missing"),
        (SilentPacing, free_a_proof, "a wake-up is missing"),
        (LooksBeforeTheLock, several_steps_and_a_proof, "two compute at once"),
        (LastComeFirstServed, three_steps, "not first come first served"),
        (DeafToPausing, pause_and_resume, "granted while paused"),
    ],
)
def test_broken_turns_are_found(instruments: Instruments, broken: type[Turns], parties: Parties, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        explored(instruments, parties, lambda: broken(Pacing(share=0.25, max_wait_seconds=LONG, linger_seconds=0.0)))
