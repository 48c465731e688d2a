"""The validation queue without a device: admission, turns, jobs and their results, on a clock of the test's own."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from web import TIMEOUT

from poc_kernels.protocol import PoCConfig, Round, RoundEndedError, ValidatedBatch, Validation
from poc_kernels.service import queue as validation_queue
from poc_kernels.service.queue import JobState, QueueFullError, ValidationJob, ValidationQueue

FORWARD = 4
ROUND = Round(PoCConfig("block", 1, "key", r_target=1.4, batch_size=FORWARD))
VERDICT = ValidatedBatch("key", "block", 1, [1], [1.0])


class Clock:
    """Stands in for the queue's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(validation_queue, "time", types.SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def put(
    queue: ValidationQueue, nonces: int, submitter: str = "a", keep: bool = False, of: Round = ROUND
) -> ValidationJob:
    """A job whose verdict is `VERDICT`, after as many forwards as it has."""
    forwards = max(1, -(-nonces // of.config.batch_size))
    steps: list[Any] = [*[None] * (forwards - 1), VERDICT]
    return queue.put(Validation(of, iter(steps)), nonces=nonces, submitter=submitter, keep=keep)


def compute(queue: ValidationQueue) -> ValidationJob | None:
    """One forward of whoever's turn it is; its job."""
    job = queue.next()
    if job is not None:
        verdict = next(job.forwards)
        if verdict is None:
            queue.advance(job)
        else:
            assert queue.finish(job, verdict)
    return job


def served(queue: ValidationQueue) -> Iterator[ValidationJob]:
    while (job := compute(queue)) is not None:
        yield job


# ---- turns ----


def test_forwards_go_round_and_a_submitters_batches_in_their_order() -> None:
    queue = ValidationQueue(1000)
    names = {
        put(queue, nonces, submitter): f"{submitter}{number}"
        for number, (submitter, nonces) in enumerate([("a", 12), ("a", 4), ("b", 5), ("c", 0), ("b", 1)])
    }
    order = [names[job] for job in served(queue)]
    assert order == ["a0", "b2", "c3", "a0", "b2", "a0", "b4", "a1"]
    assert all(job.future.result(0) is VERDICT for job in names)


def test_a_submitter_that_comes_is_served_after_those_who_wait() -> None:
    queue = ValidationQueue(1000)
    put(queue, 100, "a")
    put(queue, 100, "b")
    assert [compute(queue).submitter for _ in range(3)] == ["a", "b", "a"]
    put(queue, 100, "c")
    assert [compute(queue).submitter for _ in range(4)] == ["b", "a", "c", "b"]


def test_a_submitter_that_comes_during_a_forward_is_served_next() -> None:
    queue = ValidationQueue(1000)
    put(queue, 100, "a")
    job = queue.next()
    put(queue, 100, "b")
    queue.advance(job)
    assert [compute(queue).submitter for _ in range(3)] == ["b", "a", "b"]


def test_a_small_batch_does_not_wait_for_a_large_one() -> None:
    queue = ValidationQueue(100_000)
    put(queue, 90_000, "large")
    compute(queue)
    small = put(queue, 8, "small")
    for _ in range(4):
        compute(queue)
    assert small.state == JobState.DONE


# ---- admission ----


def test_the_bound_is_met_to_the_nonce() -> None:
    queue = ValidationQueue(20)
    put(queue, 15, "a")
    put(queue, 4, "b")
    put(queue, 0, "c")  # a batch of none takes a place
    for nonces in (0, 1):
        with pytest.raises(QueueFullError, match=f"at most 20 nonces can wait to be validated, 20 do, and {nonces} ca"):
            put(queue, nonces, "d")
    compute(queue)
    with pytest.raises(QueueFullError, match="16 do, and 5 came"):
        put(queue, 5, "d")
    put(queue, 4, "d")
    with pytest.raises(ValueError, match="a batch must have at most 20 nonces, got 21"):
        put(queue, 21, "e")


def test_no_submitter_fills_the_queue_for_others() -> None:
    queue = ValidationQueue(100)
    for _ in range(5):
        put(queue, 10, "greedy")
    with pytest.raises(QueueFullError, match="a submitter with 50 nonces waiting can add at most 0 now, and 1 came"):
        put(queue, 1, "greedy")
    put(queue, 50, "another")  # all of the room that was left is for it


def test_what_one_may_add_is_half_of_the_room_beside_its_own() -> None:
    queue = ValidationQueue(100)
    put(queue, 20, "a")
    put(queue, 30, "b")
    with pytest.raises(QueueFullError, match="a submitter with 20 nonces waiting can add at most 15 now, and 16 came"):
        put(queue, 16, "a")
    put(queue, 15, "a")
    with pytest.raises(QueueFullError, match="a submitter with 30 nonces waiting can add at most 2 now, and 3 came"):
        put(queue, 3, "b")
    put(queue, 35, "c")
    assert queue.nonces == 100


def test_one_who_waits_for_nothing_any_more_begins_anew() -> None:
    queue = ValidationQueue(100)
    put(queue, 60, "a")
    with pytest.raises(QueueFullError):
        put(queue, 1, "a")
    assert len(list(served(queue))) == 15
    put(queue, 100, "a")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, 3), (0.01, 1), (1000.0, 600)],
)
def test_retry_after_is_when_there_is_room(clock: Clock, seconds: float, expected: int) -> None:
    queue = ValidationQueue(100)
    put(queue, 100)
    with pytest.raises(QueueFullError) as full:
        put(queue, 20, "b")
    assert full.value.retry_seconds == 5  # nothing was measured
    for _ in range(2):
        clock.now += seconds
        compute(queue)
    with pytest.raises(QueueFullError) as full:
        put(queue, 32, "b")  # 24 too many: 6 forwards
    assert full.value.retry_seconds == expected


