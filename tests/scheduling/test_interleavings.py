"""Turns and rounds in every order in which their threads can run; and that the search finds what is broken."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import _base as futures_module
from typing import Any

import pytest
from interleaving import Deadlock, Endless, Instruments, World, explore
from small_engine import SmallEngine

from poc_kernels.protocol import (
    IllegalTransitionError,
    PoCConfig,
    PoCManager,
    PoCState,
    ProofBatch,
    RoundEndedError,
    ValidatedBatch,
)
from poc_kernels.protocol import manager as manager_module
from poc_kernels.scheduling import Pacing, StreamPartition, Turn, Turns, TurnsClosed
from poc_kernels.scheduling import turns as turns_module
from poc_kernels.serving import validation_queue as queue_module
from poc_kernels.serving import worker as worker_module
from poc_kernels.serving.validation_queue import JobState, ValidationJob, ValidationQueue
from poc_kernels.serving.worker import ProofWorker

THOROUGH = os.environ.get("POC_INTERLEAVINGS") == "all"
"""Larger scenarios, for many minutes."""
Record = Callable[[str, object], None]
LONG = 1000.0


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """Stand-ins in the modules under test."""
    made = Instruments()
    made.patch(monkeypatch, turns_module)
    return made


# ---- the search itself ----


@pytest.mark.parametrize("operations", [(1, 1), (2, 2), (3, 2), (2, 2, 1)])
def test_every_order_of_operations_on_one_object_is_run_once(
    instruments: Instruments, operations: tuple[int, ...]
) -> None:
    seen = []

    def scenario(world: World) -> Callable[[], None]:
        order: list[str] = []

        def work(name: str, count: int) -> None:
            for _ in range(count):
                world.at("shared")
                order.append(name)

        for place, count in enumerate(operations):
            world.spawn(str(place), lambda name=str(place), count=count: work(name, count))
        return lambda: seen.append(tuple(order))

    explore(instruments, scenario)
    names = [str(place) for place, count in enumerate(operations) for _ in range(count)]
    assert sorted(seen) == sorted(set(itertools.permutations(names)))


def test_operations_on_different_objects_are_run_in_one_order(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        for name in ("a", "b", "c"):
            world.spawn(name, lambda name=name: [world.at(name) for _ in range(3)])
        return lambda: None

    assert explore(instruments, scenario) == 1


def test_an_update_without_a_lock_is_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        total = 0

        def add() -> None:
            nonlocal total
            world.at("total")
            read = total
            world.at("total")
            total = read + 1

        for name in ("a", "b"):
            world.spawn(name, add)

        def check() -> None:
            assert total == 2

        return check

    with pytest.raises(AssertionError, match="1 == 2"):
        explore(instruments, scenario)


def test_locks_in_two_orders_are_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        one, other = instruments.Lock(), instruments.Lock()

        def both(first: object, second: object) -> None:
            with first, second:  # type: ignore[attr-defined]
                pass

        world.spawn("a", lambda: both(one, other))
        world.spawn("b", lambda: both(other, one))
        return lambda: None

    with pytest.raises(Deadlock, match="a: acquire lock 2; b: acquire lock 1"):
        explore(instruments, scenario)


def test_time_passes_when_nobody_can_run_or_as_an_alternative(instruments: Instruments) -> None:
    woken = set()

    def scenario(world: World) -> Callable[[], None]:
        condition = instruments.Condition()

        def wait() -> None:
            with condition:
                woken.add((condition.wait(5.0), instruments.monotonic()))

        def notify() -> None:
            with condition:
                condition.notify_all()

        world.spawn("wait", wait)
        world.spawn("notify", notify)
        return lambda: None

    explore(instruments, scenario)
    assert woken == {(True, 0.0), (False, 5.0)}
    woken.clear()
    explore(instruments, scenario, early_ticks=1)
    assert woken == {(True, 0.0), (True, 5.0), (False, 5.0)}


def test_threads_that_never_end_are_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        def spin() -> None:
            while True:
                world.at("shared")

        world.spawn("spin", spin)
        return lambda: None

    with pytest.raises(Endless, match="for ever"):
        explore(instruments, scenario)


# ---- turns ----


class Watched:
    """Turns whose every grant is checked against what their documentation promises."""

    def __init__(self, world: World, turns: Turns) -> None:
        self.world, self.turns = world, turns
        self.sides: tuple[list[Turn], list[Turn]] = ([], [])
        self._lines: tuple[list[Turn], list[Turn]] = ([], [])
        self._had: tuple[Turn | None, Turn | None] = (None, None)
        self._held = False
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
        for side, line, had in zip(self.sides, self._lines, self._had, strict=True):
            computing = [turn for turn in side if turn.computing]
            assert len(computing) <= 1
            have.append(computing[0] if computing else None)
            line += [turn for turn in side if turn.waiting and turn not in line]
            granted = have[-1]
            if granted is not None and granted is not had:
                assert line[:1] in ([], [granted]), "not first come first served"
                assert side is self.sides[1] or not (self._held and self.turns.inference_held), "granted while held"
            line[:] = [turn for turn in line if turn.waiting]
        if not self.turns._concurrent:
            assert None in have, "two compute at once"
        self._had = (have[0], have[1])
        self._held = self.turns.inference_held

    def compute(self, turn: Turn, times: int = 1, slices: int = 1) -> str:
        """Take the turn so many times, for so many slices each; what ended it."""
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

    def check(self) -> None:
        """Nothing is left, and nobody was woken by a time-out."""
        assert not any(turn.waiting or turn.computing for side in self.sides for turn in side)
        assert self.world.now < LONG, "somebody slept until a deadline: a wake-up is missing"


def turns_of(concurrent: bool = False) -> Turns:
    return Turns(Pacing(share=0.5, max_wait_seconds=LONG, linger_seconds=0.0), concurrent=concurrent)


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


def a_step_and_several_proofs(world: World, watched: Watched) -> None:
    _once_each(world, watched, 1, 3 if THOROUGH else 2)


def two_proofs_with_slices(world: World, watched: Watched) -> None:
    for name, turn in (("proof", watched.proof()), ("other proof", watched.proof())):
        world.spawn(name, lambda turn=turn: watched.compute(turn, slices=3))


def hold_and_release(world: World, watched: Watched) -> None:
    steps_and_slices(world, watched)

    def hold() -> None:
        watched.turns.hold_inference()
        watched.turns.release_inference()

    world.spawn("hold", hold)


def cancel_a_step(world: World, watched: Watched) -> None:
    step, proof, other = watched.inference(), watched.proof(), watched.inference()
    world.spawn("inference", lambda: watched.compute(step))
    world.spawn("proof", lambda: watched.compute(proof, slices=2))
    world.spawn("cancelled", lambda: watched.compute(other))
    world.spawn("cancel", other.cancel)


def cancel_a_waiting_step(world: World, watched: Watched) -> None:
    watched.turns.hold_inference()
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

    def hold_and_close() -> None:
        watched.turns.hold_inference()
        watched.turns.close()

    world.spawn("close", hold_and_close)


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


ALL = [
    steps_and_slices,
    several_steps_and_a_proof,
    a_step_and_several_proofs,
    two_proofs_with_slices,
    hold_and_release,
    cancel_a_step,
    cancel_a_waiting_step,
    cancel_a_proof,
    close_all,
    end_from_outside,
    alone,
]


def explored(instruments: Instruments, parties: Parties, turns: Callable[[], Turns]) -> int:
    def scenario(world: World) -> Callable[[], None]:
        watched = Watched(world, turns())
        parties(world, watched)
        return watched.check

    return explore(instruments, scenario)


@pytest.mark.parametrize("concurrent", [False, True], ids=["exclusive", "concurrent"])
@pytest.mark.parametrize("parties", ALL, ids=lambda parties: parties.__name__)
def test_turns(instruments: Instruments, record_property: Record, parties: Parties, concurrent: bool) -> None:
    record_property("interleavings", explored(instruments, parties, lambda: turns_of(concurrent)))


@pytest.mark.parametrize("early_ticks", [1, 2])
def test_turns_while_time_passes(instruments: Instruments, record_property: Record, early_ticks: int) -> None:
    """Caps and lingering end at any point between others' operations."""

    def scenario(world: World) -> Callable[[], None]:
        watched = Watched(world, Turns(Pacing(share=0.5, max_wait_seconds=2.0, linger_seconds=1.0)))
        step, proof = watched.turns.inference(lambda: True), watched.proof()
        watched.sides[0].append(step)
        world.spawn("inference", lambda: watched.compute(step, times=2))
        world.spawn("proof", lambda: watched.compute(proof, slices=2))
        return watched.check

    record_property("interleavings", explore(instruments, scenario, early_ticks=early_ticks))


