"""The validation queue without a device: admission, turns, jobs and their results, on a clock of the test's own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import threading
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from web import TIMEOUT

from poc_kernels.protocol import PoCConfig, ProofBatch, Round, RoundEndedError, ValidatedBatch, Validation
from poc_kernels.service import queue as validation_queue
from poc_kernels.service.queue import Forward, JobState, QueueFullError, ValidationJob, ValidationQueue

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
    """A job whose verdict will be `VERDICT`."""
    proof = ProofBatch("key", "block", 1, list(range(nonces)), [])
    return queue.put(Validation(of, proof), submitter=submitter, keep=keep)


def compute(queue: ValidationQueue) -> Forward | None:
    """One forward of whoever's turn it is."""
    forward = queue.next()
    if forward is not None:
        for job in queue.computed(forward):
            assert queue.finish(job, VERDICT)
    return forward


def served(queue: ValidationQueue) -> Iterator[Forward]:
    while (forward := compute(queue)) is not None:
        yield forward


def turns(queue: ValidationQueue, count: int) -> list[str]:
    """Whose turn the next forwards are."""
    return [forward[0][0].submitter for forward in (compute(queue) for _ in range(count)) if forward is not None]


# ---- turns ----


def test_forwards_go_round_and_a_submitters_batches_in_their_order() -> None:
    """And rows that are left free go to those whose turns come next, who keep them."""
    queue = ValidationQueue(1000)
    names = {
        put(queue, nonces, submitter): f"{submitter}{number}"
        for number, (submitter, nonces) in enumerate([("a", 9), ("a", 6), ("b", 5), ("c", 2), ("b", 1)])
    }
    order = [" ".join(f"{names[job]}:{nonces}" for job, nonces in forward) for forward in served(queue)]
    assert order == ["a0:4", "b2:4", "c3:2 a0:2", "a0:3 a1:1", "b2:1 b4:1 a1:2", "a1:3"]
    assert all(job.future.result(0) is VERDICT for job in names)


def test_waiting_batches_share_forwards_whoever_submitted_them() -> None:
    queue = ValidationQueue(1000)
    jobs = [put(queue, 1, submitter) for submitter in ("a", "b", "a", "c", "a", "a", "b", "d")]
    assert [[jobs.index(job) for job, _ in forward] for forward in served(queue)] == [[0, 2, 4, 5], [1, 6, 3, 7]]


def test_rows_of_others_do_not_delay_whose_turn_it_is() -> None:
    """A submitter has in its turns what it would have alone among as many submitters."""
    queue = ValidationQueue(10_000)
    for _ in range(50):
        put(queue, 1, "small")
        put(queue, 3, "medium")
    large = put(queue, 4 * 50, "large")
    for turn in range(50):
        done = large.nonces_done
        for _ in range(3):
            compute(queue)
        assert large.nonces_done >= min(done + FORWARD, 200), turn


def test_jobs_of_two_rounds_share_no_forward() -> None:
    queue = ValidationQueue(1000)
    another = Round(dataclasses.replace(ROUND.config, batch_size=2))
    first, second, third = put(queue, 1), put(queue, 3, "b", of=another), put(queue, 2, "c")
    assert list(served(queue)) == [[(second, 2)], [(first, 1), (third, 2)], [(second, 1)]]


def test_a_forward_that_fails_is_tried_with_each_of_its_jobs_alone() -> None:
    queue = ValidationQueue(1000)
    jobs = [put(queue, nonces, submitter) for submitter, nonces in (("a", 1), ("b", 1), ("c", 5))]
    later = put(queue, 1, "d")
    error = RuntimeError("no memory")
    shared = queue.next()
    assert shared == [(jobs[0], 1), (jobs[1], 1), (jobs[2], 2)]
    queue.failed(shared, error)
    assert [job.state for job in jobs] == [JobState.RUNNING] * 3
    assert queue.nonces == 8
    poisoned = jobs[1]
    order = []
    while (forward := queue.next()) is not None:
        order.append(forward)
        if forward[0][0] is poisoned:
            queue.failed(forward, error)
        else:
            for job in queue.computed(forward):
                queue.finish(job, VERDICT)
    assert order == [[(poisoned, 1)], [(jobs[2], 4)], [(later, 1)], [(jobs[0], 1)], [(jobs[2], 1)]]
    assert (poisoned.state, poisoned.future.exception(0)) == (JobState.FAILED, error)
    assert all(job.future.result(0) is VERDICT for job in (jobs[0], jobs[2], later))
    assert (queue.nonces, queue.batches) == (0, 0)


