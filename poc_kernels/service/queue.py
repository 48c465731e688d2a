"""The validation queue: bounded, and fair between submitters. There is no server, thread or device in it."""

from __future__ import annotations

import collections
import dataclasses
import enum
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from ..protocol import Round, RoundEndedError, Validation
from .line import Line, cost

logger = logging.getLogger("poc_kernels")

_RATE_SECONDS = 30.0
"""Memory of the measured rate: a measurement of this age weighs 1 / e."""

_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1, 600
_UNMEASURED_RETRY_SECONDS = 5
"""Before the first forward, when nothing tells how long one takes."""


class QueueFullError(RuntimeError):
    """There is no room for a batch now.

    Args:
        message: which bound is met.
        retry_seconds: when there should be room, by the measured rate; in [1, 600].
    """

    def __init__(self, message: str, retry_seconds: int) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class JobState(str, enum.Enum):
    """QUEUED, then RUNNING from its first forward on, then DONE, FAILED or CANCELLED for good."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


_WAITING = (JobState.QUEUED, JobState.RUNNING)


@dataclasses.dataclass(eq=False, kw_only=True)
class ValidationJob:
    """A proof that is, was or will be validated. Its queue alone makes and changes it; read it from any thread.

    Args:
        validation: the proof, and the round that it belongs to.
        submitter: who sent it.
        keep: whether its outcome is kept for `ValidationQueue.get`.
        submitted, started, finished: seconds of ``time.monotonic()``; None until then.
        verdict, error: its outcome, one of the two.
        future: gets the outcome, once; a waiter cannot cancel it.
    """

    validation: Validation
    submitter: str
    keep: bool
    submitted: float
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    state: JobState = JobState.QUEUED
    nonces_done: int = 0
    alone: bool = False
    """Whether it shares no forward any more: one that it shared failed, and none of the others is to fail for it."""
    started: float | None = None
    finished: float | None = None
    verdict: Any = None
    error: Exception | None = None
    future: Future[Any] = dataclasses.field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()

    @classmethod
    def judged(cls, validation: Validation, submitter: str, verdict: Any) -> ValidationJob:
        """Return the job of a proof whose verdict needs no forward, done."""
        now = time.monotonic()
        job = cls(validation=validation, submitter=submitter, keep=False, submitted=now)
        job.state, job.verdict, job.finished = JobState.DONE, verdict, now
        job.future.set_result(verdict)
        return job

    @property
    def round(self) -> Round:
        """The round that it belongs to."""
        return self.validation.round

    @property
    def of_request(self) -> bool:
        """Whether it came with a configuration of its own, and ends with no round."""
        return self.validation.request is not None

    @property
    def nonces(self) -> int:
        """Number of nonces of the proof."""
        return len(self.validation.proof)

    @property
    def left(self) -> int:
        """Nonces left to compute."""
        return self.nonces - self.nonces_done


Forward = list[tuple[ValidationJob, int]]
"""The jobs that share a forward, each with how many of its next nonces; never empty."""


def _cost(job: ValidationJob) -> int:
    """Return what a forward of a job costs, in positions."""
    return cost(job.round.config)


def _first_forward(waiting: Iterable[tuple[ValidationJob, int]], jobs_of: Mapping[Round, int]) -> Forward:
    """Return the forward of the first of the jobs, and of those that fit into it; empty if there are none.

    Args:
        waiting: jobs in the order of their turns, each with its nonces left, at least one.
        jobs_of: how many jobs of each round there are: the last one is known as such.
    """
    forward: Forward = []
    room = unseen = 1
    for job, left in waiting:
        if not forward:
            room, unseen = job.round.config.batch_size, jobs_of[job.round]
        elif job.round is not forward[0][0].round:
            continue
        unseen -= 1
        if not forward or job.alone == forward[0][0].alone:
            forward.append((job, min(room, left)))
            room -= forward[-1][1]
        if room == 0 or unseen == 0 or forward[0][0].alone:
            break
    return forward


@dataclasses.dataclass
class _Share:
    """Jobs of one submitter that wait, and their nonces."""

    jobs: collections.deque[ValidationJob] = dataclasses.field(default_factory=collections.deque)
    nonces: int = 0


class ValidationQueue:
    """Batches that wait to be validated, including those in work. Thread-safe; no call blocks.

    Forwards are given out in turn, so that each submitter that has something waiting gets as many positions as any
    other (`Line`); a submitter's own batches are served first come, first served. Rows that the submitter whose turn it
    is leaves free go to the others, in the order of their turns, which they keep. A submitter with nothing waiting is
    admitted wherever its batch fits; one with something waiting only while its share then is no larger than the room
    that it leaves to others, in nonces and in batches.

    Args:
        max_nonces: maximum number of nonces waiting, and of nonces of finished jobs that are kept.
        max_batches: maximum number of batches waiting, and of finished jobs that are kept.
        result_seconds: how long finished jobs are kept.
        ended: called once with every job that is done, failed or cancelled, before its future is set; in any thread.
            What it raises is logged.

    Raises:
        ValueError: max_nonces, max_batches or result_seconds is not positive.
    """

    def __init__(
        self,
        max_nonces: int,
        max_batches: int = 4096,
        result_seconds: float = 3600.0,
        ended: Callable[[ValidationJob], Any] = lambda job: None,
    ) -> None:
        for name, bound in (("max_nonces", max_nonces), ("max_batches", max_batches)):
            if bound < 1:
                raise ValueError(f"{name} must be positive, got {bound}")
        if not result_seconds > 0:
            raise ValueError(f"result_seconds must be positive, got {result_seconds}")
        self._max_nonces = max_nonces
        self._max_batches = max_batches
        self._result_seconds = result_seconds
        self._ended = ended
        self._lock = threading.Lock()
        self._waiting: dict[str, _Share] = {}
        self._line = Line()
        self._jobs_of: collections.Counter[Round] = collections.Counter()
        """Jobs that wait, by their rounds."""
        self.batches = 0
        """Batches waiting to be validated, including those in work."""
        self.nonces = 0
        """Nonces waiting to be computed."""
        self._latest: ValidationJob | None = None
        self._closed: str | None = None
        self._kept: dict[str, ValidationJob] = {}
        self._results: collections.deque[ValidationJob] = collections.deque()
        self._result_nonces = 0
        # Nonces and seconds, the older the less they weigh; and up to when they are counted.
        self._rate_nonces = self._rate_seconds = self._rate_until = 0.0

    # ---- what waits ----

    def status(self) -> dict[str, Any]:
        """Return the queue's numbers for GET /status.

        queued_batches, queued_nonces, submitters (that have something waiting), nonces_per_second (while there was
        something to do), and running: id, nonces_done and nonces of the job whose turn was last; None if it ended.
        """
        with self._lock:
            job = self._latest
            return {
                "queued_batches": self.batches,
                "queued_nonces": self.nonces,
                "submitters": len(self._waiting),
                "running": None
                if job is None
                else {"id": job.id, "nonces_done": job.nonces_done, "nonces": job.nonces},
                "nonces_per_second": self._rate(time.monotonic()),
            }

    def get(self, job_id: str) -> ValidationJob | None:
        """Return a job that was put with ``keep``; None if it is unknown or no longer kept."""
        with self._lock:
            self._forget(time.monotonic())
            return self._kept.get(job_id)

    # ---- for submitters ----

    def put(self, validation: Validation, *, submitter: str, keep: bool = False) -> ValidationJob:
        """Queue a batch; the arguments are those of `ValidationJob`.

        Raises:
            ValueError: no nonces, or more than can ever wait.
            QueueFullError: there is no room now.
            RoundEndedError: the queue is closed.
        """
        nonces = validation.left
        if not 1 <= nonces <= self._max_nonces:
            raise ValueError(f"a batch must have at least 1 and at most {self._max_nonces} nonces, got {nonces}")
        with self._lock:
            if self._closed is not None:
                raise RoundEndedError(self._closed)
            now = time.monotonic()
            share = self._waiting.get(submitter, _Share())
            self._admit("nonces", nonces, share.nonces, self.nonces, self._max_nonces, now)
            self._admit("batches", 1, len(share.jobs), self.batches, self._max_batches, now)
            if self.batches == 0:
                self._rate_until = now  # idle time is no part of the rate
            job = ValidationJob(validation=validation, submitter=submitter, keep=keep, submitted=now)
            if submitter not in self._waiting:
                self._waiting[submitter] = share
                self._line.enter(submitter, _cost(job))
            share.jobs.append(job)
            share.nonces += nonces
            self._jobs_of[job.round] += 1
            self.nonces += nonces
            self.batches += 1
            if keep:
                self._kept[job.id] = job
        return job

    def _admit(self, what: str, count: int, own: int, waiting: int, limit: int, now: float) -> None:
        """Raise a QueueFullError unless ``count`` more fit, fairly to who has not ``own`` of those that are waiting."""
        over = waiting + count - limit
        unfair = own + waiting + 2 * count - limit if own > 0 else 0
        if over <= 0 and unfair <= 0:
            return
        # Every k that are computed take k from what waits and 1 from what each of k submitters has waiting.
        submitters = len(self._waiting)
        until_fair = min(unfair * submitters / (submitters + 1), own * submitters)
        nonces_each = self.nonces / waiting
        retry_seconds = self._seconds_for(max(over, until_fair) * nonces_each, now)
        if over > 0:
            message = f"at most {limit} {what} can wait to be validated, {waiting} do, and {count} came"
        else:
            more = max(0, (limit - own - waiting) // 2)
            message = f"a submitter with {own} {what} waiting can add at most {more} now, and {count} came"
        raise QueueFullError(message, retry_seconds)

    # ---- for whoever computes ----

    def next(self) -> Forward | None:
        """Return the forward that is to run next, which `computed` or `failed` ends; None if nothing waits."""
        with self._lock:
            self._latest = None
            if not self._waiting:
                return None
            self._line.begin_turn()
            forward = _first_forward((pair for name in self._line for pair in self._left(name, {})), self._jobs_of)
            self._latest = forward[0][0]
            now = time.monotonic()
            for job, _ in forward:
                if job.state == JobState.QUEUED:
                    job.started = now
                    job.state = JobState.RUNNING
            return forward

    def upcoming(self, count: int, after: Forward | None = None) -> list[list[tuple[ValidationJob, int, int]]]:
        """Return the forwards, at most ``count`` and of one round, that are to run next if nothing else comes.

        Args:
            after: the forward that runs before them, if one does.

        Returns:
            For each forward its jobs, each with how many nonces, and how many others of the job come before these.
        """
        found: list[list[tuple[ValidationJob, int, int]]] = []
        taken: dict[ValidationJob, int] = {}
        with self._lock:
            line, jobs_of, forward = self._line.copy(), self._jobs_of.copy(), after
            before = None if after is None else after[0][0].round
            while len(found) < count:
                if forward is not None:
                    self._take(forward, line, taken, jobs_of)
                if not (
                    forward := _first_forward((pair for name in line for pair in self._left(name, taken)), jobs_of)
                ):
                    break
                if before not in (None, forward[0][0].round):
                    break
                before = forward[0][0].round
                line.begin_turn()
                found.append([(job, nonces, taken.get(job, 0)) for job, nonces in forward])
        return found

    def computed(self, forward: Forward) -> list[ValidationJob]:
        """Count the nonces of ``forward``; return the jobs that have none left, which `finish` ends.

        Of a job that was cancelled meanwhile nothing is counted.
        """
        with self._lock:
            waiting = [(job, nonces) for job, nonces in forward if job.state in _WAITING]
            for job, nonces in waiting:
                job.nonces_done += nonces
                self._waiting[job.submitter].nonces -= nonces
                self.nonces -= nonces
            if waiting:
                self._measure(sum(nonces for _, nonces in waiting))
            self._line.end_turn(forward[0][0].submitter)
            return [job for job, _ in waiting if job.left == 0]

    def failed(self, forward: Forward, error: Exception) -> None:
        """End the job that had ``forward`` alone with ``error``; those that shared it are each tried alone.

        A `RoundEndedError` ends them all.
        """
        if len(forward) == 1 or isinstance(error, RoundEndedError):
            for job, _ in forward:
                self.finish(job, error)
        with self._lock:
            for job, _ in forward:
                job.alone = True
            self._line.end_turn(forward[0][0].submitter)

    def finish(self, job: ValidationJob, outcome: Any) -> bool:
        """End ``job``: DONE with its verdict, CANCELLED by a `RoundEndedError`, FAILED by any other error.

        Returns:
            Whether this ended it; False if it was cancelled before.
        """
        with self._lock:
            if job.state not in _WAITING:
                return False
            self._end(job, outcome)
        self._notify(job)
        return True

    # ---- the end ----

    def cancel(self, ended: Callable[[ValidationJob], bool], reason: str) -> None:
        """End every job of which ``ended`` is true, the one in work too, with a `RoundEndedError` of that reason."""
        with self._lock:
            jobs = [job for name in self._line for job in self._waiting[name].jobs if ended(job)]
            for job in jobs:
                self._end(job, RoundEndedError(reason))
        for job in jobs:
            self._notify(job)

    def close(self, reason: str) -> None:
        """Cancel everything and admit nothing more. Idempotent: the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason
        self.cancel(lambda job: True, reason)

    # ---- under the lock ----

    def _left(self, name: str, taken: Mapping[ValidationJob, int]) -> Iterator[tuple[ValidationJob, int]]:
        """Iterate over a submitter's jobs that have nonces left beside those taken, each with how many."""
        if name in self._waiting:
            for job in self._waiting[name].jobs:
                if (left := job.left - taken.get(job, 0)) > 0:
                    yield job, left

    def _take(
        self, forward: Forward, line: Line, taken: dict[ValidationJob, int], jobs_of: collections.Counter[Round]
    ) -> None:
        """Have a forward be computed in copies of the queue's state, as `computed` and `finish` would have it."""
        line.end_turn(forward[0][0].submitter)
        for job, nonces in forward:
            taken[job] = taken.get(job, 0) + nonces
            jobs_of[job.round] -= taken[job] == job.left and job.state in _WAITING
        for name in {job.submitter for job, _ in forward if job.submitter in line}:
            head, _ = next(self._left(name, taken), (None, 0))
            if head is None:
                line.leave(name)
            else:
                line.change(name, _cost(head))

    def _end(self, job: ValidationJob, outcome: Any) -> None:
        share = self._waiting[job.submitter]
        share.jobs.remove(job)
        share.nonces -= job.left
        self._jobs_of[job.round] -= 1
        if self._jobs_of[job.round] == 0:
            del self._jobs_of[job.round]
        if not share.jobs:
            del self._waiting[job.submitter]
            self._line.leave(job.submitter)
        else:
            self._line.change(job.submitter, _cost(share.jobs[0]))
        self.nonces -= job.left
        self.batches -= 1
        if self._latest is job:
            self._latest = None
        job.finished = time.monotonic()
        if isinstance(outcome, Exception):
            job.error = outcome
            job.state = JobState.CANCELLED if isinstance(outcome, RoundEndedError) else JobState.FAILED
        else:
            job.verdict = outcome
            job.state = JobState.DONE
        if job.keep:
            self._results.append(job)
            self._result_nonces += job.nonces
            self._forget(job.finished)

    def _forget(self, now: float) -> None:
        while self._results:
            oldest = self._results[0]
            assert oldest.finished is not None
            fit = len(self._results) <= self._max_batches and self._result_nonces <= self._max_nonces
            if fit and now - oldest.finished < self._result_seconds:
                return
            self._results.popleft()
            self._result_nonces -= oldest.nonces
            del self._kept[oldest.id]

    def _measure(self, nonces: int) -> None:
        now = time.monotonic()
        seconds, self._rate_until = now - self._rate_until, now
        weight = math.exp(-seconds / _RATE_SECONDS)
        self._rate_nonces = self._rate_nonces * weight + nonces
        self._rate_seconds = self._rate_seconds * weight + seconds

    def _rate(self, now: float) -> float:
        """Return nonces per second while there was something to do; 0 if that was not measured yet."""
        unfinished = now - self._rate_until if self.batches > 0 else 0.0
        seconds = max(self._rate_seconds, unfinished)
        return self._rate_nonces / seconds if seconds > 0 else 0.0

    def _seconds_for(self, nonces: float, now: float) -> int:
        rate = self._rate(now)
        if rate == 0:
            return _UNMEASURED_RETRY_SECONDS
        return max(_MIN_RETRY_SECONDS, math.ceil(min(nonces / rate, _MAX_RETRY_SECONDS)))

    # ---- without the lock: others' code runs here ----

    def _notify(self, job: ValidationJob) -> None:
        try:
            self._ended(job)
        except Exception:  # an observer's fault is not the submitter's, nor that of whoever computes
            logger.exception("the end of a validation could not be reported")
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            assert job.verdict is not None
            job.future.set_result(job.verdict)
