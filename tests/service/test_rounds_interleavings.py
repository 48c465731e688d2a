"""Rounds and the validation queue in every order in which their threads can run, and the worker with all of them in
every order with few preemptions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import _base as futures_module
from typing import Any

import pytest
from interleaving import Instruments, World, explore
from scenarios import LONG, MODES, THOROUGH, Record, turns_of
from small_engine import SmallEngine

from poc_kernels.protocol import (
    DistanceProver,
    IllegalTransitionError,
    PoCConfig,
    PoCManager,
    PoCState,
    ProofBatch,
    Round,
    RoundEndedError,
    ValidatedBatch,
    Validation,
)
from poc_kernels.protocol import round as manager_module
from poc_kernels.scheduling import PriorityLanes, Turns
from poc_kernels.service import queue as queue_module
from poc_kernels.service import worker as worker_module
from poc_kernels.service.device import TurnsDevice
from poc_kernels.service.queue import JobState, ValidationJob, ValidationQueue
from poc_kernels.service.settings import ServiceSettings
from poc_kernels.service.worker import ProofWorker

_LEGAL = {
    PoCState.IDLE: set(PoCState),
    PoCState.GENERATING: {PoCState.VALIDATING, PoCState.STOPPED},
    PoCState.VALIDATING: {PoCState.GENERATING, PoCState.STOPPED},
    PoCState.STOPPED: set(PoCState),
}
BATCH = 2
PARTITION = PriorityLanes("cpu")
"""Made here, as it tries a real thread: one made in a scenario would wait with stand-ins for it."""


def config(**changes: Any) -> PoCConfig:
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, "seq_len": 2}
    return PoCConfig(**{**values, "batch_size": BATCH, **changes})


def claim(*nonces: int) -> ProofBatch:
    return ProofBatch("key", "block", 7, list(nonces), [])


@pytest.fixture(scope="module")
def alone_distances() -> dict[int, float]:
    """Of the first nonces, computed by a manager that nobody disturbs."""
    manager = PoCManager(DistanceProver(SmallEngine(hidden_size=4, vocab_size=5)))
    manager.init_round(config())
    return dict(enumerate(manager.validate(claim(*range(12))).dist))


def manager_in(world: World) -> PoCManager:
    """A manager whose changes of state are checked."""
    manager = PoCManager(DistanceProver(SmallEngine(hidden_size=4, vocab_size=5)))
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
        validation = manager.validation(claim(5, 1, 9))
        stopped = False
        pauses_after = 0

        def pause() -> None:
            nonlocal pauses_after
            pauses_after += stopped

        def validate() -> None:
            try:
                for count in (2, 1):
                    manager.recompute([(validation, count)], pause)
                outcome.append(manager.verdict(validation))
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


@pytest.mark.parametrize("then", ["another phase", "another round", "another round without a stop"])
def test_nonces_of_two_threads_through_phases(
    rounds: Instruments, record_property: Record, alone_distances: dict[int, float], then: str
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        first, second = config(), config(r_target=1.5)
        manager.start_round(first)
        computed: list[tuple[PoCConfig, ProofBatch]] = []
        given_up: list[Exception] = []

        def generate() -> None:
            try:
                computed.append(manager.advance()[:2])
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
                if then == "another round":
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
        of = Round(config())
        jobs: list[ValidationJob] = []

        def put(submitter: str) -> None:
            with contextlib.suppress(RoundEndedError):
                jobs.append(queue.put(Validation(of, claim(0, 1, 2)), submitter=submitter, keep=True))

        for submitter in ("a", "b"):
            put(submitter)

        def compute() -> None:
            while (forward := queue.next()) is not None:
                for job in queue.computed(forward):
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

    def generated(self, *_: Any, **__: Any) -> None:
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
        TurnsDevice(turns, PARTITION, lambda seconds: True),
        nowhere,
        everything,
        ServiceSettings(drain_seconds=1.0, max_queued_nonces=20, stall_seconds=60.0),
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_whose_round_is_stopped_and_that_is_closed(
    working: Instruments, record_property: Record, alone_distances: dict[int, float], mode: str
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager, turns = manager_in(world), turns_of(mode)
        worker = worker_of(manager, turns)
        manager.start_round(config(), PoCState.VALIDATING)
        worker.start()
        futures: list[Any] = []

        def submit(name: str, *nonces: int) -> None:
            with contextlib.suppress(RoundEndedError, IllegalTransitionError):
                futures.append((nonces, worker.enqueue(claim(*nonces), name).future))

        def infer() -> None:
            with turns.inference():
                pass

        def control() -> None:
            manager.stop_round()
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
            assert not worker._device._turn.computing
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    # What the worker looks at without a lock is marked by no operation: no order may be left out as another's twin.
    record_property("interleavings", explore(working, scenario, max_preemptions=2 if THOROUGH else 1))


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_answers_whoever_submits(
    working: Instruments,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
    alone_distances: dict[int, float],
    mode: str,
) -> None:
    working.patch(monkeypatch, futures_module)

    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        worker = worker_of(manager, turns_of(mode))
        manager.start_round(config(), PoCState.VALIDATING)
        worker.start()
        answers: list[tuple[int, list[float]]] = []
        chosen = (1, 4) if THOROUGH else (1,)

        def submit(nonce: int) -> None:
            answers.append((nonce, worker.enqueue(claim(nonce), f"submitter {nonce}").future.result().dist))

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

    record_property("interleavings", explore(working, scenario, max_preemptions=2 if THOROUGH else 1))


def test_a_request_is_answered_though_the_round_is_stopped(
    working: Instruments,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
    alone_distances: dict[int, float],
) -> None:
    working.patch(monkeypatch, futures_module)

    def scenario(world: World) -> Callable[[], None]:
        manager = manager_in(world)
        worker = worker_of(manager, turns_of("paced"))
        manager.start_round(config(block_hash="another"), PoCState.VALIDATING)
        worker.start()
        answers: list[list[float]] = []

        def ask() -> None:
            answers.append(worker.enqueue(claim(1), "a", config=config()).future.result().dist)
            worker.close(LONG)

        world.spawn("ask", ask)
        world.spawn("control", manager.stop_round)

        def check() -> None:
            assert answers == [[alone_distances[1]]]
            assert (worker.queue.batches, worker.queue.nonces) == (0, 0)
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(working, scenario, max_preemptions=2 if THOROUGH else 1))


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_through_phases_lets_inference_go_on(working: Instruments, record_property: Record, mode: str) -> None:
    def scenario(world: World) -> Callable[[], None]:
        manager, turns = manager_in(world), turns_of(mode)
        worker = worker_of(manager, turns)
        moved_on = working.Event()
        forwards = 0
        steps = 0

        def before_forward() -> None:
            nonlocal forwards
            forwards += 1
            if forwards > 1:
                moved_on.wait()  # else a thread that nobody preempts generates for ever

        manager.prover.engine.before_forward = before_forward
        worker.start()

        def infer() -> None:
            nonlocal steps
            turn = turns.inference(lambda: steps < 2)
            for _ in range(2):
                with turn:
                    steps += 1

        def control() -> None:
            manager.start_round(config())
            manager.set_phase(PoCState.VALIDATING)
            moved_on.set()

        def close() -> None:
            inference.join()
            controller.join()
            worker.close(LONG)

        inference = world.spawn("inference", infer)
        controller = world.spawn("control", control)
        world.spawn("close", close)

        def check() -> None:
            assert steps == 2
            assert not turns.inference_paused
            assert manager.status()["total_checked"] % BATCH == 0
            assert not worker._thread.is_alive()
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(working, scenario, max_preemptions=2 if THOROUGH else 1))
