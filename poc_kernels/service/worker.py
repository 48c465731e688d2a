"""The proof worker: one thread that computes all batches of a node, for its rounds and for proofs to validate.

While GENERATING it holds inference; otherwise its batches take turns with inference on the device (`Turns`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..protocol import IllegalTransitionError, PoCManager, PoCState, ProofBatch, RoundEndedError, ValidatedBatch
from ..scheduling import InFlight, PriorityLanes, Turns, TurnsClosed
from .queue import ValidationJob, ValidationQueue

if TYPE_CHECKING:  # what they need, a process without a server may lack
    from .callbacks import CallbackSender
    from .metrics import Metrics

logger = logging.getLogger("poc_kernels")

_RETRY_SECONDS = 1.0
_SHUTTING_DOWN = "the node is shutting down"


class ProofWorker:
    """Computes the batches of a `PoCManager`.

    Args:
        manager: whose rounds to run.
        turns: the device, shared with inference.
        streams: batches run on the stream of validation.
        callbacks: where proofs and verdicts go.
        metrics: told of failures and frauds.
        drain: waits up to so many seconds until no request is in flight; whether none is.
        drain_seconds: how long requests in flight may go on once GENERATING begins, before they are paused.
        max_queued_nonces: most nonces waiting to be validated, and most nonces of results that are kept.
        result_seconds: how long results are kept.
        stall_seconds: without progress for so long, `trouble` says so.
        max_slices_in_flight: slices that a GPU is given before the first of them is done.
        low_priority: compute in a thread of the lowest priority, where threads have priorities: for turns that hold no
            slice back.
    """

    def __init__(
        self,
        manager: PoCManager,
        turns: Turns,
        streams: PriorityLanes,
        callbacks: CallbackSender,
        metrics: Metrics,
        *,
        drain: Callable[[float], bool],
        drain_seconds: float,
        max_queued_nonces: int,
        stall_seconds: float,
        result_seconds: float = 3600.0,
        max_slices_in_flight: int = 2,
        low_priority: bool = False,
    ) -> None:
        self._manager = manager
        self._turns = turns
        self._low_priority = low_priority and streams.lowers_threads
        # A thread of low priority stands still where inference computes: it pays with what it computed itself.
        self._turn = turns.proof(time.thread_time if self._low_priority else None)
        self._streams = streams
        self._in_flight = InFlight(manager.engine.device, max_slices_in_flight)
        self._callbacks = callbacks
        self._metrics = metrics
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._stall_seconds = stall_seconds
        self.queue = ValidationQueue(max_queued_nonces, result_seconds, self._ended)
        self._condition = threading.Condition()
        self._holding = False
        self._drain_end: float | None = None
        self._closing = False
        self._idle = False
        self._progressed = time.monotonic()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="poc-proofs", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Cancel what waits to be validated, and stop once the slice that runs is done. Harmless twice."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self.queue.close(_SHUTTING_DOWN)
        self._turn.cancel()  # a slice that is held back is not waited for
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def wake(self) -> None:
        """Look at the manager's state anew: call it after every change. Validations of a round that ended end."""
        self.queue.cancel(self._is_over, "the round ended while the batch was validated")
        self._drain_left()
        self._notify()

    def _notify(self) -> None:
        with self._condition:
            if self._idle:
                self._progressed = time.monotonic()  # the clock of a stall begins with the work
            self._condition.notify_all()

    def _is_over(self, job: ValidationJob) -> bool:
        return self._manager.state == PoCState.STOPPED or self._manager.config is not job.config

    def enqueue(self, batch: ProofBatch, submitter: str, keep: bool = False) -> ValidationJob:
        """Queue ``batch`` to be validated.

        Args:
            submitter: between whom the queue is fair.
            keep: keep the outcome for `ValidationQueue.get`.

        Raises:
            QueueFullError: there is no room for it now.
            IllegalTransitionError, ValueError: as `PoCManager.check_batch`, or the batch has more nonces than can ever
                wait.
            RoundEndedError: the worker is closed.
        """
        config = self._manager.check_batch(batch)
        steps = self._manager.validation(batch, self._pause)
        job = self.queue.put(steps, nonces=len(batch), config=config, submitter=submitter, keep=keep)
        if self._is_over(job):  # since `check_batch`: whoever ended the round may not have seen this job
            self.wake()
        self._notify()
        return job

    def submit(self, batch: ProofBatch, submitter: str = "this process") -> Future[ValidatedBatch]:
        """`enqueue`; the result's errors are those of `PoCManager.validate`. Who stops waiting does not stop it."""
        return self.enqueue(batch, submitter).future

    @property
    def queued_nonces(self) -> int:
        """Nonces waiting to be validated, those of the batch in work among them."""
        return self.queue.nonces

    def trouble(self) -> str | None:
        """Why the worker makes no progress; None if it does, or has nothing to do."""
        if not self._thread.is_alive():
            return "the proof thread is not running"
        if self._failure is not None:
            return f"proof batches fail: {self._failure}"
        silent = time.monotonic() - self._progressed
        # Held back is not stalled; that inference lets go of the device is for `Inference.trouble` to see to.
        if self._has_work() and silent > self._stall_seconds and not self._turn.waiting:
            return f"no proof batch for {silent:.0f} s in state {self._manager.state.value}"
        return None

    def _has_work(self) -> bool:
        return self.queue.batches > 0 or self._manager.state == PoCState.GENERATING

    # ---- the thread ----

    def _run(self) -> None:
        try:
            if self._low_priority:
                self._streams.lower_thread()
            with self._streams.validation():
                while self._wait():
                    self._step()
        except TurnsClosed:
            logger.info("the proof thread ends: the device is closed")
        finally:
            self._turns.resume_inference()
            with self._condition:
                self._closing = True  # whatever ended it: nobody would compute what comes
            self.queue.close("the proof thread ended")

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
            self._pause_inference()
        self._resume_inference()
        failed = self._validate_some()
        if self._holding and generating:
            failed = self._generate() or failed
        if failed:
            with self._condition:
                if not self._closing:
                    self._condition.wait(_RETRY_SECONDS)

    def _drain_left(self) -> float | None:
        """Seconds until requests in flight are paused; None where nothing is generated.

        They begin with the phase, whatever forward is under way then.
        """
        with self._condition:
            if self._closing or self._manager.state != PoCState.GENERATING:
                self._drain_end = None
                return None
            if self._drain_end is None:
                self._drain_end = time.monotonic() + self._drain_seconds
            return self._drain_end - time.monotonic()

    def _pause_inference(self, wait: bool = True) -> None:
        """Once no request is in flight, or those that are had their time; without ``wait`` only if that is so now.

        Not if the phase ends meanwhile.
        """
        while (left := self._drain_left()) is not None:
            drained = left > 0 and self._drain(min(left, 0.1) if wait else 0.0)
            self._progressed = time.monotonic()
            if drained or left <= 0:
                if not drained:
                    logger.warning("requests in flight are paused until the round's generating phase ends")
                self._turns.pause_inference()
                self._holding = True
                return
            if not wait:
                return

    def _resume_inference(self) -> None:
        """Once the phase is over for which it is held."""
        if self._holding and self._manager.state != PoCState.GENERATING:
            self._turns.resume_inference()
            self._holding = False
            logger.info("inference goes on")

    def _generate(self) -> bool:
        """Compute the next batch of the round; whether that failed."""
        try:
            with self._device():
                config, batch = self._manager.advance(self._pause)
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
            self._callbacks.generated(config.callback_url, valid.to_dict(), per_nonce=("nonces", "dist"))
        return False

    def _validate_some(self) -> bool:
        """One forward for the batch whose turn it is; whether that failed."""
        job = self.queue.next()
        if job is None:
            return False
        try:
            with self._device():
                verdict = next(job.steps)
        except TurnsClosed:
            raise
        except Exception as error:
            self.queue.finish(job, error)
            if isinstance(error, (RoundEndedError, ValueError)):
                return False  # no failure of the device
            self._failed(error)
            return True
        self._succeeded()
        if verdict is None:
            self.queue.advance(job)
        elif self.queue.finish(job, verdict) and job.config.callback_url is not None and verdict.received_dist:
            self._callbacks.validated(job.config.callback_url, verdict.to_dict())
        return False

    def _ended(self, job: ValidationJob) -> None:
        waited = None if job.started is None else job.started - job.submitted
        self._metrics.validation_ended(job.state, waited)
        verdict = job.verdict
        if verdict is not None and verdict.fraud_detected:
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

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        """The device, for the first slice of a batch; it is given back after the last."""
        asked = time.monotonic()
        with self._turn:
            self._metrics.waited(time.monotonic() - asked)
            self._progressed = time.monotonic()
            try:
                yield
            finally:
                seconds = self._turn.end()
                if seconds > 0:
                    self._metrics.slice(seconds)

    def _pause(self) -> None:
        """Between two slices of a batch."""
        self._in_flight.mark()
        asked = time.monotonic()
        seconds = self._turn.pause()
        self._metrics.waited(time.monotonic() - asked)
        self._metrics.slice(seconds)
        self._progressed = time.monotonic()
        if self._closing:
            raise RoundEndedError(_SHUTTING_DOWN)
        self._resume_inference()  # not only after a validation's forward
        if not self._holding and self._manager.state == PoCState.GENERATING:
            self._pause_inference(wait=False)  # what is left of a validation's forward is held back no more

    def _succeeded(self) -> None:
        self._progressed = time.monotonic()
        self._failure = None

    def _failed(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"
        self._metrics.batch_failed()
        logger.error("a proof batch failed, the next try follows", exc_info=error)