class SilentEnd(Turns):
    """Tells nobody that the device is free."""

    def _give_back(self, turn: Turn) -> None:
        with self._condition:
            if self._computing[turn._side] is turn:
                self._computing[turn._side] = None


class SilentCancel(Turns):
    """Does not wake who is cancelled."""

    def _cancel(self, turn: Turn) -> None:
        with self._condition:
            turn._cancelled = True


class LooksBeforeTheLock(Turns):
    """Looks whether the device is free in one critical section, and takes it in another."""

    def _take(self, turn: Turn) -> None:
        while True:
            with self._condition:
                free = not any(self._computing)
                if not free:
                    self._condition.wait()
            if free:
                break
        with self._condition:
            self._computing[turn._side] = turn
            turn._since = 0.0


class LastComeFirstServed(Turns):
    """Lets whoever came last go first."""

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        line = self._lines[turn._side]
        line.reverse()
        try:
            return super()._seconds_to_wait(turn, now)
        finally:
            line.reverse()


class DeafToHolding(Turns):
    """Lets steps begin while inference is held."""

    def _seconds_to_wait(self, turn: Turn, now: float) -> float | None:
        held, self._held = self._held, False
        try:
            return super()._seconds_to_wait(turn, now)
        finally:
            self._held = held


@pytest.mark.parametrize(
    ("broken", "parties", "found"),
    [
        (SilentEnd, steps_and_slices, "nothing can wake|a wake-up is missing"),
        (SilentCancel, cancel_a_waiting_step, "nothing can wake|a wake-up is missing"),
        (LooksBeforeTheLock, steps_and_slices, "two compute at once"),
        (LastComeFirstServed, several_steps_and_a_proof, "not first come first served"),
        (DeafToHolding, hold_and_release, "granted while held"),
    ],
)
def test_broken_turns_are_found(instruments: Instruments, broken: type[Turns], parties: Parties, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        explored(instruments, parties, lambda: broken(Pacing(share=0.5, max_wait_seconds=LONG, linger_seconds=0.0)))


# ---- rounds ----

_LEGAL = {
    PoCState.IDLE: set(PoCState),
    PoCState.GENERATING: {PoCState.VALIDATING, PoCState.STOPPED},
    PoCState.VALIDATING: {PoCState.GENERATING, PoCState.STOPPED},
    PoCState.STOPPED: set(PoCState),
}
BATCH = 2


def config(**changes: Any) -> PoCConfig:
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, "seq_len": 2}
    return PoCConfig(**{**values, "batch_size": BATCH, **changes})


