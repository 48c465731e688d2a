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
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..protocol import Round, RoundEndedError, Validation

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
        forwards: its forwards, and the round that it belongs to.
        submitter: who sent it.
        nonces: number of nonces of the proof.
        keep: whether its outcome is kept for `ValidationQueue.get`.
        submitted, started, finished: seconds of ``time.monotonic()``; None until then.
        verdict, error: its outcome, one of the two.
        future: gets the outcome, once; a waiter cannot cancel it.
    """

    forwards: Validation
    submitter: str
    nonces: int
    keep: bool
    submitted: float
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    state: JobState = JobState.QUEUED
    nonces_done: int = 0
    started: float | None = None
    finished: float | None = None
    verdict: Any = None
    error: Exception | None = None
    future: Future[Any] = dataclasses.field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()

    @property
    def round(self) -> Round:
        """The round that it belongs to."""
        return self.forwards.round

    @property
    def left(self) -> int:
        """Places that it takes in the queue: nonces left to compute; 1 for a batch of none."""
        return max(1, self.nonces) - self.nonces_done


@dataclasses.dataclass
class _Share:
    """Jobs of one submitter that wait, and their nonces."""

    jobs: collections.deque[ValidationJob] = dataclasses.field(default_factory=collections.deque)
    nonces: int = 0


class ValidationQueue:
    """Batches that wait to be validated, including the one in work. Thread-safe; no call blocks.

    Forwards are given out in turn, one to each submitter that has something waiting; a submitter's own batches are
    served first come, first served. A submitter with nothing waiting is admitted wherever its batch fits; one with
    something waiting only while its share then is no larger than the room that it leaves to others.

    Args:
        max_nonces: maximum number of nonces waiting, and of nonces of finished jobs that are kept.
        result_seconds: how long finished jobs are kept.
        ended: called once with every job that is done, failed or cancelled, before its future is set; in any thread.
            What it raises is logged.

    Raises:
        ValueError: max_nonces is not positive, or result_seconds is not.
    """

    def __init__(
        self, max_nonces: int, result_seconds: float = 3600.0, ended: Callable[[ValidationJob], Any] = lambda job: None
    ) -> None:
        if max_nonces < 1:
            raise ValueError(f"max_nonces must be positive, got {max_nonces}")
        if not result_seconds > 0:
            raise ValueError(f"result_seconds must be positive, got {result_seconds}")
        self._max_nonces = max_nonces
        self._result_seconds = result_seconds
        self._ended = ended
        self._lock = threading.Lock()
        self._waiting: collections.OrderedDict[str, _Share] = collections.OrderedDict()  # the next to be served first
        self.batches = 0
        """Batches waiting to be validated, including the one in work."""
        self.nonces = 0
        """Nonces waiting to be computed; a batch of none counts as one."""
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
        something to do), and running: id, nonces_done and nonces of the job served last; None if it ended.
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

    def put(self, forwards: Validation, *, nonces: int, submitter: str, keep: bool = False) -> ValidationJob:
        """Queue a batch; the arguments are those of `ValidationJob`.

        Raises:
            ValueError: more nonces than can ever wait.
            QueueFullError: there is no room now.
            RoundEndedError: the queue is closed.
        """
        if nonces > self._max_nonces:
            raise ValueError(f"a batch must have at most {self._max_nonces} nonces, got {nonces}")
        with self._lock:
            if self._closed is not None:
                raise RoundEndedError(self._closed)
            now = time.monotonic()
            self._admit(max(1, nonces), nonces, submitter, now)
            if self.batches == 0:
                self._rate_until = now  # idle time is no part of the rate
            job = ValidationJob(forwards=forwards, submitter=submitter, nonces=nonces, keep=keep, submitted=now)
            share = self._waiting.setdefault(submitter, _Share())
            share.jobs.append(job)
            share.nonces += job.left
            self.nonces += job.left
            self.batches += 1
            if keep:
                self._kept[job.id] = job
        return job

    def _admit(self, places: int, nonces: int, submitter: str, now: float) -> None:
        share = self._waiting.get(submitter)
        own = 0 if share is None else share.nonces
        over = self.nonces + places - self._max_nonces
        unfair = own + self.nonces + 2 * places - self._max_nonces if own > 0 else 0
        if over <= 0 and unfair <= 0:
            return
        # Every k nonces that are computed take k from what waits and 1 from what each of k submitters has waiting.
        count = len(self._waiting)
        until_fair = min(unfair * count / (count + 1), own * count)
        retry_seconds = self._seconds_for(max(over, until_fair), now)
        if over > 0:
            message = f"at most {self._max_nonces} nonces can wait to be validated, {self.nonces} do, and {nonces} came"
        else:
            more = max(0, (self._max_nonces - own - self.nonces) // 2)
            message = f"a submitter with {own} nonces waiting can add at most {more} now, and {nonces} came"
        raise QueueFullError(message, retry_seconds)

    # ---- for whoever computes ----

    def next(self) -> ValidationJob | None:
        """Return the job whose next forward is to run, which `advance` or `finish` ends; None if nothing waits."""
        with self._lock:
            if not self._waiting:
                return None
            job = self._latest = next(iter(self._waiting.values())).jobs[0]
            if job.state == JobState.QUEUED:
                job.started = time.monotonic()
                job.state = JobState.RUNNING
            return job

    def advance(self, job: ValidationJob) -> None:
        """Count a forward of ``job`` that was not its last; do nothing if the job was cancelled meanwhile."""
        with self._lock:
            if job.state not in _WAITING:
                return
            computed = min(job.round.config.batch_size, job.nonces - job.nonces_done)
            self._measure(computed)
            job.nonces_done += computed
            self._waiting[job.submitter].nonces -= computed
            self.nonces -= computed
            self._waiting.move_to_end(job.submitter)

    def finish(self, job: ValidationJob, outcome: Any) -> bool:
        """End ``job``: DONE with its verdict, CANCELLED by a `RoundEndedError`, FAILED by any other error.

        Returns:
            Whether this ended it; False if it was cancelled before.
        """
        with self._lock:
            if job.state not in _WAITING:
                return False
            if not isinstance(outcome, Exception):
                self._measure(job.nonces - job.nonces_done)
            self._end(job, outcome)
            if job.submitter in self._waiting:
                self._waiting.move_to_end(job.submitter)
        self._notify(job)
        return True

    # ---- the end ----

    def cancel(self, ended: Callable[[ValidationJob], bool], reason: str) -> None:
        """End every job of which ``ended`` is true, the one in work too, with a `RoundEndedError` of that reason."""
        with self._lock:
            jobs = [job for share in self._waiting.values() for job in share.jobs if ended(job)]
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

    def _end(self, job: ValidationJob, outcome: Any) -> None:
        share = self._waiting[job.submitter]
        share.jobs.remove(job)
        share.nonces -= job.left
        if not share.jobs:
            del self._waiting[job.submitter]
        self.nonces -= job.left
        self.batches -= 1
        if self._latest is job:
            self._latest = None
        job.finished = time.monotonic()
        if isinstance(outcome, Exception):
            job.error = outcome
            job.state = JobState.CANCELLED if isinstance(outcome, RoundEndedError) else JobState.FAILED
        else:
            job.verdict, job.nonces_done = outcome, job.nonces
            job.state = JobState.DONE
        if job.keep:
            self._results.append(job)
            self._result_nonces += max(1, job.nonces)
            self._forget(job.finished)

    def _forget(self, now: float) -> None:
        while self._results:
            oldest = self._results[0]
            assert oldest.finished is not None
            if self._result_nonces <= self._max_nonces and now - oldest.finished < self._result_seconds:
                return
            self._results.popleft()
            self._result_nonces -= max(1, oldest.nonces)
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