def test_retry_after_of_an_unfair_submitter_is_when_it_may_add(clock: Clock) -> None:
    queue = ValidationQueue(100)
    put(queue, 40, "a")
    put(queue, 20, "b")
    clock.now += 1.0
    compute(queue)  # 4 a second; a has 36 waiting, b 20
    with pytest.raises(QueueFullError) as full:
        put(queue, 16, "a")
    retry_seconds = full.value.retry_seconds
    # 36 + 56 + 32 = 124: of 16 that are computed 8 are a's.
    assert retry_seconds == 4
    for second in range(retry_seconds):
        if second < retry_seconds - 1:
            with pytest.raises(QueueFullError):
                put(queue, 16, "a")
        clock.now += 1.0
        compute(queue)
    put(queue, 16, "a")


def test_the_rate_is_that_of_busy_times(clock: Clock) -> None:
    queue = ValidationQueue(100)
    assert queue.status()["nonces_per_second"] == 0
    for _ in range(3):
        clock.now += 500.0  # idle
        put(queue, 8)
        for _ in range(2):
            clock.now += 0.5
            compute(queue)
    assert queue.status()["nonces_per_second"] == pytest.approx(8.0)
    clock.now += 500.0
    assert queue.status()["nonces_per_second"] == pytest.approx(8.0)
    put(queue, 8)
    clock.now += 1.0
    assert queue.status()["nonces_per_second"] == pytest.approx(8.0)
    clock.now += 1000.0  # a forward that does not end
    assert queue.status()["nonces_per_second"] < 0.03


def test_the_rate_follows_what_is_recent(clock: Clock) -> None:
    queue = ValidationQueue(10_000)
    for seconds, expected in ((1.0, 4.0), (0.1, 40.0)):
        put(queue, 4 * 1000)
        for _ in range(1000):
            clock.now += seconds
            compute(queue)
        assert queue.status()["nonces_per_second"] == pytest.approx(expected, rel=0.05)


# ---- jobs ----


def test_progress_forward_by_forward(clock: Clock) -> None:
    queue = ValidationQueue(100)
    job, other = put(queue, 10, "a"), put(queue, 3, "b")
    assert len({job.id, other.id}) == 2
    assert (job.state, job.submitted, job.started) == (JobState.QUEUED, 1000.0, None)
    empty = {"queued_batches": 0, "queued_nonces": 0, "submitters": 0, "running": None, "nonces_per_second": 4.0}
    status = queue.status()
    assert status == {**empty, "queued_batches": 2, "queued_nonces": 13, "submitters": 2, "nonces_per_second": 0}
    clock.now += 1.0
    compute(queue)
    assert (job.state, job.nonces_done, job.started) == (JobState.RUNNING, 4, 1001.0)
    assert queue.status()["running"] == {"id": job.id, "nonces_done": 4, "nonces": 10}
    assert queue.status()["queued_nonces"] == 9
    compute(queue)
    assert queue.status()["running"] is None
    assert (other.state, other.nonces_done, other.finished) == (JobState.DONE, 3, 1001.0)
    for _ in served(queue):
        clock.now += 1.5
    assert (job.state, job.nonces_done, job.started, job.finished) == (JobState.DONE, 10, 1001.0, 1002.5)
    assert queue.status() == {**empty, "nonces_per_second": pytest.approx(13 / 2.5, rel=0.1)}