def test_a_round_that_ends_ends_all_who_share_a_forward() -> None:
    queue = ValidationQueue(1000)
    jobs = [put(queue, 1, submitter) for submitter in "ab"]
    forward = queue.next()
    assert forward is not None
    queue.failed(forward, RoundEndedError("over"))
    assert [job.state for job in jobs] == [JobState.CANCELLED] * 2
    assert queue.next() is None


def test_a_submitter_that_comes_is_served_after_those_who_wait() -> None:
    queue = ValidationQueue(1000)
    put(queue, 100, "a")
    put(queue, 100, "b")
    assert turns(queue, 3) == ["a", "b", "a"]
    put(queue, 100, "c")
    assert turns(queue, 4) == ["b", "a", "c", "b"]


def test_a_submitter_that_comes_during_a_forward_is_served_next() -> None:
    queue = ValidationQueue(1000)
    put(queue, 100, "a")
    forward = queue.next()
    assert forward is not None
    put(queue, 100, "b")
    assert queue.computed(forward) == []
    assert turns(queue, 3) == ["b", "a", "b"]


def test_a_small_batch_does_not_wait_for_a_large_one() -> None:
    queue = ValidationQueue(100_000)
    put(queue, 90_000, "large")
    compute(queue)
    small = put(queue, 8, "small")
    for _ in range(4):
        compute(queue)
    assert small.state == JobState.DONE


def of(batch_size: int, seq_len: int = 256) -> Round:
    return Round(dataclasses.replace(ROUND.config, batch_size=batch_size, seq_len=seq_len))


def had(forwards: Iterable[Forward]) -> Counter[str]:
    """Positions that each submitter had in its turns."""
    positions: Counter[str] = Counter()
    for forward in forwards:
        job = forward[0][0]
        positions[job.submitter] += job.round.config.positions
    return positions


def test_a_small_batch_does_not_wait_for_large_forwards() -> None:
    """200 nonces in forwards of 32 rows, beside 10,240 in forwards of 1024."""
    queue = ValidationQueue(100_000)
    put(queue, 10 * 1024, "large", of=of(1024, 16))
    compute(queue)
    small = put(queue, 200, "small", of=of(32, 16))
    assert "".join(turn[0] for turn in turns(queue, 8)) == "sssssssl"
    assert small.state == JobState.DONE


def test_new_addresses_with_large_forwards_have_no_more_than_one_that_stays() -> None:
    """Each asks for one forward of 65,536 positions, and another address comes after it."""
    queue = ValidationQueue(1_000_000)
    put(queue, 100_000, "stays", of=of(32))
    forwards: list[Forward] = []
    for number in range(20):
        last = put(queue, 1, f"new {number}", of=of(256))
        while last.state != JobState.DONE:
            forward = compute(queue)
            assert forward is not None
            forwards.append(forward)
    positions = had(forwards)
    new = sum(count for name, count in positions.items() if name.startswith("new"))
    assert new == 20 * 65_536
    assert new - positions["stays"] <= 65_536


def test_a_turn_costs_what_its_own_forward_does() -> None:
    """A submitter's small batches and large ones come in their order, each when it is due."""
    queue = ValidationQueue(100_000)
    put(queue, 10_000, "other", of=of(32, 16))
    for rows in (32, 1024, 32):
        put(queue, rows, "mixed", of=of(rows, 16))
    order = "".join(turn[0] for turn in turns(queue, 70))
    assert order == "om" + "o" * 31 + "mom" + "o" * 34


def test_the_forward_of_a_batch_that_is_over_is_no_longer_waited_for() -> None:
    queue = ValidationQueue(100_000)
    large, small = of(1024, 16), of(32, 16)
    put(queue, 10_000, "other", of=small)
    put(queue, 1024, "mixed", of=large)
    put(queue, 1024, "mixed", of=small)
    compute(queue)
    queue.cancel(lambda job: job.round is large, "over")
    assert "".join(turn[0] for turn in turns(queue, 4)) == "momo"


