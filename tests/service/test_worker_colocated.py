"""The proof worker and inference that never rests, and jobs in every state through every change of the round's."""

from __future__ import annotations

import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from blocking import blocked
from web import TIMEOUT, eventually
from workers import BATCH, PATIENT, Parts, alone, failing, proof, workers

from poc_kernels.protocol import IllegalTransitionError, PoCState, RoundEndedError
from poc_kernels.scheduling import Pacing, Turn, Turns, turns
from poc_kernels.service.queue import JobState, QueueFullError, ValidationJob

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parts]]:
    """Makes workers."""
    with workers(monkeypatch) as make:
        yield make


# ---- inference that never rests ----

STEP, SLICE, TICK = 0.01, 0.005, 1e-9


class Users:
    """Inference that computes step after step, on a clock that steps and slices alone advance.

    The next step is always expected, and begins when a proof waits that is owed nothing.
    """

    def __init__(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        self._parts = parts
        self._now = 1000.0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.steps = 0
        self.slices = 0
        self._turn = parts.turns.inference(busy=lambda: True)
        monkeypatch.setattr(turns, "time", types.SimpleNamespace(monotonic=self._monotonic))
        parts.engine.before_forward = self._slice

    def _monotonic(self) -> float:
        self._advance(TICK)  # no slice takes no time
        return self._now

    def _slice(self) -> None:
        self._advance(SLICE)
        self.slices += 1

    def _advance(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds

    def _compute(self) -> None:
        proofs: Turn = self._parts.device._turn
        while not self._over.is_set():
            with self._turn:
                self._advance(STEP)
                self.steps += 1
            eventually(lambda: (proofs.waiting and not self._owed()) or self._over.is_set())

    def _owed(self) -> bool:
        """Whether a proof is about to begin, however long its thread takes to wake."""
        turns = self._parts.turns
        assert turns.pacing is not None
        with turns._condition:
            return turns._is_owed(turns.pacing, self._now)

    def __enter__(self) -> Users:
        self._parts.submit(proof(1)).result(TIMEOUT)  # how long a slice takes is measured
        self.slices = 0
        self._pool = ThreadPoolExecutor(1)
        self._computing = self._pool.submit(self._compute)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._computing.result(TIMEOUT)
        self._pool.shutdown()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_validation_has_its_share_however_long_inference_is_busy(
    make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    parts = make(turns=Turns(Pacing(share=share, max_wait_seconds=1e6, linger_seconds=1.0)))
    parts.begin(PoCState.VALIDATING)
    sizes = {"one": [30, 8], "another": [17, 2, 5]}
    with Users(parts, monkeypatch) as users:
        results = [(count, parts.submit(proof(count), name)) for name, counts in sizes.items() for count in counts]
        assert [result.result(TIMEOUT).dist for _, result in results] == [alone(count) for count, _ in results]
        computed = users.slices * SLICE
        # What steps owed it, less what is cut off so that it is not paid at one go; and the last may owe it still.
        assert computed >= 0.9 * share / (1 - share) * (users.steps - 2) * STEP - SLICE
    assert users.slices == -(-sum(count for counts in sizes.values() for count in counts) // BATCH)  # none half empty
    assert parts.worker.queue.nonces == 0
    assert parts.worker.trouble() is None


def test_time_that_users_took_is_counted(make: Callable[..., Parts]) -> None:
    parts = make(turns=Turns(PATIENT))
    parts.begin(PoCState.VALIDATING)
    told: list[float] = []
    parts.metrics.waited = told.append  # type: ignore[method-assign]
    tick = threading.Event()
    with parts.turns.inference():
        result = parts.submit(proof(1))
        eventually(lambda: parts.device._turn.waiting)
        assert not tick.wait(0.05)
        assert told == []
    result.result(TIMEOUT)
    assert told[0] >= 0.05
    assert len(told) > 1  # once a slice


class Starved:
    """A device with pacing that holds a slice back for an hour, and a step that never ends."""

    def __init__(self, make: Callable[..., Parts], **options: Any) -> None:
        self.parts = make(turns=Turns(PATIENT), **options)
        self.parts.begin(PoCState.VALIDATING)
        self.step = self.parts.turns.inference(busy=lambda: True)


def test_a_worker_that_is_held_back_closes_at_once(make: Callable[..., Parts]) -> None:
    starved = Starved(make)
    with starved.step:
        result = starved.parts.submit(proof(1))
        eventually(lambda: starved.parts.device._turn.waiting)
        began = time.monotonic()
        starved.parts.worker.close(TIMEOUT)
        assert time.monotonic() - began < TIMEOUT / 2
        assert starved.parts.ended()
    with pytest.raises(RoundEndedError, match="the node is shutting down"):
        result.result(TIMEOUT)


def test_generating_begins_within_a_forward_of_a_validation(make: Callable[..., Parts]) -> None:
    """The time that requests in flight have begins with the phase, and is not that of the forward that waits."""
    asked: list[float] = []

    def drain(seconds: float) -> bool:
        asked.append(seconds)
        return False

    parts = make(turns=Turns(Pacing(max_wait_seconds=0.001)), drain=drain, drain_seconds=TIMEOUT)
    parts.begin(PoCState.VALIDATING)
    paused: list[bool] = []

    def forward(x: Any, pause: Callable[[], None]) -> Any:
        if parts.manager.state == PoCState.VALIDATING:
            parts.manager.set_phase(PoCState.GENERATING)
            assert parts.worker._drain_end is not None
            paused.append(parts.turns.inference_paused)
            pause()
            paused.append(parts.turns.inference_paused)
            parts.worker._drain_end = 0.0  # their time is over
            eventually(lambda: pause() or parts.turns.inference_paused)
            paused.append(parts.turns.inference_paused)
        return type(parts.engine).forward(parts.engine, x)

    parts.engine.forward = forward  # type: ignore[method-assign]
    with parts.turns.inference(busy=lambda: True):
        verdict = parts.submit(proof(1, 0.5)).result(TIMEOUT)
    assert verdict.dist == alone(1)
    assert paused == [False, False, True]
    assert asked[0] == 0.0


# ---- every state, every change ----


class Outcomes:
    """Counts how often each future was settled."""

    def __init__(self) -> None:
        self.jobs: list[ValidationJob] = []
        self._settled: Counter[str] = Counter()

    def watch(self, job: ValidationJob) -> ValidationJob:
        self.jobs.append(job)

        def settled(_: Future[Any]) -> None:
            self._settled.update([job.id])

        job.future.add_done_callback(settled)
        return job

    def each_once(self) -> bool:
        return self._settled == Counter(job.id for job in self.jobs)


def cancelled(job: ValidationJob) -> bool:
    return job.state == JobState.CANCELLED and isinstance(job.future.exception(0), RoundEndedError)


@pytest.mark.parametrize("ending", ["stop", "stop and begin again", "close"])
def test_jobs_in_every_state_are_settled_once(make: Callable[..., Parts], ending: str) -> None:
    parts = make(turns=Turns(PATIENT))
    outcomes = Outcomes()

    def enqueue(count: int, name: str) -> ValidationJob:
        return outcomes.watch(parts.worker.enqueue(proof(count, 0.5), name, keep=True))

    parts.begin()  # GENERATING
    parts.checked(BATCH)
    done = enqueue(BATCH, "done")
    assert done.future.result(TIMEOUT).dist == alone(BATCH)
    parts.manager.set_phase(PoCState.VALIDATING)
    eventually(lambda: parts.worker._idle)
    assert done.state == JobState.DONE
    parts.engine.before_forward = failing(1)
    failed = enqueue(BATCH, "failed")
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.future.result(TIMEOUT)
    eventually(lambda: parts.worker._idle)
    # Its second forward waits: one in work, one begun, two that were not.
    forwards = threading.Semaphore(2)
    entered, release = threading.Event(), threading.Event()

    def third_waits() -> None:
        if not forwards.acquire(blocking=False):
            entered.set()
            assert release.wait(TIMEOUT)

    parts.engine.before_forward = third_waits
    with parts.turns.inference():  # none begins before all are there
        jobs = [enqueue(3 * BATCH, name) for name in ("a", "b", "a", "b")]
    assert entered.wait(TIMEOUT)
    assert [job.nonces_done for job in jobs] == [BATCH, BATCH, 0, 0]
    assert [job.state for job in jobs] == [JobState.RUNNING] * 2 + [JobState.QUEUED] * 2
    posted = len(parts.callbacks.batches)
    if ending == "close":
        parts.worker.close(0.0)
    else:
        parts.stop()
    assert all(cancelled(job) for job in jobs)
    assert outcomes.each_once()
    if ending == "stop and begin again":
        parts.begin(PoCState.VALIDATING, r_target=1.9)
        fresh = enqueue(2 * BATCH, "a")
        assert not fresh.future.done()
    release.set()
    if ending == "stop and begin again":
        assert fresh.future.result(TIMEOUT).dist == alone(2 * BATCH)
        assert fresh.future.result(0).r_target == 1.9
        eventually(lambda: len(parts.callbacks.batches) == posted + 1)
    eventually(parts.ended if ending == "close" else lambda: parts.worker._idle)
    assert outcomes.each_once()
    assert [job.state for job in (done, failed)] == [JobState.DONE, JobState.FAILED]
    assert all(cancelled(job) for job in jobs)
    assert all(parts.worker.queue.get(job.id) is job for job in outcomes.jobs)
    verdicts = [batch for kind, _, batch in parts.callbacks.batches if kind == "validated"]
    assert len(verdicts) == (2 if ending == "stop and begin again" else 1)  # nothing of those that were cancelled
    assert parts.worker.queue.nonces == 0
    text = parts.metrics.text()
    assert b'poc_validations_total{outcome="cancelled"} 4.0' in text
    assert b'poc_validations_total{outcome="failed"} 1.0' in text
    assert b"poc_batch_failures_total 1.0" in text  # an end is no failure


@pytest.mark.parametrize("ending", ["stop", "close"])
def test_a_forward_is_given_up_at_its_next_slice(make: Callable[..., Parts], ending: str) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        if ending == "stop":
            parts.stop()
        else:
            parts.worker.close(0.0)
    eventually(lambda: parts.worker._idle or parts.ended())
    metrics = parts.metrics.text()
    assert b'poc_nonces_checked_total{phase="validate"} 0.0' in metrics  # no distance was computed
    assert b"poc_batch_failures_total 0.0" in metrics


def test_batches_do_not_outlive_the_device(make: Callable[..., Parts]) -> None:
    parts = make(turns=Turns(PATIENT))
    parts.begin(PoCState.VALIDATING)
    with parts.turns.inference():
        results = [parts.submit(proof(9), name) for name in "ab"]
        eventually(lambda: parts.device._turn.waiting)
        parts.turns.close()
    for result in results:
        with pytest.raises(RoundEndedError, match="the proof thread ended"):
            result.result(TIMEOUT)
    with pytest.raises(RoundEndedError, match="the proof thread ended"):
        parts.submit(proof(1))


def test_a_round_that_ends_without_a_word_is_no_failure(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        job = parts.worker.enqueue(proof(1), "one")
        assert entered.wait(TIMEOUT)
        parts.manager.stop_round()
    with pytest.raises(RoundEndedError):
        job.future.result(TIMEOUT)
    eventually(lambda: parts.worker._idle)
    assert cancelled(job)
    assert b"poc_batch_failures_total 0.0" in parts.metrics.text()


def test_a_verdict_that_comes_too_late_is_posted_to_nobody(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    parts.engine.before_forward = lambda: parts.worker.queue.cancel(lambda job: True, "over")
    job = parts.worker.enqueue(proof(1, 0.5), "one")
    with pytest.raises(RoundEndedError, match="over"):
        job.future.result(TIMEOUT)
    eventually(lambda: parts.worker._idle)
    assert b'poc_nonces_checked_total{phase="validate"} 1.0' in parts.metrics.text()
    assert cancelled(job)
    assert parts.callbacks.batches == []


def test_rounds_change_while_batches_come(make: Callable[..., Parts]) -> None:
    parts = make(max_queued_nonces=60)
    outcomes = Outcomes()
    over = threading.Event()
    refusals: list[RuntimeError] = []

    def submit(name: str) -> None:
        count = 0
        while not over.is_set():
            count = (count + 5) % 17
            try:
                outcomes.watch(parts.worker.enqueue(proof(count), name))
            except RuntimeError as error:
                refusals.append(error)
                over.wait(0.001)

    phases = (PoCState.VALIDATING, PoCState.GENERATING, PoCState.VALIDATING)
    with ThreadPoolExecutor(3) as pool:
        submitting = [pool.submit(submit, name) for name in "abc"]
        try:
            for number in range(12):
                parts.begin(phases[number % 2])
                seen = len(parts.engine.shapes)
                eventually(lambda least=seen + 3: len(parts.engine.shapes) >= least)
                for phase in phases[: number % 4]:
                    parts.manager.set_phase(phase)
                parts.stop()
        finally:
            over.set()
        for each in submitting:
            each.result(TIMEOUT)
    eventually(lambda: parts.worker._idle)
    assert {type(error) for error in refusals} <= {QueueFullError, IllegalTransitionError}
    assert all(job.future.done() for job in outcomes.jobs)
    assert outcomes.each_once()
    states = Counter(job.state for job in outcomes.jobs)
    assert set(states) == {JobState.DONE, JobState.CANCELLED}
    expected = {count: alone(count) for count in range(17)}
    for job in outcomes.jobs:
        if job.state == JobState.DONE:
            assert job.future.result(0).dist == expected[job.nonces]
        else:
            assert cancelled(job)
    assert parts.worker.queue.nonces == 0