@pytest.mark.parametrize(
    ("error", "state"), [(RuntimeError("no memory"), JobState.FAILED), (RoundEndedError("over"), JobState.CANCELLED)]
)
def test_a_job_that_ends_with_an_error_leaves_the_others(error: Exception, state: JobState) -> None:
    queue = ValidationQueue(100)
    job, next_one = put(queue, 10), put(queue, 4)
    compute(queue)
    assert queue.next() is job
    assert queue.finish(job, error)
    assert job.state == state
    assert job.future.exception(0) is error
    assert (queue.batches, queue.nonces) == (1, 4)
    assert compute(queue) is next_one


def test_who_waits_cannot_cancel() -> None:
    queue = ValidationQueue(100)
    job = put(queue, 1)
    assert not job.future.cancel()
    compute(queue)
    assert job.future.result(0) is VERDICT


def test_cancel_ends_what_it_is_told_to_and_nothing_else() -> None:
    ended: list[ValidationJob] = []
    queue = ValidationQueue(200, ended=ended.append)
    another = Round(ROUND.config)
    jobs = [put(queue, 10, submitter) for submitter in "abab"]
    left = put(queue, 6, "b", of=another)
    compute(queue)
    running = queue.next()
    assert running is jobs[1]
    queue.cancel(lambda job: job.round is ROUND, "the round ended")
    assert ended == [jobs[1], jobs[3], jobs[0], jobs[2]]
    for job in jobs:
        assert job.state == JobState.CANCELLED
        assert str(job.future.exception(0)) == "the round ended"
        assert isinstance(job.future.exception(0), RoundEndedError)
    assert (queue.batches, queue.nonces, queue.status()["running"]) == (1, 6, None)
    # The forward that ran meanwhile ends: nobody is told.
    queue.advance(running)
    assert not queue.finish(running, VERDICT)
    assert not queue.finish(running, RuntimeError("late"))
    assert (running.state, running.nonces_done, running.verdict) == (JobState.CANCELLED, 0, None)
    assert list(served(queue)) == [left, left]
    assert ended[4:] == [left]


def test_a_closed_queue_takes_nothing() -> None:
    queue = ValidationQueue(100)
    job = put(queue, 1)
    queue.close("the end")
    queue.close("another end")
    assert str(job.future.exception(0)) == "the end"
    with pytest.raises(RoundEndedError, match="the end"):
        put(queue, 1)
    assert queue.next() is None


def test_whoever_is_told_is_told_before_the_result_is_there() -> None:
    seen: list[tuple[JobState, bool]] = []
    queue = ValidationQueue(100, ended=lambda job: seen.append((job.state, job.future.done())))
    put(queue, 1)
    compute(queue)
    put(queue, 1)
    queue.close("over")
    assert seen == [(JobState.DONE, False), (JobState.CANCELLED, False)]


def test_callbacks_of_futures_may_use_the_queue() -> None:
    queue = ValidationQueue(100)
    statuses: list[dict[str, Any]] = []
    for end in (lambda: compute(queue), lambda: queue.cancel(lambda job: True, "over")):
        put(queue, 1).future.add_done_callback(lambda _: statuses.append(queue.status()))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(end).result(TIMEOUT)
    assert [status["queued_batches"] for status in statuses] == [0, 0]


@pytest.mark.parametrize("cancelled", [False, True])
def test_an_observer_that_fails_changes_no_outcome(caplog: pytest.LogCaptureFixture, cancelled: bool) -> None:
    def fail(_: ValidationJob) -> None:
        raise KeyError("observer")

    queue = ValidationQueue(1000, ended=fail)
    job = put(queue, 3)
    if cancelled:
        queue.cancel(lambda _: True, "over")
        with pytest.raises(RoundEndedError, match="over"):
            job.future.result(0)
    else:
        compute(queue)
        assert job.future.result(0) is VERDICT
    assert [record.message for record in caplog.records] == ["the end of a validation could not be reported"]


# ---- results ----


def test_results_are_kept_for_a_time(clock: Clock) -> None:
    queue = ValidationQueue(100, result_seconds=60.0)
    job, forgotten = put(queue, 10, keep=True), put(queue, 10)
    assert queue.get(job.id) is job
    assert queue.get(forgotten.id) is None
    assert queue.get("nothing") is None
    clock.now += 1000.0  # what waits does not age
    assert queue.get(job.id) is job
    assert len(list(served(queue))) == 6
    clock.now += 59.9
    kept = queue.get(job.id)
    assert kept is not None
    assert kept.verdict is VERDICT
    clock.now += 0.2
    assert queue.get(job.id) is None


