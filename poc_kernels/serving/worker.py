"""The proof worker: one thread that computes all batches of a node, for its rounds and for proofs to validate.

While GENERATING it holds inference; otherwise its batches take turns with inference on the device (`Turns`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from ..protocol import (
    IllegalTransitionError,
    PoCManager,
    PoCState,
    ProofBatch,
    RoundEndedError,
    ValidatedBatch,
)
from .callbacks import CallbackSender
from .metrics import Metrics
from .turns import Turns, TurnsClosed

logger = logging.getLogger("poc_kernels")

_RETRY_SECONDS = 1.0


class QueueFullError(RuntimeError):
    """More nonces wait to be validated than the node keeps."""


@dataclasses.dataclass
class _Job:
    batch: ProofBatch
    callback_url: str | None
    steps: Iterator[ValidatedBatch | None]
    result: Future[ValidatedBatch]


class ProofWorker:
    """Computes the batches of a `PoCManager`.

    Args:
        manager: whose rounds to run.
        turns: the device, shared with inference.
        callbacks: where proofs and verdicts go.
        metrics: told of failures and frauds.
        drain: waits up to so many seconds until no request is in flight; whether none is.
        drain_seconds: how long requests in flight may go on once GENERATING begins, before they are paused.
        max_queued_nonces: most nonces waiting to be validated.
        stall_seconds: without progress for so long, `trouble` says so.
    """

    def __init__(
        self,
        manager: PoCManager,
        turns: Turns,
        callbacks: CallbackSender,
        metrics: Metrics,
        *,
        drain: Callable[[float], bool],
        drain_seconds: float,
        max_queued_nonces: int,
        stall_seconds: float,
    ) -> None:
        self._manager = manager
        self._turns = turns
        self._callbacks = callbacks
        self._metrics = metrics
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._max_queued_nonces = max_queued_nonces
        self._stall_seconds = stall_seconds
        self._condition = threading.Condition()
        self._jobs: collections.deque[_Job] = collections.deque()
        self._queued_nonces = 0
        self._holding = False
        self._closing = False
        self._idle = False
        self._progressed = time.monotonic()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="poc-proofs", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Stop after the batch that is being computed; what waits to be validated fails. Harmless twice."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        self._fail_jobs(RoundEndedError("the node is shutting down"))

    def wake(self) -> None:
        """Look at the manager's state anew: call it after every change."""
        with self._condition:
            self._wake()

    def _wake(self) -> None:
        if self._idle:
            self._progressed = time.monotonic()  # the clock of a stall begins with the work
        self._condition.notify_all()

    def submit(self, batch: ProofBatch) -> Future[ValidatedBatch]:
        """Queue ``batch`` to be validated.

        The result's errors are those of `PoCManager.validate`.

        Raises:
            QueueFullError: too many nonces wait already.
            IllegalTransitionError, ValueError: as `PoCManager.check_batch`, or the batch has more nonces than can ever
                wait.
        """
        config = self._manager.check_batch(batch)
        if len(batch) > self._max_queued_nonces:
            raise ValueError(f"a batch must have at most {self._max_queued_nonces} nonces, got {len(batch)}")
        result: Future[ValidatedBatch] = Future()
        with self._condition:
            if self._closing:
                raise RoundEndedError("the node is shutting down")
            if self._queued_nonces + _weight(batch) > self._max_queued_nonces:
                raise QueueFullError(
                    f"at most {self._max_queued_nonces} nonces can wait to be validated, {self._queued_nonces} do, "
                    f"and {len(batch)} came"
                )
            self._jobs.append(_Job(batch, config.callback_url, self._manager.validation(batch), result))
            self._queued_nonces += _weight(batch)
            self._wake()
        return result

    @property
    def queued_nonces(self) -> int:
        """Nonces waiting to be validated, those of the batch in work among them."""
        return self._queued_nonces

    def trouble(self) -> str | None:
        """Why the worker makes no progress; None if it does, or has nothing to do."""
        if not self._thread.is_alive():
            return "the proof thread is not running"
        if self._failure is not None:
            return f"proof batches fail: {self._failure}"
        silent = time.monotonic() - self._progressed
        if self._has_work() and silent > self._stall_seconds:
            return f"no proof batch for {silent:.0f} s in state {self._manager.state.value}"
        return None

    def _has_work(self) -> bool:
        return bool(self._jobs) or self._manager.state == PoCState.GENERATING

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with _own_stream(self._manager.engine.device):
                while self._wait():
                    self._step()
        except TurnsClosed:
            logger.info("the proof thread ends: the device is closed")
        finally:
            self._turns.release_inference()
            with self._condition:
                self._closing = True  # whatever ended it: nobody would compute what comes
            self._fail_jobs(RoundEndedError("the proof thread ended"))

    def _wait(self) -> bool:
        with self._condition:
            while not (self._closing or self._has_work() or self._holding):
                self._idle, self._failure = True, None
                self._condition.wait()
            self._idle = False
            return not self._closing

    def _step(self) -> None:
        generating = self._manager.state == PoCState.GENERATING
        if generating and not self._holding:
            self._hold_inference()
        elif self._holding and not generating:
            self._turns.release_inference()
            self._holding = False
            logger.info("inference goes on")
        failed = self._validate_some()
        if generating:
            failed = self._generate() or failed
        if failed:
            with self._condition:
                if not self._closing:
                    self._condition.wait(_RETRY_SECONDS)

    def _hold_inference(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        drained = False
        while self._manager.state == PoCState.GENERATING and not self._closing and not drained:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.warning("requests in flight are paused until the round's generating phase ends")
                break
            drained = self._drain(min(left, 0.1))
            self._progressed = time.monotonic()
        self._turns.hold_inference()
        self._holding = True

    def _generate(self) -> bool:
        """Compute the next batch of the round; whether that failed."""
        try:
            with self._turns.proof():
                config, batch = self._manager.advance()
        except (RoundEndedError, IllegalTransitionError):
            return False  # the state changed meanwhile: nothing to report
        except TurnsClosed:
            raise
        except Exception as error:
            self._failed(error)
            return True
        self._succeeded()
        valid = batch.below(config.r_target)
        if config.callback_url is not None and len(valid) > 0:
            self._callbacks.generated(config.callback_url, valid.to_dict())
        return False

    def _validate_some(self) -> bool:
        """One forward for the batch at the head of the queue; whether that failed."""
        with self._condition:
            if not self._jobs:
                return False
            job = self._jobs[0]
        verdict: ValidatedBatch | None = None
        error: Exception | None = None
        try:
            with self._turns.proof():
                verdict = next(job.steps)
        except TurnsClosed:
            raise
        except Exception as caught:
            error = caught
        if error is None and verdict is None:
            self._succeeded()
            return False
        with self._condition:
            if not self._jobs:
                return False  # `close` did not wait for this one
            self._jobs.popleft()
            self._queued_nonces -= _weight(job.batch)
        if verdict is None:
            assert error is not None
            _settle(job.result, error)
            if isinstance(error, (RoundEndedError, IllegalTransitionError, ValueError)):
                return False
            self._failed(error)
            return True
        self._succeeded()
        if verdict.fraud_detected:
            self._metrics.fraud()
            logger.warning(
                "fraud detected",
                extra={
                    "public_key": verdict.public_key,
                    "block_hash": verdict.block_hash,
                    "node_id": verdict.node_id,
                    "nonces": len(verdict),
                    "n_invalid": verdict.n_invalid,
                    "probability_honest": verdict.probability_honest,
                },
            )
        _settle(job.result, verdict)
        if job.callback_url is not None and verdict.received_dist:
            self._callbacks.validated(job.callback_url, verdict.to_dict())
        return False

    def _succeeded(self) -> None:
        self._progressed = time.monotonic()
        self._failure = None

    def _failed(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"
        self._metrics.batch_failed()
        logger.error("a proof batch failed, the next try follows", exc_info=error)

    def _fail_jobs(self, error: Exception) -> None:
        with self._condition:
            jobs, self._queued_nonces = list(self._jobs), 0
            self._jobs.clear()
        for job in jobs:
            _settle(job.result, error)


def _weight(batch: ProofBatch) -> int:
    return max(1, len(batch))  # batches of nothing fill a queue too


def _settle(future: Future[ValidatedBatch], outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever waited went away
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream of the thread's own on CUDA: the legacy default stream would wait for everybody's work."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
