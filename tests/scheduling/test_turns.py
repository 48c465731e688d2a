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
        """From ``at`` on, take ``turn`` once for each of ``seconds``, and compute for so long."""

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
    concurrent: bool = False,
    paced: bool = True,
) -> Turns:
    pacing = Pacing(share=share, max_wait_seconds=cap, linger_seconds=linger, paced=paced)
    return Turns(pacing, concurrent=concurrent)


# ---- one device ----


def test_inference_goes_first_and_each_side_in_order(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        proof, inference = timeline.turns.proof, timeline.turns.inference
        timeline.party("first", proof(), 10)
        timeline.party("proof 1", proof(), 1, at=1)
        timeline.party("proof 2", proof(), 1, at=2)
        timeline.party("inference 1", inference(), 1, at=3)
        timeline.party("inference 2", inference(), 1, at=4)

    assert run(instruments, paced, setup).spans == [
        ("first", 0, 10),
        ("inference 1", 10, 11),
        ("inference 2", 11, 12),
        ("proof 1", 12, 13),
        ("proof 2", 13, 14),
    ]


def test_a_slice_gives_way_to_a_step_that_waits_and_is_not_owed(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 2, 2, 2)
        timeline.party("inference", timeline.turns.inference(), 1, at=1)

    assert run(instruments, paced, setup).spans == [
        ("proof", 0, 2),
        ("inference", 2, 3),
        ("proof", 3, 5),
        ("proof", 5, 7),
    ]


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_pause_goes_behind_who_waits(instruments: Instruments, concurrent: bool) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("a", timeline.turns.proof(), 1, 1)
        timeline.sliced("b", timeline.turns.proof(), 1, 1, at=0.5)

    timeline = run(instruments, lambda: paced(concurrent=concurrent), setup)
    assert timeline.spans == [("a", 0, 1), ("b", 1, 2), ("a", 2, 3), ("b", 3, 4)]


def test_a_proof_is_held_back_no_longer_than_the_cap(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 20)
        timeline.party("proof", timeline.turns.proof(), 2, at=1.5)

    timeline = run(instruments, lambda: paced(cap=5.0), setup)
    assert [span for span in timeline.spans if span[0] == "proof"] == [("proof", 7, 9)]  # the step that ran from 6 ends


def test_the_first_slice_is_owed_after_a_step(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 5)
        timeline.party("proof", timeline.turns.proof(), 1, at=0.5)

    spans = run(instruments, lambda: paced(linger=100.0), setup).spans
    assert [name for name, *_ in spans] == ["inference", "proof"] + ["inference"] * 4


def test_a_cap_of_nothing_takes_turns(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 3)
        timeline.sliced("proof", timeline.turns.proof(), *[1] * 3, at=0.5)

    # The least latency for proofs: whatever waits when a step ends goes first.
    timeline = run(instruments, lambda: paced(cap=0.0), setup)
    assert [name for name, *_ in timeline.spans] == ["inference"] + ["proof"] * 3 + ["inference"] * 2


@pytest.mark.parametrize(("busy", "cancelled", "begins"), [(True, False, 2.25), (False, False, 2.0), (True, True, 2.0)])
def test_the_next_step_is_expected_for_a_while(
    instruments: Instruments, busy: bool, cancelled: bool, begins: float
) -> None:
    def setup(timeline: Timeline) -> None:
        turn = timeline.turns.inference(lambda: busy)
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", turn, 1, at=0.5)
        timeline.party("proof", timeline.turns.proof(), 1, at=1.5)
        if cancelled:
            timeline.call(1.75, turn.cancel)

    spans = run(instruments, lambda: paced(linger=0.25), setup).spans
    assert spans == [("first", 0, 1), ("inference", 1, 2), ("proof", begins, begins + 1)]


def test_a_step_that_comes_while_it_is_expected_goes_first(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turn = timeline.turns.inference(lambda: True)
        timeline.party("first", timeline.turns.proof(), 1)
        timeline.party("inference", turn, 1, at=0.5)
        timeline.party("next", turn, 1, at=2.125)
        timeline.party("proof", timeline.turns.proof(), 1, at=1.5)

    spans = run(instruments, lambda: paced(linger=0.25), setup).spans[1:]
    assert spans == [("inference", 1, 2), ("next", 2.125, 3.125), ("proof", 3.375, 4.375)]


def test_an_owed_slice_does_not_wait_for_a_step_that_is_expected(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 1, 1)
        timeline.party("inference", timeline.turns.inference(lambda: True), 2, at=0.5)

    # A share of 1/2: the step of 2 s owes more than the slice of 1 s.
    spans = run(instruments, lambda: paced(share=0.5, linger=100.0), setup).spans
    assert spans == [("proof", 0, 1), ("inference", 1, 3), ("proof", 3, 4)]


def test_slices_while_inference_is_idle_are_not_charged(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), *[1] * 10, *[1] * 3)
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 4, at=9.5)

    spans = run(instruments, lambda: paced(share=0.5, linger=100.0), setup).spans
    assert [name for name, *_ in spans[10:]] == ["inference", "proof"] * 3 + ["inference"]


