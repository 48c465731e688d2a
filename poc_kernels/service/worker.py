"""The proof worker: one thread that computes all batches, those of the round and those to validate.

While GENERATING it pauses users; otherwise its slices share the device with them (`Device`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..protocol import IllegalTransitionError, NoVerdictError, PoCConfig, PoCManager, PoCState, RoundEndedError, Row
from ..protocol.prover import AHEAD
from ..scheduling import TurnsClosed
from .device import Device
from .line import cost, still_owed
from .queue import Forward, ValidationJob, ValidationQueue
from .settings import ServiceSettings

if TYPE_CHECKING:  # what they need, a process without a server may lack
    from .callbacks import CallbackSender
    from .metrics import Metrics

logger = logging.getLogger("poc_kernels")

_RETRY_SECONDS = 1.0
_MAX_FAILURES_AT_ONCE = 2
"""After more failed forwards in a row, even one that is another's waits: the device may be dead. One request can cause
two, a forward that it shares and its own, and delays nobody."""
_SHUTTING_DOWN = "the node is shutting down"


class ProofWorker:
    """Computes the batches of a `PoCManager`, and listens to its changes.

    Args:
        manager: whose rounds to run.
        device: shared with users.
        callbacks: where proofs and verdicts go.
        metrics: told of slices, failures and frauds.
        settings: of drain_seconds, stall_seconds, max_queued_nonces, max_queued_batches and result_seconds.
        clock: counts the seconds without progress.
    """

    def __init__(
        self,
        manager: PoCManager,
        device: Device,
        callbacks: CallbackSender,
        metrics: Metrics,
        settings: ServiceSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._device = device
        self._callbacks = callbacks
        self._metrics = metrics
        self._drain_seconds = settings.drain_seconds
        self._stall_seconds = settings.stall_seconds
        self.queue = ValidationQueue(
            settings.max_queued_nonces, settings.max_queued_batches, settings.result_seconds, self._ended
        )
        self._condition = threading.Condition()
        self._users_paused = False
        self._owed = 0
        """Positions that forwards to validate had beyond those of the generating round: see `still_owed`."""
        self._drain_end: float | None = None
        self._closing = False
        self._idle = False
        self._clock = clock
        self._progressed = clock()
        self._failure: str | None = None
        self._failures = 0
        """Failures since the last forward that succeeded."""
        self._thread = threading.Thread(target=self._run, name="poc-proofs", daemon=True)
        manager.on_change(self._round_changed)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Cancel what waits to be validated, and stop once the slice that runs is done. Idempotent."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self.queue.close(_SHUTTING_DOWN)
        self._device.cancel()  # a slice that waits for users is not waited for
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    @property
    def ended(self) -> bool:
        """Whether nothing is computed any more: it was closed, or its thread ended."""
        return self._closing

    def _round_changed(self) -> None:
        """Look at the manager's state anew. Validations of a round that ended end."""
        self.queue.cancel(lambda job: job.round.ended, "the round ended while the batch was validated")
        self._drain_left()
        self._notify()

    def _notify(self) -> None:
        with self._condition:
            if self._idle:
                self._progressed = self._clock()  # the clock of a stall begins with the work
            self._condition.notify_all()

    def enqueue(self, proof: Any, submitter: str, keep: bool = False, config: PoCConfig | None = None) -> ValidationJob:
        """Queue ``proof`` to be validated. Its future does not stop the work when nobody waits for it any more.

        A proof without nonces is judged at once: its job is done, and not kept.

        Args:
            proof: what a node claims.
            submitter: the queue is fair between submitters.
            keep: keep the outcome for `ValidationQueue.get`.
            config: what it is validated by; None for the round.

        Raises:
            QueueFullError: there is no room for it now.
            IllegalTransitionError, TypeError, ValueError: as `PoCManager.validation`, or the proof has more nonces than
                can ever wait.
            RoundEndedError: the worker is closed.
        """
        validation = self._manager.validation(proof, config)
        if validation.left == 0:
            return ValidationJob.judged(validation, submitter, self._manager.verdict(validation))
        job = self.queue.put(validation, submitter=submitter, keep=keep)
        if job.round.ended:  # since then: whoever ended the round may not have seen this job
            self._round_changed()
        self._notify()
        return job

    def trouble(self) -> str | None:
        """Return why the worker makes no progress; None if it does, or has nothing to do."""
        if not self._thread.is_alive():
            return "the proof thread is not running"
        if self._failure is not None:
            return f"proof batches fail: {self._failure}"
        silent = self._clock() - self._progressed
        # To wait for users is not to stall; that users let go of the device is for the engine's own watch to see to.
        if self._has_work() and silent > self._stall_seconds and not self._device.waiting:
            return f"no proof batch for {silent:.0f} s in state {self._manager.state.value}"
        return None

    def _has_work(self) -> bool:
        return self.queue.batches > 0 or self._manager.state == PoCState.GENERATING

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with self._device.lane():
                while self._wait():
                    if self._step():
                        self._before_retry()
        except TurnsClosed:
            logger.info("the proof thread ends: the device is closed")
        finally:
            with self._condition:
                self._closing = True  # whatever ended it: nobody would compute what comes
            self.queue.close("the proof thread ended")
            self._manager.stop_round()  # users would be refused until a round ends that nothing computes
            try:
                self._device.resume_users()
            except Exception:  # of a device that is gone, as its users are
                logger.exception("users could not be resumed when the proof thread ended")

    def _wait(self) -> bool:
        with self._condition:
            while not (self._closing or self._has_work() or self._users_paused):
                self._idle, self._failure, self._failures = True, None, 0
                self._condition.wait()
            self._idle = False
            return not self._closing

    def _step(self) -> bool:
        """Compute a forward to validate, and one of the round; return whether something failed.

        While a round generates, a turn to validate is worth a batch of it: the round gets at least half of the
        positions that are computed, however large the forwards to validate are. A batch of the round that fails takes
        no turns from them.
        """
        try:
            generating = self._manager.state == PoCState.GENERATING
            if generating and not self._users_paused:
                self._pause_users()
            self._resume_users()
            config = self._manager.config if self._users_paused and generating else None
            if config is None:
                self._owed = 0
                return self._validate_some()[1]
            worth = cost(config)
            had, failed = self._validate_some() if self._owed < worth else (0, False)
            self._owed = still_owed(self._owed, had, worth)
            if self._generate():
                failed, self._owed = True, 0
            return failed
        except TurnsClosed:
            raise
        except Exception as error:  # of the device: a proof's own are caught where it is computed
            self._failed(error)
            return True

    def _before_retry(self) -> None:
        """After a failure, wait a while or until something changes, unless another forward can run meanwhile."""
        with self._condition:
            others = self.queue.batches > 0 or self._failures == 0  # of a round, whose batch did not fail
            if not self._closing and (self._failures > _MAX_FAILURES_AT_ONCE or not others):
                self._condition.wait(_RETRY_SECONDS)

    def _drain_left(self) -> float | None:
        """Return the seconds until requests in flight are paused; None while nothing is generated.

        They count from the beginning of the phase, whatever forward is under way then.
        """
        with self._condition:
            if self._closing or self._manager.state != PoCState.GENERATING:
                self._drain_end = None
                return None
            if self._drain_end is None:
                self._drain_end = time.monotonic() + self._drain_seconds
            return self._drain_end - time.monotonic()

    def _pause_users(self, wait: bool = True) -> None:
        """Pause users once no request is in flight or the time of those in flight is over, unless the phase ends first.

        Args:
            wait: wait for that; else look once.
        """
        while (left := self._drain_left()) is not None:
            drained = left > 0 and self._device.drain_users(min(left, 0.1) if wait else 0.0)
            self._progressed = self._clock()
            if drained or left <= 0:
                if not drained:
                    logger.warning("requests in flight are paused until the round's generating phase ends")
                self._device.pause_users()
                self._users_paused = True
                return
            if not wait:
                return

    def _resume_users(self) -> None:
        """Resume users if the phase for which they are paused is over."""
        if self._users_paused and self._manager.state != PoCState.GENERATING:
            self._device.resume_users()
            self._users_paused = False
            logger.info("inference goes on")

    def _generate(self) -> bool:
        """Compute the next batch of the round; return whether that failed."""
        try:
            with self._slices():
                config, _, valid = self._manager.advance(self._pause, self._after_generated())
        except (RoundEndedError, IllegalTransitionError):
            return False  # the state changed meanwhile: nothing to report
        except TurnsClosed:
            raise
        except Exception as error:
            self._failed(error)
            return True
        self._succeeded()
        if config.callback_url is not None and len(valid) > 0:
            body, per_nonce = self._manager.form(config).generated_body(config, valid)
            self._callbacks.generated(config.callback_url, body, per_nonce=per_nonce, nonces=valid.nonces)
        return False

    def _validate_some(self) -> tuple[int, bool]:
        """Compute one forward of the batches whose turn it is; return what it cost, and whether it failed."""
        forward = self.queue.next()
        if forward is None:
            return 0, False
        had = cost(forward[0][0].round.config)
        try:
            with self._slices():
                shares = [(job.validation, nonces) for job, nonces in forward]
                self._manager.recompute(shares, self._pause, self._after_validated(forward))
        except TurnsClosed:
            raise
        except Exception as error:
            failed = self._count_failure(error)
            self.queue.failed(forward, error)  # last: whoever waits for it may look at what was counted
            return had, failed
        self._succeeded()
        for job in self.queue.computed(forward):
            self._judge(job)
        return had, False

    def _after_validated(self, forward: Forward) -> list[list[Row]]:
        """Return the rows of the forwards that follow one to validate, as far as is known: see `Prover.prove`."""
        config = forward[0][0].round.config
        if self._users_paused and self._manager.config is not config:
            return []  # the round's own batch comes next
        generated = self._manager.upcoming(config, AHEAD) if self._users_paused else []
        return _alternate(generated, self._to_validate(config, forward))

    def _after_generated(self) -> list[list[Row]]:
        """Return the rows of the forwards that follow a batch of the round."""
        config = self._manager.config
        if config is None:
            return []
        passed = self._owed // cost(config)  # turns that are not given to a forward to validate
        generated, forwards = self._manager.upcoming(config, 1 + AHEAD)[1:], self.queue.upcoming(1)
        if forwards and forwards[0][0][0].round.config is not config:
            return generated[:passed]
        return (generated[:passed] + _alternate(self._to_validate(config), generated[passed:]))[:AHEAD]

    def _to_validate(self, config: PoCConfig, after: Forward | None = None) -> list[list[Row]]:
        return [
            [row for job, nonces, before in forward for row in job.validation.rows(nonces, before)]
            for forward in self.queue.upcoming(AHEAD, after)
            if forward[0][0].round.config is config
        ]

    def _judge(self, job: ValidationJob) -> None:
        try:
            verdict = self._manager.verdict(job.validation)
        except Exception as error:
            self._count_failure(error)
            self.queue.finish(job, error)
            return
        if self.queue.finish(job, verdict):
            self._report(job, verdict)

    def _report(self, job: ValidationJob, verdict: Any) -> None:
        """Send a verdict to the callback_url; and what was computed for a request without claims."""
        config = job.validation.config
        url, form = config.callback_url, self._manager.form(config)
        if url is None:
            return
        of_request = {"request_id": job.id} if job.of_request else {}
        if verdict.judged:
            body = {**form.validated_body(config, verdict), **of_request}
            self._callbacks.validated(url, body, verdict.nonces)
        elif job.of_request:
            found = form.valid(config, verdict)
            generated = form.generated_body(config, found)
            self._callbacks.generated(
                url, {**generated.body, **of_request}, per_nonce=generated.per_nonce, nonces=found.nonces
            )

    def _count_failure(self, error: Exception) -> bool:
        """Count ``error`` of a validation if it is a failure of the device; return whether it is."""
        if isinstance(error, RoundEndedError):
            return False
        if isinstance(error, NoVerdictError):
            self._metrics.abstained()
        if isinstance(error, (ValueError, NoVerdictError)):
            logger.warning("a batch cannot be validated", exc_info=error)
            return False
        self._failed(error)
        return True

    def _ended(self, job: ValidationJob) -> None:
        waited = None if job.started is None else job.started - job.submitted
        self._metrics.validation_ended(job.state, waited)
        verdict = job.verdict
        if verdict is not None and verdict.fraud_detected:
            self._metrics.fraud()
            told = ("public_key", "block_hash", "node_id", "n_invalid", "probability_honest")
            fields = {name: getattr(verdict, name) for name in told}
            logger.warning("fraud detected", extra={**fields, "nonces": len(verdict)})

    @contextlib.contextmanager
    def _slices(self) -> Iterator[None]:
        """Have the device from the first slice of a batch to the last."""
        waited = self._device.take()
        try:
            self._metrics.waited(waited)
            self._progressed = self._clock()
            yield
        finally:
            seconds = self._device.give_back()
            if seconds > 0:
                self._metrics.slice(seconds)

    def _pause(self) -> None:
        """Let users have the device between two slices of a batch."""
        times = self._device.pause()
        self._metrics.waited(times.waited)
        self._metrics.slice(times.slice)
        self._progressed = self._clock()
        if self._closing:
            raise RoundEndedError(_SHUTTING_DOWN)
        self._resume_users()  # not only after a validation's forward
        if not self._users_paused and self._manager.state == PoCState.GENERATING:
            self._pause_users(wait=False)  # what is left of a validation's forward waits no more

    def _succeeded(self) -> None:
        self._progressed = self._clock()
        self._failure, self._failures = None, 0

    def _failed(self, error: Exception) -> None:
        self._failure = type(error).__name__  # whoever asks for the health may not learn more
        self._failures += 1
        self._metrics.batch_failed()
        logger.error("a proof batch failed, the next try follows", exc_info=error)


def _alternate(first: list[list[Row]], second: list[list[Row]]) -> list[list[Row]]:
    """Return the forwards of both, in turn, as far as a prover is told of them."""
    pairs = itertools.zip_longest(first, second)
    return [rows for pair in pairs for rows in pair if rows is not None][:AHEAD]