def test_no_more_results_are_kept_than_can_wait() -> None:
    queue = ValidationQueue(20)
    jobs = []
    for nonces in (8, 0, 8, 3):
        jobs.append(put(queue, nonces, keep=True))
        assert list(served(queue))
    assert all(queue.get(job.id) is job for job in jobs)
    waiting = put(queue, 20, keep=True)
    queue.close("over")
    assert [queue.get(job.id) for job in [*jobs, waiting]] == [None] * 4 + [waiting]
    assert waiting.state == JobState.CANCELLED


# ---- in any order ----

MOST = 24
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(0, MOST), st.booleans()),
        st.tuples(st.just("compute")),
        st.tuples(st.just("fail")),
        st.tuples(st.just("cancel"), st.sampled_from("abc")),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(operations=OPERATIONS)
def test_any_sequence_of_calls(operations: list[tuple[Any, ...]]) -> None:
    settled: Counter[str] = Counter()
    told: Counter[str] = Counter()
    queue = ValidationQueue(MOST, ended=lambda job: told.update([job.id]))
    waiting: dict[str, list[ValidationJob]] = {name: [] for name in "abc"}
    jobs: list[ValidationJob] = []
    turn: list[str] = []

    def forget(job: ValidationJob) -> None:
        waiting[job.submitter].remove(job)
        if not waiting[job.submitter] and job.submitter in turn:
            turn.remove(job.submitter)

    for name, *arguments in operations:
        taken = {who: sum(job.left for job in of) for who, of in waiting.items()}
        if name == "put":
            who, nonces, keep = arguments
            places = max(1, nonces)
            room = MOST - sum(taken.values()) - places
            if room < 0 or (taken[who] > 0 and taken[who] + places > room):
                with pytest.raises(QueueFullError) as full:
                    put(queue, nonces, who, keep)
                assert 1 <= full.value.retry_seconds <= 600
                continue
            job = put(queue, nonces, who, keep)
            job.future.add_done_callback(lambda _, key=job.id: settled.update([key]))
            jobs.append(job)
            waiting[who].append(job)
            if who not in turn:
                turn.append(who)
        elif name == "cancel":
            gone = list(waiting[arguments[0]])
            queue.cancel(lambda job, who=arguments[0]: job.submitter == who, "over")
            for job in gone:
                forget(job)
        elif not turn:
            assert queue.next() is None
        else:
            who = turn.pop(0)
            turn.append(who)
            head = waiting[who][0]
            if name == "fail":
                assert queue.next() is head
                assert queue.finish(head, RuntimeError("no memory"))
            else:
                assert compute(queue) is head
            if head.finished is not None:
                forget(head)
        left = [job for of in waiting.values() for job in of]
        assert queue.batches == len(left)
        assert queue.nonces == sum(job.left for job in left) <= MOST
        assert queue.status()["submitters"] == len(turn)
    assert sum(max(1, job.nonces) for job in jobs if job.finished is not None and queue.get(job.id) is job) <= MOST
    queue.close("the end")
    assert queue.nonces == queue.batches == 0
    assert settled == told == Counter(job.id for job in jobs)


def test_many_threads_at_once() -> None:
    settled: Counter[str] = Counter()
    lock = threading.Lock()

    def count(job: ValidationJob) -> None:
        with lock:
            settled.update([job.id])

    queue = ValidationQueue(200, ended=count)
    over = threading.Event()
    start = threading.Barrier(5)

    def submit(submitter: str) -> list[ValidationJob]:
        jobs = []
        start.wait(TIMEOUT)
        for number in range(300):
            try:
                jobs.append(put(queue, number % 11, submitter, keep=True))
            except QueueFullError:
                queue.cancel(lambda job: job.submitter == submitter, "over")
        return jobs

    def work() -> None:
        start.wait(TIMEOUT)
        while queue.batches > 0 or not over.is_set():
            job = queue.next()
            if job is not None:
                verdict = next(job.forwards)
                if verdict is None:
                    queue.advance(job)
                else:
                    queue.finish(job, verdict)
            assert queue.nonces <= 200

    with ThreadPoolExecutor(5) as pool:
        working = pool.submit(work)
        try:
            submitting = [pool.submit(submit, name) for name in "abcd"]
            jobs = [job for each in submitting for job in each.result(TIMEOUT)]
        finally:
            over.set()
        working.result(TIMEOUT)
    assert settled == Counter(job.id for job in jobs)
    assert {job.state for job in jobs} == {JobState.DONE, JobState.CANCELLED}
    assert all(job.future.done() for job in jobs)
    assert (queue.nonces, queue.batches) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "max_nonces must be positive, got 0"), ((1, 0.0), "result_seconds must be positive, got 0.0")],
)
def test_bounds_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ValidationQueue(*arguments)