@pytest.mark.parametrize("shared", [True, False])
def test_few_of_thousands_of_submitters_are_looked_at(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Those of the forwards, whether all can share one or nobody can."""
    queue = ValidationQueue(100_000)
    for number in range(4000):
        put(queue, 1, f"submitter {number}", of=ROUND if shared else of(4))
    looked: list[str] = []
    left = queue._left

    def counted(name: str, taken: Any) -> Iterator[tuple[ValidationJob, int]]:
        looked.append(name)
        return left(name, taken)

    monkeypatch.setattr(queue, "_left", counted)
    for _ in range(5):
        forward = queue.next()
        assert forward is not None
        assert len(forward) == (4 if shared else 1)
        queue.upcoming(2, forward)
        assert len(looked) <= 6 * 4
        looked.clear()
        for job in queue.computed(forward):
            queue.finish(job, VERDICT)
    assert len(queue._jobs_of) == (1 if shared else 3995)
    assert sum(queue._jobs_of.values()) == 4000 - 5 * (4 if shared else 1)
    queue.close("over")
    assert not queue._jobs_of


def test_a_large_forward_does_not_wait_for_small_batches() -> None:
    """It has its turn once the others had as many positions."""
    queue = ValidationQueue(100_000)
    put(queue, 10_000, "small", of=of(32, 16))
    large = put(queue, 2 * 1024, "large", of=of(1024, 16))
    order = "".join(turn[0] for turn in turns(queue, 70))
    assert order == "s" * 31 + "l" + "s" * 32 + "l" + "s" * 5
    assert large.state == JobState.DONE


def test_three_submitters_of_different_shapes_have_the_same_positions() -> None:
    queue = ValidationQueue(1_000_000)
    shapes = {"a": (1024, 16), "b": (32, 16), "c": (8, 100)}
    for submitter, shape in shapes.items():
        put(queue, 100_000, submitter, of=of(*shape))
    positions = had(forward for _ in range(1000) if (forward := compute(queue)))
    assert positions.keys() == shapes.keys()
    assert max(positions.values()) - min(positions.values()) <= 1024 * 16 + 32 * 16
    assert min(positions.values()) > 10 * 1024 * 16


def test_a_submitter_that_comes_late_makes_up_for_nothing() -> None:
    queue = ValidationQueue(1_000_000)
    put(queue, 100_000, "early", of=of(1024, 16))
    for _ in range(50):
        compute(queue)
    put(queue, 100_000, "late", of=of(32, 16))
    positions = had(forward for _ in range(700) if (forward := compute(queue)))
    assert abs(positions["early"] - positions["late"]) <= 1024 * 16 + 32 * 16
    assert positions["early"] > 15 * 1024 * 16


def test_large_batches_one_by_one_gain_nothing() -> None:
    """Whoever waits for each verdict before the next batch has nothing waiting in between."""
    queue = ValidationQueue(1_000_000)
    put(queue, 100_000, "small", of=of(32, 16))
    large = of(1024, 16)
    positions: Counter[str] = Counter()
    waiting = put(queue, 1024, "large", of=large)
    for _ in range(1000):
        if waiting.finished is not None:
            waiting = put(queue, 1024, "large", of=large)
        forward = compute(queue)
        assert forward is not None
        positions += had([forward])
    assert abs(positions["large"] - positions["small"]) <= 1024 * 16 + 32 * 16


# ---- admission ----


def test_the_bound_is_met_to_the_nonce() -> None:
    queue = ValidationQueue(20)
    put(queue, 15, "a")
    put(queue, 5, "b")
    with pytest.raises(QueueFullError, match="at most 20 nonces can wait to be validated, 20 do, and 1 came"):
        put(queue, 1, "d")
    compute(queue)
    with pytest.raises(QueueFullError, match="16 do, and 5 came"):
        put(queue, 5, "d")
    put(queue, 4, "d")
    for nonces in (0, 21):
        with pytest.raises(ValueError, match=f"a batch must have at least 1 and at most 20 nonces, got {nonces}"):
            put(queue, nonces, "e")


def test_batches_are_bounded_as_nonces_are(clock: Clock) -> None:
    """Each takes memory, however few nonces it has."""
    queue = ValidationQueue(1000, max_batches=10)
    for _ in range(5):
        put(queue, 2, "greedy")
    with pytest.raises(QueueFullError, match="a submitter with 5 batches waiting can add at most 0 now, and 1 came"):
        put(queue, 2, "greedy")
    for submitter in "abcde":
        put(queue, 2, submitter)
    with pytest.raises(QueueFullError, match="at most 10 batches can wait to be validated, 10 do, and 1 came"):
        put(queue, 2, "f")
    clock.now += 1.0
    compute(queue)  # 4 a second, so that a batch of 2 takes half of one
    put(queue, 2, "f")
    put(queue, 2, "g")
    with pytest.raises(QueueFullError) as full:
        put(queue, 2, "h")
    assert full.value.retry_seconds == 1
    assert len(list(served(queue))) == 5


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
    job, other = put(queue, 10, "a"), put(queue, 4, "b")
    assert len({job.id, other.id}) == 2
    assert (job.state, job.submitted, job.started) == (JobState.QUEUED, 1000.0, None)
    empty = {"queued_batches": 0, "queued_nonces": 0, "submitters": 0, "running": None, "nonces_per_second": 4.0}
    status = queue.status()
    assert status == {**empty, "queued_batches": 2, "queued_nonces": 14, "submitters": 2, "nonces_per_second": 0}
    clock.now += 1.0
    compute(queue)
    assert (job.state, job.nonces_done, job.started) == (JobState.RUNNING, 4, 1001.0)
    assert queue.status()["running"] == {"id": job.id, "nonces_done": 4, "nonces": 10}
    assert queue.status()["queued_nonces"] == 10
    compute(queue)
    assert queue.status()["running"] is None
    assert (other.state, other.nonces_done, other.finished) == (JobState.DONE, 4, 1001.0)
    for _ in served(queue):
        clock.now += 1.5
    assert (job.state, job.nonces_done, job.started, job.finished) == (JobState.DONE, 10, 1001.0, 1002.5)
    assert queue.status() == {**empty, "nonces_per_second": pytest.approx(14 / 2.5, rel=0.1)}


@pytest.mark.parametrize(
    ("error", "state"), [(RuntimeError("no memory"), JobState.FAILED), (RoundEndedError("over"), JobState.CANCELLED)]
)
def test_a_job_that_ends_with_an_error_leaves_the_others(error: Exception, state: JobState) -> None:
    queue = ValidationQueue(100)
    job, next_one = put(queue, 10), put(queue, 4)
    compute(queue)
    forward = queue.next()
    assert forward == [(job, 4)]
    queue.failed(forward, error)
    assert job.state == state
    assert job.future.exception(0) is error
    assert (queue.batches, queue.nonces) == (1, 4)
    assert compute(queue) == [(next_one, 4)]


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
    forward = queue.next()
    assert forward is not None
    running = forward[0][0]
    assert running is jobs[1]
    queue.cancel(lambda job: job.round is ROUND, "the round ended")
    assert ended == [jobs[1], jobs[3], jobs[0], jobs[2]]
    for job in jobs:
        assert job.state == JobState.CANCELLED
        assert str(job.future.exception(0)) == "the round ended"
        assert isinstance(job.future.exception(0), RoundEndedError)
    assert (queue.batches, queue.nonces, queue.status()["running"]) == (1, 6, None)
    # The forward that ran meanwhile ends: nobody is told.
    assert queue.computed(forward) == []
    assert not queue.finish(running, VERDICT)
    queue.failed(forward, RuntimeError("late"))
    assert (running.state, running.nonces_done, running.verdict) == (JobState.CANCELLED, 0, None)
    assert list(served(queue)) == [[(left, 4)], [(left, 2)]]
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
    assert len(list(served(queue))) == 5
    clock.now += 59.9
    kept = queue.get(job.id)
    assert kept is not None
    assert kept.verdict is VERDICT
    clock.now += 0.2
    assert queue.get(job.id) is None


def test_no_more_results_are_kept_than_can_wait() -> None:
    queue = ValidationQueue(20)
    jobs = []
    for nonces in (8, 1, 8, 3):
        jobs.append(put(queue, nonces, keep=True))
        assert list(served(queue))
    assert all(queue.get(job.id) is job for job in jobs)
    waiting = put(queue, 20, keep=True)
    queue.close("over")
    assert [queue.get(job.id) for job in [*jobs, waiting]] == [None] * 4 + [waiting]
    assert waiting.state == JobState.CANCELLED


def test_no_more_results_are_kept_than_batches_can_wait() -> None:
    queue = ValidationQueue(1000, max_batches=3)
    jobs = []
    for _ in range(5):
        jobs.append(put(queue, 1, keep=True))
        assert list(served(queue))
    assert [queue.get(job.id) for job in jobs] == [None, None, *jobs[2:]]


# ---- in any order ----

MOST = 24
MOST_BATCHES = 5
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(1, MOST), st.booleans()),
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
    queue = ValidationQueue(MOST, MOST_BATCHES, ended=lambda job: told.update([job.id]))
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
            room = MOST - sum(taken.values()) - nonces
            room_of_batches = MOST_BATCHES - queue.batches - 1
            own = len(waiting[who])
            if min(room, room_of_batches) < 0 or (
                own > 0 and (taken[who] + nonces > room or own + 1 > room_of_batches)
            ):
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
            head = waiting[who][0]
            sharing = [job for name in (who, *turn) for job in waiting[name] if job.alone == head.alone]
            expected, rows = [], FORWARD
            for job in [head] if head.alone else sharing:
                if rows > 0:
                    expected.append((job, min(rows, job.left)))
                    rows -= expected[-1][1]
            turn.append(who)
            forward = queue.next()
            assert forward == expected
            if name == "fail":
                queue.failed(forward, RuntimeError("no memory"))
                assert [job.state for job, _ in forward] == [
                    JobState.FAILED if len(forward) == 1 else JobState.RUNNING for _ in forward
                ]
            else:
                done = [job.nonces_done for job, _ in forward]
                for job in queue.computed(forward):
                    assert queue.finish(job, VERDICT)
                assert [job.nonces_done for job, _ in forward] == [
                    before + nonces for before, (_, nonces) in zip(done, forward, strict=True)
                ]
            for job, _ in forward:
                if job.finished is not None:
                    forget(job)
        left = [job for of in waiting.values() for job in of]
        assert queue.batches == len(left)
        assert queue.nonces == sum(job.left for job in left) <= MOST
        assert queue.status()["submitters"] == len(turn)
    kept = [job for job in jobs if job.finished is not None and queue.get(job.id) is job]
    assert sum(job.nonces for job in kept) <= MOST
    assert len(kept) <= MOST_BATCHES
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
                jobs.append(put(queue, number % 11 + 1, submitter, keep=True))
            except QueueFullError:
                queue.cancel(lambda job: job.submitter == submitter, "over")
        return jobs

    def work() -> None:
        start.wait(TIMEOUT)
        while queue.batches > 0 or not over.is_set():
            forward = queue.next()
            if forward is not None:
                for job in queue.computed(forward):
                    queue.finish(job, VERDICT)
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
    [
        ((0,), "max_nonces must be positive, got 0"),
        ((1, 0), "max_batches must be positive, got 0"),
        ((1, 1, 0.0), "result_seconds must be positive, got 0.0"),
    ],
)
def test_bounds_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ValidationQueue(*arguments)


# ---- what comes next ----


@given(
    puts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.sampled_from([0, 0, 1, 2])), max_size=8),
    alone=st.sets(st.integers(0, 7)),
)
@settings(max_examples=200, deadline=None)
def test_upcoming_forwards_are_those_that_come(puts: list[tuple[str, int, int]], alone: set[int]) -> None:
    """As long as they are of one round, and nothing is put, cancelled or failed."""
    rounds = (ROUND, Round(ROUND.config), of(2, 2048))
    queue = ValidationQueue(1000)
    for number, (submitter, nonces, which) in enumerate(puts):
        put(queue, nonces, submitter, of=rounds[which]).alone = number in alone

    def foreseen(after: Forward | None, count: int) -> list[Forward]:
        forwards = queue.upcoming(count, after)
        # Which nonces: those after all that earlier forwards compute.
        done: Counter[ValidationJob] = Counter({job: job.nonces_done for job, _ in after or ()})
        for job, nonces in after or ():
            done[job] += nonces
        for forward in forwards:
            for job, nonces, before in forward:
                assert job.nonces_done + before == done.setdefault(job, job.nonces_done)
                done[job] += nonces
        return [[(job, nonces) for job, nonces, _ in forward] for forward in forwards]

    first, after_first = foreseen(None, 1), []
    computed: list[Forward] = []
    while (forward := queue.next()) is not None:
        assert first == [forward]
        after_first.append(foreseen(forward, 2))
        for job in queue.computed(forward):
            assert queue.finish(job, VERDICT)
        computed.append(forward)
        first = foreseen(None, 1)
    assert first == []
    rounds_of = [forward[0][0].round for forward in computed]
    for place, forwards in enumerate(after_first):
        of_same = functools.partial(operator.is_, rounds_of[place])
        same_round = itertools.takewhile(of_same, rounds_of[place + 1 : place + 3])
        assert forwards == computed[place + 1 :][: len(list(same_round))]


def test_nothing_is_upcoming_of_jobs_that_were_cancelled() -> None:
    queue = ValidationQueue(100)
    put(queue, 6, "a")
    forward = queue.next()
    assert forward is not None
    assert len(queue.upcoming(2, forward)) == 1
    queue.cancel(lambda job: True, "over")
    assert queue.upcoming(2, forward) == []
    assert queue.upcoming(2) == []
