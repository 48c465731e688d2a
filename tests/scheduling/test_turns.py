"""Turns: who computes when, on a simulated clock; and real threads that meet there."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaving import Instruments, World, simulate

from poc_kernels.scheduling import Pacing, Turn, Turns, TurnsClosed
from poc_kernels.scheduling import turns as turns_module

TIMEOUT = 10


class Timeline:
    """Parties on one `Turns`, and when each began and ended to compute."""

    def __init__(self, world: World, turns: Turns) -> None:
        self.world, self.turns = world, turns
        self.spans: list[tuple[str, float, float]] = []
        self.waits: list[float] = []
        self.closed: list[str] = []

    def party(self, name: str, turn: Turn, *seconds: float, at: float = 0.0) -> None:
        """From ``at`` on, take ``turn`` once for each of ``seconds``, and compute for that long."""

        def compute() -> None:
            self.world.sleep(at)
            try:
                for length in seconds:
                    asked = self.world.now
                    with turn:
                        self.waits.append(self.world.now - asked)
                        self._compute(name, length)
            except TurnsClosed:
                self.closed.append(name)

        self.world.spawn(name, compute)

    def sliced(self, name: str, turn: Turn, *seconds: float, at: float = 0.0) -> None:
        """From ``at`` on, take ``turn`` once, for slices of ``seconds``."""

        def compute() -> None:
            self.world.sleep(at)
            try:
                with turn:
                    for place, length in enumerate(seconds):
                        if place > 0:
                            assert turn.pause() == pytest.approx(seconds[place - 1])
                        self._compute(name, length)
            except TurnsClosed:
                self.closed.append(name)

        self.world.spawn(name, compute)

    def call(self, at: float, function: Callable[[], object]) -> None:
        """Call ``function`` at that time."""

        def later() -> None:
            self.world.sleep(at)
            function()

        self.world.spawn(f"call {self.world.name_of('call')}", later)

    def _compute(self, name: str, seconds: float) -> None:
        began = self.world.now
        self.world.sleep(seconds)
        self.spans.append((name, began, self.world.now))


def run(instruments: Instruments, turns: Callable[[], Turns], setup: Callable[[Timeline], None]) -> Timeline:
    """What became of the parties that ``setup`` makes."""
    made: list[Timeline] = []

    def scenario(world: World) -> Callable[[], None]:
        made.append(Timeline(world, turns()))
        setup(made[0])
        return lambda: None

    simulate(instruments, scenario)
    return made[0]


def paced(
    share: float = 0.1,
    cap: float = 1000.0,
    linger: float = 0.0,
    paced: bool = True,
) -> Turns:
    return Turns(Pacing(share=share, max_wait_seconds=cap, linger_seconds=linger, paced=paced))


def begins(timeline: Timeline, name: str = "proof") -> list[float]:
    """When each step or slice of that name began."""
    return [began for each, began, _ in timeline.spans if each == name]


# ---- two sides ----


def test_each_side_computes_in_order_and_both_at_once(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        proof, inference = timeline.turns.proof, timeline.turns.inference
        timeline.party("first", proof(), 10)
        timeline.party("proof 1", proof(), 1, at=1)
        timeline.party("proof 2", proof(), 1, at=2)
        timeline.party("inference 1", inference(), 2, at=3)
        timeline.party("inference 2", inference(), 1, at=4)

    assert run(instruments, paced, setup).spans == [
        ("inference 1", 3, 5),
        ("inference 2", 5, 6),
        ("first", 0, 10),
        ("proof 1", 10, 11),
        ("proof 2", 11, 12),
    ]


def test_a_slice_that_is_not_owed_waits_for_a_step_that_runs(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 2, 2, 2)
        timeline.party("inference", timeline.turns.inference(), 2, at=1)

    assert run(instruments, paced, setup).spans == [
        ("proof", 0, 2),
        ("inference", 1, 3),
        ("proof", 3, 5),
        ("proof", 5, 7),
    ]


def test_a_pause_goes_behind_who_waits(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("a", timeline.turns.proof(), 1, 1)
        timeline.sliced("b", timeline.turns.proof(), 1, 1, at=0.5)

    assert run(instruments, paced, setup).spans == [("a", 0, 1), ("b", 1, 2), ("a", 2, 3), ("b", 3, 4)]


def test_a_proof_waits_no_longer_than_the_cap(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 20)
        timeline.party("proof", timeline.turns.proof(), 2, at=1.5)

    assert begins(run(instruments, lambda: paced(cap=5.0), setup)) == [6.5]


def test_a_cap_of_nothing_never_lets_a_slice_wait(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 3)
        timeline.sliced("proof", timeline.turns.proof(), *[1] * 3, at=0.5)

    assert begins(run(instruments, lambda: paced(cap=0.0), setup)) == [0.5, 1.5, 2.5]


@pytest.mark.parametrize(("busy", "cancelled", "begin"), [(True, False, 2.25), (False, False, 2.0), (True, True, 2.0)])
def test_the_next_step_is_expected_for_a_while(
    instruments: Instruments, busy: bool, cancelled: bool, begin: float
) -> None:
    def setup(timeline: Timeline) -> None:
        turn = timeline.turns.inference(lambda: busy)
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", turn, 1, at=1)
        timeline.party("proof", timeline.turns.proof(), 1, at=1.5)
        if cancelled:
            timeline.call(1.75, turn.cancel)

    spans = run(instruments, lambda: paced(linger=0.25), setup).spans
    assert spans == [("first", 0, 1), ("inference", 1, 2), ("proof", begin, begin + 1)]


def test_a_step_that_comes_while_it_is_expected_goes_first(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turn = timeline.turns.inference(lambda: True)
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", turn, 1, at=1)
        timeline.party("next", turn, 1, at=2.125)
        timeline.party("proof", timeline.turns.proof(), 1, at=1.5)

    spans = run(instruments, lambda: paced(linger=0.25), setup).spans[1:]
    assert spans == [("inference", 1, 2), ("next", 2.125, 3.125), ("proof", 3.375, 4.375)]


def test_an_owed_slice_does_not_wait_for_a_step_that_is_expected(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 1, 5, 1, 1, 1)
        timeline.party("inference", timeline.turns.inference(lambda: True), 4, at=1.5)

    # The step owes 2.7 s at a share of 0.4, which two slices of 1 s pay once the second has ended. The last waits.
    assert begins(run(instruments, lambda: paced(share=0.4, linger=100.0), setup)) == [0, 1, 6, 7, 105.5]


def test_slices_while_inference_is_idle_are_not_charged(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), *[1] * 10, *[1] * 3)
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 6, at=9.5)

    # A slice of 1 s for every 1.5 s of steps.
    timeline = run(instruments, lambda: paced(share=0.4, linger=100.0), setup)
    assert begins(timeline)[10:] == pytest.approx([11, 12.5, 14], abs=1e-3)


def test_slices_while_inference_is_paused_are_not_charged(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.call(0.5, timeline.turns.pause_inference)
        timeline.party("inference", timeline.turns.inference(), 5, at=1)
        timeline.sliced("proof", timeline.turns.proof(), *[1] * 6)
        timeline.call(4.5, timeline.turns.resume_inference)

    # A slice of 1 s for every 1.5 s of the step.
    assert begins(run(instruments, lambda: paced(share=0.4), setup)) == pytest.approx([0, 1, 2, 3, 4, 6], abs=1e-3)


def test_pausing_lets_a_step_end_and_none_begin(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        timeline.party("inference", turns.inference(lambda: True), 2, 1)
        timeline.call(1, turns.pause_inference)
        timeline.call(1.5, lambda: seen.append(turns.inference_paused))
        timeline.sliced("proof", turns.proof(), 1, 1, 1, at=1.25)
        timeline.call(4.5, turns.resume_inference)
        timeline.call(4.75, lambda: seen.append(turns.inference_paused))

    seen: list[bool] = []
    timeline = run(instruments, lambda: paced(linger=100.0), setup)
    assert begins(timeline, "inference") == [0, 4.5]
    assert begins(timeline) == [1.25, 2.25, 3.25]
    assert seen == [True, False]


def test_closing_wakes_waiters_and_lets_who_computes_end(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 2, 1)
        timeline.party("other", timeline.turns.proof(), 1, at=0.5)
        timeline.party("inference", timeline.turns.inference(), 1.25, at=0.5)
        timeline.party("other inference", timeline.turns.inference(), 1, at=0.75)
        timeline.call(1, timeline.turns.close)
        timeline.party("late", timeline.turns.inference(), 1, at=3)

    timeline = run(instruments, paced, setup)
    assert timeline.spans == [("inference", 0.5, 1.75), ("proof", 0, 2)]
    assert timeline.closed == ["other", "other inference", "proof", "late"]
    assert timeline.turns.closed


def test_cancelling_wakes_the_waiter_alone(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        cancelled = turns.inference()
        timeline.party("first", turns.inference(), 2)
        timeline.party("cancelled", cancelled, 1, at=0.5)
        timeline.party("other", turns.inference(), 1, at=0.75)
        timeline.call(1, cancelled.cancel)
        timeline.party("again", cancelled, 1, at=5)

    timeline = run(instruments, paced, setup)
    assert timeline.spans == [("first", 0, 2), ("other", 2, 3)]
    assert timeline.closed == ["cancelled", "again"]


def test_a_turn_that_hangs_can_be_ended_by_another_thread(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        hanging = turns.inference()
        timeline.party("hanging", hanging, 10)
        timeline.party("following", turns.inference(), 12, at=0.5)
        timeline.call(2, hanging.end)
        timeline.call(2, hanging.end)
        timeline.party("third", turns.inference(), 1, at=3)

    # Its own late end, at 10, does not end the step that computes then.
    spans = run(instruments, paced, setup).spans
    assert spans == [("hanging", 0, 10), ("following", 2, 14), ("third", 14, 15)]


# ---- paced ----


def test_a_paced_step_never_waits(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("proof", timeline.turns.proof(), 10)
        timeline.party("inference", timeline.turns.inference(), 1, 1, 1, at=1)

    timeline = run(instruments, lambda: paced(cap=0.0), setup)
    assert timeline.waits == [0, 0, 0, 0]


def test_paced_slices_wait_until_a_step_owes_them(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 40)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, 1, 1, 1, at=1)

    timeline = run(instruments, lambda: paced(), setup)
    # The first is taken for 1 ms, which the step owes 9 ms after the proof came; then a slice of 1 s is owed every 9 s.
    # When the step is over, there is nothing to wait for.
    assert begins(timeline) == pytest.approx([1.009, 19, 28, 37, 40], abs=1e-3)


def test_what_a_step_owed_before_a_proof_came_is_not_counted(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 1000, 1)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, at=900)

    timeline = run(instruments, lambda: paced(), setup)
    assert begins(timeline) == pytest.approx([900.009, 918], abs=1e-3)


def test_half_the_device_is_a_slice_always(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 30)
        timeline.sliced("proof", timeline.turns.proof(), *[0.7] * 20, at=0.5)

    timeline = run(instruments, lambda: paced(0.5, linger=100.0), setup)
    proofs = [span for span in timeline.spans if span[0] == "proof"]
    assert proofs[0][1] == 0.5
    assert all(before[2] == after[1] for before, after in itertools.pairwise(proofs))
    assert timeline.waits[1:] == [0] * 29


def test_the_cap_ends_within_a_step(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 100)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, at=2)

    timeline = run(instruments, lambda: paced(0.001, cap=5.0), setup)
    assert begins(timeline) == pytest.approx([3, 9], abs=1e-2)


# ---- free, and without pacing ----


def test_free_slices_run_while_steps_do_and_nobody_waits(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 5)
        timeline.party("proof", timeline.turns.proof(), *[0.5] * 10, at=0.25)

    # Slices get more than the share: half of it would be enough.
    timeline = run(instruments, lambda: paced(0.25, linger=100.0, paced=False), setup)
    assert timeline.waits == [0] * 15
    assert max(end for *_, end in timeline.spans) == 5.25


def test_a_step_waits_for_a_slice_that_is_owed(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 15, at=0.5)
        timeline.sliced("proof", timeline.turns.proof(), 1, 20)

    # After the first, slices are taken to last 1 s, which 9 steps of 1 s owe. However long the second slice takes, no
    # step waits for it before, and then each for a slice as they were and twice what a step owes.
    timeline = run(instruments, lambda: paced(cap=1.0, paced=False), setup)
    assert timeline.waits[:9] == [0] * 9
    longest = 1 + 2 / 9
    assert timeline.waits[9:] == pytest.approx([longest] * 5 + [21 - (9.5 + 5 * (longest + 1))], abs=0.001)


def test_slices_that_were_not_owed_are_paid_back_by_one_at_most(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 30)
        timeline.sliced("proof", timeline.turns.proof(), *[0.5] * 20, 100, at=0.25)

    # 20 slices took 10 s, of which steps owed 1 s. From 10.25 on they owe 0.5 s for the last of these, and 0.5 s for
    # the next: nine steps.
    waits = run(instruments, lambda: paced(paced=False), setup).waits
    assert next(place for place, wait in enumerate(waits) if wait > 0) == 20


def test_no_step_waits_long_for_a_slice_that_others_keep_from_the_cores(instruments: Instruments) -> None:
    computed = 0.0

    def setup(timeline: Timeline) -> None:
        def prove() -> None:
            nonlocal computed
            with contextlib.suppress(TurnsClosed), timeline.turns.proof(lambda: computed) as turn:
                while True:
                    timeline.world.sleep(0.2)
                    computed += 0.002
                    turn.pause()

        timeline.world.spawn("proof", prove)
        timeline.party("inference", timeline.turns.inference(lambda: True), *[0.01] * 500, at=0.5)
        timeline.call(10, timeline.turns.close)

    timeline = run(instruments, lambda: paced(paced=False), setup)
    assert len(timeline.waits) == 500
    assert 0.002 < max(timeline.waits) < 0.002 + 2 * 0.01 / 9 + 0.001


def test_without_pacing_nobody_waits_for_the_other_side(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 5)
        timeline.party("proof", timeline.turns.proof(), *[1] * 5, at=0.5)

    timeline = run(instruments, lambda: Turns(None), setup)
    assert timeline.waits == [0] * 10
    assert max(end for *_, end in timeline.spans) == 5.5


def test_alone_waits_for_the_step_that_runs_and_lets_none_begin(instruments: Instruments) -> None:
    inside: list[float] = []

    def setup(timeline: Timeline) -> None:
        turns, turn = timeline.turns, timeline.turns.proof()

        def prove() -> None:
            timeline.world.sleep(0.5)
            with turn, turns.alone():
                inside.append(timeline.world.now)
                timeline.world.sleep(3)
                inside.append(timeline.world.now)

        timeline.party("inference", turns.inference(lambda: True), *[1] * 50)
        timeline.world.spawn("proof", prove)

    spans = run(instruments, lambda: Turns(None), setup).spans
    # However inference follows step on step: one step of it, and no more, is waited for.
    assert inside == [1, 4]
    assert spans[:3] == [("inference", 0, 1), ("inference", 4, 5), ("inference", 5, 6)]


def test_who_waits_to_be_alone_is_woken_by_the_end(instruments: Instruments) -> None:
    ended: list[float] = []

    def setup(timeline: Timeline) -> None:
        turn = timeline.turns.proof()

        def prove() -> None:
            with pytest.raises(TurnsClosed), turn, timeline.turns.alone():
                raise AssertionError("a step runs")
            ended.append(timeline.world.now)

        timeline.party("inference", timeline.turns.inference(), 5)
        timeline.world.spawn("proof", prove)
        timeline.call(2, timeline.turns.close)

    run(instruments, lambda: Turns(None), setup)
    assert ended == [2]


# ---- a pacing that changes ----


def change(timeline: Timeline, at: float, pacing: Pacing | None) -> None:
    """Set the pacing at that time."""
    timeline.call(at, lambda: setattr(timeline.turns, "pacing", pacing))


def like(share: float = 0.1, cap: float = 1000.0, free: bool = False) -> Pacing:
    return Pacing(share=share, max_wait_seconds=cap, linger_seconds=0.0, paced=not free)


@pytest.mark.parametrize(
    ("pacing", "begin"),
    [
        (None, 5),
        (like(free=True), 5),
        (like(0.5), 5),
        (like(cap=2.0), 5),  # it has waited for longer
        (like(cap=4.0), 6),  # since it came, not since the pacing changed
        (like(0.25), 8),  # the step owes 1 s in the 3 s from then on
    ],
)
def test_a_proof_that_waits_looks_again(instruments: Instruments, pacing: Pacing | None, begin: float) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", timeline.turns.inference(), 100, at=1)
        timeline.party("proof", timeline.turns.proof(), 1, at=2)
        change(timeline, 5, pacing)

    timeline = run(instruments, lambda: paced(0.001), setup)
    assert begins(timeline) == pytest.approx([begin], abs=1e-3)
    assert timeline.turns.pacing is pacing


@pytest.mark.parametrize(("pacing", "later"), [(None, 0), (like(), 0), (like(free=True), 1 + 2 / 9)])
def test_a_step_that_waits_looks_again(instruments: Instruments, pacing: Pacing | None, later: float) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 20, at=0.5)
        timeline.sliced("proof", timeline.turns.proof(), 1, 30)
        change(timeline, 10, pacing)

    # From 9.5 on a step would wait for the slice that runs, which nine steps owe. Nothing is owed under the new pacing
    # until nine more steps have run.
    waits = run(instruments, lambda: paced(paced=False), setup).waits
    assert waits == pytest.approx([0] * 9 + [0.5] + [0] * 8 + [later] * 2, abs=1e-3)


@pytest.mark.parametrize("old", [None, like(0.001), like(0.5), like(0.9), like(0.1, free=True)])
def test_nothing_is_owed_under_a_new_pacing(instruments: Instruments, old: Pacing | None) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 1, 5, 1)
        timeline.party("inference", timeline.turns.inference(), 100, at=1.5)
        change(timeline, 5, like(0.25))

    # Slices take 1.25 s, which the step owes 3.75 s after the change, whatever it owed before.
    assert begins(run(instruments, lambda: Turns(old), setup)) == pytest.approx([0, 1, 8.75], abs=1e-3)


def test_a_slice_that_runs_is_charged_to_the_new_pacing(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 100)
        timeline.sliced("proof", timeline.turns.proof(), 6, 1, at=1)
        change(timeline, 4, like(0.25))

    # From 4 on the step owes 1 s in 3 s: at 40 the 6 s of the slice that ran then, and those of the next.
    assert begins(run(instruments, lambda: Turns(None), setup)) == pytest.approx([1, 40], abs=1e-3)


def test_from_paced_to_free_and_back(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 40)
        timeline.party("proof", timeline.turns.proof(), *[0.75] * 40, at=0.5)
        change(timeline, 10, like(free=True))
        change(timeline, 20, like())

    timeline = run(instruments, paced, setup)
    assert begins(timeline, "inference") == list(range(40))
    # Paced again, the step owes after 20 what the slice took that ran then, and the next.
    assert begins(timeline)[:17] == pytest.approx(
        [0.509, *itertools.islice(itertools.count(10, 0.75), 14), 33.5, 40], abs=1e-3
    )


# ---- the guaranteed share ----


class Device:
    """What steps and slices compute on; where priorities starve slices, one stands still while a step computes."""

    def __init__(self, timeline: Timeline, starves: bool) -> None:
        self.timeline, self.starves = timeline, starves
        self.computed = {"inference": 0.0, "proof": 0.0}
        self.behind: list[float] = []
        self._steps = False

    def step(self, seconds: float) -> None:
        self._steps = True
        self.timeline.world.sleep(seconds)
        self._steps = False
        self.computed["inference"] += seconds

    def slice(self, seconds: float) -> None:
        while seconds > 1e-9:
            part = min(seconds, 0.001)
            before = self._steps
            self.timeline.world.sleep(part)
            if not (self.starves and (before or self._steps)):
                seconds -= part
                self.computed["proof"] += part

    def clock(self) -> float:
        return self.computed["proof"]


def play(
    turns: Callable[[], Turns],
    steps: list[float],
    slices: Iterator[float],
    starves: bool = False,
    then: Pacing | None = None,
) -> Device:
    """Compute step after step while slices never end; ``then`` is the pacing of the second half of the steps."""
    made: list[Device] = []

    def setup(timeline: Timeline) -> None:
        device = Device(timeline, starves)
        made.append(device)

        def infer() -> None:
            turn = timeline.turns.inference(lambda: True)
            before = dict(device.computed)
            for place, seconds in enumerate(steps):
                if then is not None and place == len(steps) // 2:
                    timeline.turns.pacing = then
                    before = dict(device.computed)
                asked = timeline.world.now
                with turn:
                    timeline.waits.append(timeline.world.now - asked)
                    device.step(seconds)
                rate = timeline.turns._pacing.owed_per_second
                inference, proof = (device.computed[side] - before[side] for side in ("inference", "proof"))
                device.behind.append(inference * rate - proof)
            timeline.turns.close()

        def prove() -> None:
            try:
                with timeline.turns.proof(device.clock if starves else None) as turn:
                    for seconds in slices:
                        device.slice(seconds)
                        turn.pause()
            except TurnsClosed:
                timeline.closed.append("proof")

        timeline.world.spawn("proof", prove)
        timeline.world.spawn("inference", infer)

    with pytest.MonkeyPatch.context() as monkeypatch:
        instruments = Instruments()
        instruments.patch(monkeypatch, turns_module)
        run(instruments, turns, setup)
    assert made[0].timeline.closed == ["proof"]
    return made[0]


MODES = {"paced": True, "starved": False}


@pytest.mark.parametrize("mode", MODES)
@given(
    share=st.sampled_from([0.05, 0.1, 0.25, 0.4]),
    slice_seconds=st.sampled_from([0.005, 0.02, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10)
def test_the_share_is_kept_while_both_sides_want_the_device(
    mode: str, share: float, slice_seconds: float, seed: int
) -> None:
    source = random.Random(seed)
    steps = [source.uniform(0.01, 0.02) for _ in range(300)]
    slices = iter(lambda: source.uniform(slice_seconds, 2 * slice_seconds), None)
    device = play(lambda: paced(share, linger=0.005, paced=MODES[mode]), steps, slices, starves=mode == "starved")
    rate, longest_slice, longest_step = share / (1 - share), 2 * slice_seconds, max(steps)
    # At every time, except for a slice that is not owed yet or is under way, and what is not paid at one go.
    assert max(device.behind) <= 2 * longest_slice + 2 * longest_step * rate + 1e-9
    # And no more than it, except for slices that ran before the first step and the one that begins it.
    if mode != "starved":
        assert min(device.behind) >= -3 * longest_slice
    # What is owed is paid at one go, after the slice that runs.
    if mode == "paced":
        assert max(device.timeline.waits) == 0
    else:
        assert max(device.timeline.waits) <= 2 * longest_slice + 2 * longest_step * rate + 0.002


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("first", "then"), [(0.05, 0.4), (0.4, 0.05), (0.9, 0.1), (0.1, 0.1)])
def test_a_new_share_is_kept_from_then_on(mode: str, first: float, then: float) -> None:
    source = random.Random(1)
    steps = [source.uniform(0.01, 0.02) for _ in range(600)]
    slices = iter(lambda: source.uniform(0.005, 0.01), None)
    pacing = Pacing(share=then, max_wait_seconds=1000.0, paced=MODES[mode])
    device = play(lambda: paced(first, linger=0.005, paced=MODES[mode]), steps, slices, mode == "starved", pacing)
    rate, behind = then / (1 - then), device.behind[300:]
    # One slice more than above: the one that ran when it changed.
    assert max(behind) <= 3 * 0.01 + 2 * max(steps) * rate + 1e-9
    if mode != "starved":
        assert min(behind) >= -3 * 0.01
    waits = device.timeline.waits[300:]
    assert max(waits) <= (0 if mode == "paced" else 2 * 0.01 + 2 * max(steps) * rate + 0.002)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize(("every", "long_step"), [(10, 0.3), (16, 0.5), (30, 1.0)])
def test_what_long_steps_owe_is_paid_and_not_at_one_go(mode: str, share: float, every: int, long_step: float) -> None:
    steps = [long_step if place % every == every - 1 else 0.01 for place in range(20 * every)]
    device = play(lambda: paced(share, paced=MODES[mode]), steps, itertools.repeat(0.002), starves=mode == "starved")
    rate = share / (1 - share)
    assert device.computed["proof"] >= 0.95 * rate * sum(steps) - long_step * rate
    # The next token waits for little of what a long step owes.
    mean_step = 0.01 + 2 * long_step / 16
    assert max(device.timeline.waits) <= 2 * 0.002 + 2 * rate * mean_step + 0.002


# ---- threads, errors ----


def test_real_threads_of_a_side_compute_one_at_a_time_and_none_starves() -> None:
    turns = Turns(Pacing(max_wait_seconds=0.001))
    inside, maximum = [0, 0], [0, 0]

    def work(side: int) -> None:
        turn = turns.proof() if side else turns.inference()
        for _ in range(100):
            with turn:
                inside[side] += 1
                maximum[side] = max(maximum[side], inside[side])
                inside[side] -= 1

    threads = [threading.Thread(target=work, args=(side,), daemon=True) for side in (0, 1) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert (maximum, inside) == ([1, 1], [0, 0])


@pytest.mark.parametrize("greedy", ["inference", "proof"])
def test_a_greedy_side_does_not_starve_the_other(greedy: str) -> None:
    turns = Turns(Pacing(max_wait_seconds=0.001))
    stop = threading.Event()

    def take_again_and_again() -> None:
        turn = getattr(turns, greedy)()
        while not stop.is_set():
            with turn:
                pass

    def take_some() -> None:
        other = getattr(turns, "proof" if greedy == "inference" else "inference")()
        for _ in range(20):
            with other:
                pass

    threads = [threading.Thread(target=take_again_and_again, daemon=True) for _ in range(2)]
    patient = threading.Thread(target=take_some, daemon=True)
    for thread in (*threads, patient):
        thread.start()
    patient.join(TIMEOUT)
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in (*threads, patient))


def test_a_turn_is_not_taken_twice() -> None:
    turns = Turns()
    turn = turns.inference()
    with turn, pytest.raises(RuntimeError, match="taken already"), turn:
        pass
    assert not turn.computing
    with turns.proof() as proof:
        assert proof.computing


def test_an_error_inside_gives_the_device_back() -> None:
    turns = Turns()
    for make in (turns.inference, turns.proof):
        with pytest.raises(KeyError), make():
            raise KeyError
    with turns.proof():
        pass


def test_a_pause_goes_inside() -> None:
    turns = Turns()
    with pytest.raises(RuntimeError, match=r"does not have the device: pause\(\) goes inside its with block"):
        turns.proof().pause()


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\), got {share}"):
        Pacing(share=share)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["max_wait_seconds", "linger_seconds"])
def test_times_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
        Pacing(**{name: value})


def test_seconds_owed_are_those_of_the_share() -> None:
    assert [Pacing(share=share).owed_per_second for share in (0.5, 0.75)] == [1, 3]


def test_a_pacing_is_a_pacing() -> None:
    with pytest.raises(TypeError, match="pacing must be a Pacing or None, got str"):
        Turns().pacing = "free"  # type: ignore[assignment]