def claim(*nonces: int) -> ProofBatch:
    return ProofBatch("key", "block", 7, list(nonces), [])


@pytest.fixture(scope="module")
def alone_distances() -> dict[int, float]:
    """Of the first nonces, computed by a manager that nobody disturbs."""
    manager = PoCManager(SmallEngine(hidden_size=4, vocab_size=5))
    manager.init_round(config())
    return dict(enumerate(manager.validate(claim(*range(12))).dist))


def manager_in(world: World) -> PoCManager:
    """A manager whose changes of state are checked."""
    manager = PoCManager(SmallEngine(hidden_size=4, vocab_size=5))
    before = manager.state

    def observe() -> None:
        nonlocal before
        now = manager.state
        assert now == before or now in _LEGAL[before], f"{before} to {now}"
        before = now

    world.observe = observe
    return manager


@pytest.fixture
def rounds(instruments: Instruments, monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """Stand-ins in the manager too."""
    instruments.patch(monkeypatch, manager_module)
    return instruments


def test_a_validation_while_its_round_ends(
    rounds: Instruments, record_property: Record, alone_distances: dict[int, float]
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        manager.init_round(config())
        outcome: list[Any] = []
        steps = manager.validation(claim(5, 1, 9), lambda: pause())
        stopped = False
        pauses_after = 0

        def pause() -> None:
            nonlocal pauses_after
            pauses_after += stopped

        def validate() -> None:
            try:
                outcome.extend(each for each in steps if each is not None)
            except (RoundEndedError, IllegalTransitionError) as error:
                outcome.append(error)

        def control() -> None:
            nonlocal stopped
            manager.set_phase(PoCState.VALIDATING)
            manager.stop_round()
            stopped = True
            manager.init_round(config())

        world.spawn("validate", validate)
        world.spawn("control", control)

        def check() -> None:
            assert pauses_after <= 1, "an ended round is computed on"
            assert len(outcome) == 1
            if isinstance(outcome[0], ValidatedBatch):
                assert outcome[0].dist == [alone_distances[nonce] for nonce in (5, 1, 9)]
                assert pauses_after == 0

        return check

    record_property("interleavings", explore(rounds, scenario))


@pytest.mark.parametrize("then", ["another phase", "another round"])
def test_nonces_of_two_threads_through_phases(
    rounds: Instruments, record_property: Record, alone_distances: dict[int, float], then: str
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        first, second = config(), config()
        manager.start_round(first)
        computed: list[tuple[PoCConfig, ProofBatch]] = []
        given_up: list[Exception] = []

        def generate() -> None:
            try:
                computed.append(manager.advance())
                # Nobody ran since it was counted.
                assert (manager.state, manager.config) == (PoCState.GENERATING, computed[-1][0])
                assert manager.config is computed[-1][0], "a batch of a round that ended"
            except (RoundEndedError, IllegalTransitionError) as error:
                given_up.append(error)

        def control() -> None:
            if then == "another phase":
                manager.set_phase(PoCState.VALIDATING)
                manager.set_phase(PoCState.GENERATING)
            else:
                manager.stop_round()
                manager.start_round(second)

        for name in ("generate", "other generate"):
            world.spawn(name, generate)
        world.spawn("control", control)

        def check() -> None:
            assert len(computed) + len(given_up) == 2
            manager_checked = manager.status()["total_checked"]
            for of_round in (first, second):
                nonces = sorted(nonce for each, batch in computed if each is of_round for nonce in batch.nonces)
                assert nonces == list(range(len(nonces))), "none twice, none left out"
                if of_round is manager.config:
                    assert manager_checked == len(nonces)
            for _, batch in computed:
                assert batch.dist == [alone_distances[nonce] for nonce in batch.nonces]

        return check

    record_property("interleavings", explore(rounds, scenario))


# ---- the validation queue ----

OTHERS = [("submit", "stop", "poll")] if THOROUGH else [("submit", "stop"), ("submit", "poll"), ("stop", "poll")]
"""Who is there besides the thread that computes."""


@pytest.mark.parametrize("others", OTHERS, ids=" and ".join)
def test_a_queue_of_two_submitters(
    instruments: Instruments, monkeypatch: pytest.MonkeyPatch, record_property: Record, others: tuple[str, ...]
) -> None:
    instruments.patch(monkeypatch, queue_module)

    def scenario(world: World) -> Callable[[], None]:
        ended: list[ValidationJob] = []
        queue = ValidationQueue(20, ended=ended.append)
        verdict: Any = object()
        jobs: list[ValidationJob] = []

        def put(submitter: str) -> None:
            with contextlib.suppress(RoundEndedError):
                jobs.append(queue.put(iter(()), nonces=3, config=config(), submitter=submitter, keep=True))

        for submitter in ("a", "b"):
            put(submitter)

        def compute() -> None:
            while (job := queue.next()) is not None:
                if job.nonces_done == 0:
                    queue.advance(job)
                else:
                    queue.finish(job, verdict)

        def submit() -> None:
            put("a")

        def poll() -> None:
            job = queue.get(jobs[0].id)
            assert job is jobs[0]
            assert job.state in JobState
            status = queue.status()
            assert 0 <= status["queued_nonces"] <= 9
            assert 0 <= status["queued_batches"] <= 3

        world.spawn("compute", compute)

        def stop() -> None:
            queue.cancel(lambda job: job.submitter == "b", "stopped")

        for name, act in (("submit", submit), ("stop", stop), ("poll", poll)):
            if name in others:
                world.spawn(name, act)

        def check() -> None:
            queue.close("over")
            assert sorted(map(id, ended)) == sorted(map(id, jobs)), "each told of once"
            assert all(job.future.done() for job in jobs)
            for job in jobs:
                if job.state == JobState.DONE:
                    assert job.future.result(0) is verdict
                else:
                    assert job.state == JobState.CANCELLED
                    assert isinstance(job.future.exception(0), RoundEndedError)
                assert queue.get(job.id) is job
            assert (queue.nonces, queue.batches) == (0, 0)

        return check

    record_property("interleavings", explore(instruments, scenario))


# ---- the worker with all of them ----


@pytest.fixture
def working(rounds: Instruments, monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """Stand-ins in the queue and the worker too."""
    rounds.patch(monkeypatch, queue_module, worker_module)
    return rounds


class Unsent:
    """Where callbacks would go."""

    def generated(self, *_: Any) -> None:
        pass

    validated = generated


class Uncounted:
    """What is measured of a worker."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def worker_of(manager: PoCManager, turns: Turns) -> ProofWorker:
    everything: Any = Uncounted()
    nowhere: Any = Unsent()
    return ProofWorker(
        manager,
        turns,
        StreamPartition("cpu"),
        nowhere,
        everything,
        drain=lambda seconds: True,
        drain_seconds=1.0,
        max_queued_nonces=20,
        stall_seconds=60.0,
    )


def test_a_worker_whose_round_is_stopped_and_that_is_closed(
    working: Instruments, record_property: Record, alone_distances: dict[int, float]
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager, turns = manager_in(world), turns_of()
        worker = worker_of(manager, turns)
        manager.start_round(config(), PoCState.VALIDATING)
        worker.start()
        futures: list[Any] = []

        def submit(name: str, *nonces: int) -> None:
            with contextlib.suppress(RoundEndedError, IllegalTransitionError):
                futures.append((nonces, worker.submit(claim(*nonces), name)))

        def infer() -> None:
            with turns.inference():
                pass

        def control() -> None:
            manager.stop_round()
            worker.wake()
            worker.close(LONG)

        world.spawn("a", lambda: submit("a", 3, 0, 7))
        world.spawn("b", lambda: submit("b", 2))
        world.spawn("inference", infer)
        world.spawn("control", control)

        def check() -> None:
            for nonces, future in futures:
                assert future.done(), "a future that is never settled"
                if future.exception(0) is None:
                    assert future.result(0).dist == [alone_distances[nonce] for nonce in nonces]
                else:
                    assert isinstance(future.exception(0), RoundEndedError)
            assert (worker.queue.batches, worker.queue.nonces) == (0, 0)
            assert not worker._thread.is_alive()
            assert not worker._turn.computing
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    # What the worker looks at without a lock is marked by no operation: no order may be left out as another's twin.
    record_property("interleavings", explore(working, scenario, most_preemptions=2 if THOROUGH else 1))


def test_a_worker_answers_whoever_submits(
    working: Instruments,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
    alone_distances: dict[int, float],
) -> None:
    working.patch(monkeypatch, futures_module)

    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        worker = worker_of(manager, turns_of())
        manager.start_round(config(), PoCState.VALIDATING)
        worker.start()
        answers: list[tuple[int, list[float]]] = []
        chosen = (1, 4) if THOROUGH else (1,)

        def submit(nonce: int) -> None:
            answers.append((nonce, worker.submit(claim(nonce), f"submitter {nonce}").result().dist))

        def close() -> None:
            for submitter in submitters:
                submitter.join()
            worker.close(LONG)

        submitters = [world.spawn(f"submitter {nonce}", lambda nonce=nonce: submit(nonce)) for nonce in chosen]
        world.spawn("close", close)

        def check() -> None:
            assert sorted(answers) == [(nonce, [alone_distances[nonce]]) for nonce in chosen]
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(working, scenario, most_preemptions=2 if THOROUGH else 1))


def test_a_worker_through_phases_lets_inference_go_on(working: Instruments, record_property: Record) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager, turns = manager_in(world), turns_of()
        worker = worker_of(manager, turns)
        moved_on = working.Event()
        forwards = 0
        steps = 0

        def before_forward() -> None:
            nonlocal forwards
            forwards += 1
            if forwards > 1:
                moved_on.wait()  # else a thread that nobody preempts generates for ever

        manager.engine.before_forward = before_forward
        worker.start()

        def infer() -> None:
            nonlocal steps
            turn = turns.inference(lambda: steps < 2)
            for _ in range(2):
                with turn:
                    steps += 1

        def control() -> None:
            manager.start_round(config())
            worker.wake()
            manager.set_phase(PoCState.VALIDATING)
            moved_on.set()
            worker.wake()

        def close() -> None:
            inference.join()
            controller.join()
            worker.close(LONG)

        inference = world.spawn("inference", infer)
        controller = world.spawn("control", control)
        world.spawn("close", close)

        def check() -> None:
            assert steps == 2
            assert not turns.inference_held
            assert manager.status()["total_checked"] % BATCH == 0
            assert not worker._thread.is_alive()
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(working, scenario, most_preemptions=2 if THOROUGH else 1))