def test_holding_lets_a_step_end_and_none_begin(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        timeline.party("inference", turns.inference(lambda: True), 2, 1)
        timeline.call(1, turns.pause_inference)
        timeline.call(1.5, lambda: held.append(turns.inference_paused))
        timeline.sliced("proof", turns.proof(), 1, 1, 1, at=1)
        timeline.call(4.5, turns.resume_inference)
        timeline.call(4.75, lambda: held.append(turns.inference_paused))

    held: list[bool] = []
    spans = run(instruments, lambda: paced(linger=100.0), setup).spans
    assert spans == [("inference", 0, 2), ("proof", 2, 3), ("proof", 3, 4), ("proof", 4, 5), ("inference", 5, 6)]
    assert held == [True, False]


def test_closing_wakes_waiters_and_lets_who_computes_end(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.sliced("proof", timeline.turns.proof(), 2, 1)
        timeline.party("other", timeline.turns.proof(), 1, at=0.5)
        timeline.party("inference", timeline.turns.inference(), 1, at=0.5)
        timeline.call(1, timeline.turns.close)
        timeline.party("late", timeline.turns.inference(), 1, at=3)

    timeline = run(instruments, paced, setup)
    assert timeline.spans == [("proof", 0, 2)]
    assert timeline.closed == ["other", "inference", "proof", "late"]
    assert timeline.turns.closed


def test_cancelling_wakes_the_waiter_alone(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        cancelled = turns.inference()
        timeline.party("proof", turns.proof(), 2)
        timeline.party("cancelled", cancelled, 1, at=0.5)
        timeline.party("other", turns.inference(), 1, at=0.75)
        timeline.call(1, cancelled.cancel)
        timeline.party("again", cancelled, 1, at=5)

    timeline = run(instruments, paced, setup)
    assert timeline.spans == [("proof", 0, 2), ("other", 2, 3)]
    assert timeline.closed == ["cancelled", "again"]


def test_a_turn_that_hangs_can_be_ended_by_another_thread(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        turns = timeline.turns
        hanging = turns.inference()
        timeline.party("hanging", hanging, 10)
        timeline.party("following", turns.proof(), 12, at=0.5)
        timeline.call(2, hanging.end)
        timeline.call(2, hanging.end)
        timeline.party("third", turns.proof(), 1, at=3)

    # Its own late end, at 10, takes nothing from who computes then.
    spans = run(instruments, paced, setup).spans
    assert spans == [("hanging", 0, 10), ("following", 2, 14), ("third", 14, 15)]


# ---- two streams ----


def test_where_both_compute_at_once_a_step_never_waits(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("proof", timeline.turns.proof(), 10)
        timeline.party("inference", timeline.turns.inference(), 1, 1, 1, at=1)

    timeline = run(instruments, lambda: paced(concurrent=True, cap=0.0), setup)
    assert timeline.waits == [0, 0, 0, 0]


def test_where_both_compute_at_once_slices_are_held_back_all_the_same(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 40)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, 1, 1, 1, at=1)

    timeline = run(instruments, lambda: paced(concurrent=True), setup)
    begins = [began for name, began, _ in timeline.spans if name == "proof"]
    # The first is taken for 1 ms, which the step owes 9 ms after the proof came; then a slice of 1 s is owed every 9 s.
    # When the step is over, there is nothing to wait for.
    assert begins == pytest.approx([1.009, 19, 28, 37, 40], abs=1e-3)


def test_what_a_step_owed_before_a_proof_came_is_not_counted(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 1000, 1)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, at=900)

    timeline = run(instruments, lambda: paced(concurrent=True), setup)
    assert [began for name, began, _ in timeline.spans if name == "proof"] == pytest.approx([900.009, 918], abs=1e-3)


def test_half_the_device_is_a_slice_always(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 30)
        timeline.sliced("proof", timeline.turns.proof(), *[0.7] * 20, at=0.5)

    timeline = run(instruments, lambda: paced(0.5, linger=100.0, concurrent=True), setup)
    proofs = [span for span in timeline.spans if span[0] == "proof"]
    assert proofs[0][1] == 0.5
    assert all(before[2] == after[1] for before, after in itertools.pairwise(proofs))
    assert timeline.waits[1:] == [0] * 29


def test_where_both_compute_at_once_the_cap_ends_within_a_step(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(), 100)
        timeline.sliced("proof", timeline.turns.proof(), 1, 1, at=2)

    timeline = run(instruments, lambda: paced(0.001, concurrent=True, cap=5.0), setup)
    begins = [began for name, began, _ in timeline.spans if name == "proof"]
    assert begins == pytest.approx([3, 9], abs=1e-2)


def test_slices_that_are_not_held_back_run_beside_steps_and_nobody_waits(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 5)
        timeline.party("proof", timeline.turns.proof(), *[0.5] * 10, at=0.25)

    # Slices get more than the share: half of it would be enough.
    timeline = run(instruments, lambda: paced(0.25, linger=100.0, concurrent=True, paced=False), setup)
    assert timeline.waits == [0] * 15
    assert max(end for *_, end in timeline.spans) == 5.25


def test_a_step_waits_for_a_slice_that_is_owed(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 15, at=0.5)
        timeline.sliced("proof", timeline.turns.proof(), 1, 20)

    # Slices are taken for 1 s by the first; 9 steps of 1 s beside slices owe as much. However long the second takes, no
    # step waits for it before, and then each for a slice as they were and twice what a step owes.
    timeline = run(instruments, lambda: paced(cap=1.0, concurrent=True, paced=False), setup)
    assert timeline.waits[:9] == [0] * 9
    most = 1 + 2 / 9
    assert timeline.waits[9:] == pytest.approx([most] * 5 + [21 - (9.5 + 5 * (most + 1))], abs=0.001)


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

    timeline = run(instruments, lambda: paced(concurrent=True, paced=False), setup)
    assert len(timeline.waits) == 500
    assert 0.002 < max(timeline.waits) < 0.002 + 2 * 0.01 / 9 + 0.001


def test_without_pacing_nobody_waits_for_the_other_side(instruments: Instruments) -> None:
    def setup(timeline: Timeline) -> None:
        timeline.party("inference", timeline.turns.inference(lambda: True), *[1] * 5)
        timeline.party("proof", timeline.turns.proof(), *[1] * 5, at=0.5)

    timeline = run(instruments, lambda: Turns(None, concurrent=True), setup)
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

    spans = run(instruments, lambda: Turns(None, concurrent=True), setup).spans
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

    run(instruments, lambda: Turns(None, concurrent=True), setup)
    assert ended == [2]


# ---- the guaranteed share ----


class Device:
    """What a step and a slice compute on, at once or not; a slice that priorities starve stands still beside a step."""

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
            beside = self._steps
            self.timeline.world.sleep(part)
            if not (self.starves and (beside or self._steps)):
                seconds -= part
                self.computed["proof"] += part

    def clock(self) -> float:
        return self.computed["proof"]


def play(turns: Callable[[], Turns], steps: list[float], slices: Iterator[float], starves: bool = False) -> Device:
    """Step after step, beside slices without end."""
    made: list[Device] = []

    def setup(timeline: Timeline) -> None:
        device = Device(timeline, starves)
        made.append(device)

        def infer() -> None:
            turn = timeline.turns.inference(lambda: True)
            for seconds in steps:
                asked = timeline.world.now
                with turn:
                    timeline.waits.append(timeline.world.now - asked)
                    device.step(seconds)
                rate = timeline.turns._pacing.owed_per_second
                device.behind.append(device.computed["inference"] * rate - device.computed["proof"])
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


MODES = {
    "exclusive": {},
    "beside": {"concurrent": True},
    "starved": {"concurrent": True, "paced": False},
}


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
    device = play(lambda: paced(share, linger=0.005, **MODES[mode]), steps, slices, starves=mode == "starved")
    rate, longest_slice, longest_step = share / (1 - share), 2 * slice_seconds, max(steps)
    # At every time, but for a slice that is not owed yet or is under way, and what is not paid at one go.
    assert max(device.behind) <= 2 * longest_slice + 2 * longest_step * rate + 1e-9
    # And no more than it, but for slices that ran before the first step and the one that begins it.
    if mode != "starved":
        assert min(device.behind) >= -3 * longest_slice
    # What is owed is paid at one go, after the slice that runs.
    if mode == "beside":
        assert max(device.timeline.waits) == 0
    else:
        assert max(device.timeline.waits) <= 2 * longest_slice + 2 * longest_step * rate + 0.002


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize(("every", "long_step"), [(10, 0.3), (16, 0.5), (30, 1.0)])
def test_what_long_steps_owe_is_paid_and_not_at_one_go(mode: str, share: float, every: int, long_step: float) -> None:
    steps = [long_step if place % every == every - 1 else 0.01 for place in range(20 * every)]
    device = play(lambda: paced(share, **MODES[mode]), steps, itertools.repeat(0.002), starves=mode == "starved")
    rate = share / (1 - share)
    assert device.computed["proof"] >= 0.95 * rate * sum(steps) - long_step * rate
    # The next token waits for little of what a long step owes.
    mean_step = 0.01 + 2 * long_step / 16
    assert max(device.timeline.waits) <= 2 * 0.002 + 2 * rate * mean_step + 0.002


# ---- threads, errors ----


def test_real_threads_compute_one_at_a_time_and_none_starves() -> None:
    turns = Turns(Pacing(max_wait_seconds=0.001))
    inside = most = 0

    def work(make: Callable[[], Turn]) -> None:
        nonlocal inside, most
        turn = make()
        for _ in range(100):
            with turn:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work, args=(make,), daemon=True) for make in (turns.inference, turns.proof) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert (most, inside) == (1, 0)


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


def test_pacing_is_needed_where_one_computes_at_a_time() -> None:
    for pacing in (None, Pacing(paced=False)):
        with pytest.raises(ValueError, match="pacing must be a Pacing that holds back where concurrent is False, got"):
            Turns(pacing)
    assert [Pacing(share=share).owed_per_second for share in (0.5, 0.75)] == [1, 3]
