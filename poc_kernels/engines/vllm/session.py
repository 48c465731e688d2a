"""Proofs in a worker of vLLM, in slices, in the thread that computes users' steps.

Slices run where users wait for them least:

- While users compute nothing, in the API server's RPC, which the engine runs between two looks at its queue. It ends
  when a user comes, or else, where that is not seen, after some milliseconds: a first token waits for it.
- While users' steps follow each other, before a step: by then the tokens of the step before are on their way to the
  users, which they are not yet after the worker's ``execute_model`` or ``sample_tokens``. On CUDA the slice is only
  launched there, on a stream of its own, and overlaps with the step. A first step, which nobody's step precedes, waits
  for nothing. A step with prompts is long as it is, and somebody's first token: a slice waits for another one, if
  little is owed.

Never in a thread of their own: kernels of vLLM's CPU build keep scratch memory for which two threads would race.

With several ranks, collectives of slices and of steps have to come in the same order on each. So all that decides is
the messages and vLLM's own scheduler output, which are the same on all ranks, and never a clock. A rank that fails
where the others do not is out of step with them for good. Its next step's collectives would meet those of the others'
slices, so it computes nothing any more: its process ends, and vLLM's engine with it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch

from ...protocol import EngineProver, Outcomes, PoCConfig, Prover, Row
from ...protocol.limits import SERVER_BOUNDS
from ...scheduling import InFlight
from ...scheduling.slices import Pause
from . import trial
from .arrivals import arrivals_at
from .engine import VllmEngine
from .memory import lacking_memory
from .messages import Begin, Begun, Open, Opened, Progress, Run, Trial, Tried, pack, unpack
from .pacing import ClockedDebt, CountedDebt, Counters, averaged
from .resumable import Resumable

logger = logging.getLogger("poc_kernels")

_ATTRIBUTE = "_poc_kernels_session"
UNCUT_SECONDS = 1e9
"""Length of slices outside the forward where ranks must pause at the same places: they are not cut by time."""
_MAX_SLICES_IN_FLIGHT = 2
_PROMPTS = 2.0
"""Times the usual tokens: a step of more has prompts among them."""
_MAX_STEPS_UNASKED = 64
"""After so many steps without a message, nobody waits for proofs any more: users' steps owe nothing then."""


class SessionEngine(Protocol):
    """What a session needs of an engine besides what its prover does: see `VllmEngine`."""

    device: torch.device

    def refresh(self) -> bool:
        """Use the weights that the served model has now; return whether they were replaced."""

    def context(self) -> AbstractContextManager[None]:
        """Return what each slice runs in: on a GPU, a stream of low priority as well."""

    def forget(self) -> None:
        """Give back what is kept from forward to forward."""

    def all_ranks_failed(self) -> bool:
        """Wait a while until all ranks have called this; return whether they have."""


class Session:
    """The proofs of one worker. Every method is called in the thread that computes its steps.

    Args:
        worker: vLLM's worker: its ``execute_model`` is wrapped until `close`.
        engine: computes on its model.
        prover: computes proofs on the engine.
        lockstep: whether other ranks compute the same: then counts decide, not clocks.
        users_are_there: tells whether a user's request is in the server.
        clock: counts seconds.
    """

    def __init__(
        self,
        worker: Any,
        engine: SessionEngine,
        prover: Prover,
        *,
        lockstep: bool = False,
        users_are_there: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counters = Counters()
        self.engine, self.prover = engine, prover
        self.lockstep, self._clock = lockstep, clock
        self._users_are_there = users_are_there
        self._clocked, self._counted = ClockedDebt(self.counters), CountedDebt()
        self._debt = self._counted if lockstep else self._clocked
        self._in_flight = InFlight(engine.device, _MAX_SLICES_IN_FLIGHT)
        self._round: str | None = None
        self._config: PoCConfig | None = None
        self._rows: collections.OrderedDict[str, list[Row]] = collections.OrderedDict()
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._running: tuple[str, Resumable[Outcomes]] | None = None
        self._busy = False
        self._usual_tokens = 0.0  # of a step; the same on every rank
        self._steps_unasked = 0
        self._step_began: float | None = None
        self._sliced_since = 0.0  # seconds of slices since the last step began
        self._worker, self._execute_model = worker, worker.execute_model
        worker.execute_model = self._wrapped(worker.execute_model)

    # ---- commands ----

    def begin(self, message: Begin) -> Begun:
        """Begin a round, in place of the one before, whose jobs are cancelled."""
        self._cancel_all()
        self._round = self._config = None
        try:
            config = PoCConfig(**message.config)
            self.prover.check(config)
            refreshed = self.engine.refresh()
            lacking = lacking_memory(cast(VllmEngine, self.engine), cast(EngineProver, self.prover), config)
        except Exception as error:
            logger.exception("a round cannot be computed in this worker")
            if self.engine.device.type == "cuda":  # the other ranks may be in the forwards that measure memory
                self._stay_in_step()
            return Begun(refusal=f"{type(error).__name__}: {error}")
        if lacking is not None:
            return Begun(refusal=lacking)
        self._round, self._config = message.round, config
        return Begun(refreshed=refreshed)

    def run(self, message: Run) -> Progress:
        """Take on and cancel jobs as the message says, compute a while, and tell of it."""
        if message.round == self._round:
            self._steps_unasked = 0
            try:
                self._compute(message)
            except Exception as error:
                if self.lockstep:  # the others compute on
                    logger.exception("proofs failed in a call")
                    self._give_up(error)
                raise
        return Progress(
            round=self._round,
            jobs=[*self._outcomes, *self._rows],
            outcomes=dict(self._outcomes),
            counters=self.counters.told(),
        )

    def _compute(self, message: Run) -> None:
        """Take on and cancel jobs as the message says, and compute a while."""
        self._reconcile(message.jobs, message.rows)
        self._clocked.share = message.share
        self._counted.slices_per_1000_steps = message.slices_per_1000_steps
        if message.alone:
            self._users_left()
        if not self._busy:
            self._run_between(message.slices, message.seconds, message.seconds_without_users)

    def close(self) -> None:
        """Cancel everything, and leave the worker as it was. Idempotent."""
        self._cancel_all()
        self._round = self._config = None
        self.engine.forget()
        self._worker.execute_model = self._execute_model

    # ---- steps ----

    def _wrapped(self, execute_model: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(execute_model)
        def after_what_is_owed(scheduler_output: Any, *arguments: Any, **named: Any) -> Any:
            try:
                self._before_step(scheduler_output)
            except Exception as error:  # whatever it is, it is not the users'
                logger.exception("proofs failed between two steps")
                self._give_up(error)
            return execute_model(scheduler_output, *arguments, **named)

        return after_what_is_owed

    def _before_step(self, scheduler_output: Any) -> None:
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens == 0:  # the last request has ended, and is taken off the books
            self._users_left()
            return
        self.counters.steps += 1
        self.counters.tokens += tokens
        self._steps_unasked += 1
        if self._step_began is not None:  # of whomever: where each asks for one token, all steps are first ones
            seconds = max(0.0, self._clock() - self._step_began - self._sliced_since)
            self.counters.count_step(seconds)
            if self._waits and self._steps_unasked <= _MAX_STEPS_UNASKED:
                self._debt.owe(seconds)
            self._run_between_steps(has_prompts=tokens > _PROMPTS * self._usual_tokens)
        self._usual_tokens = averaged(self._usual_tokens, tokens)
        self._busy = True
        self._step_began, self._sliced_since = self._clock(), 0.0

    def _users_left(self) -> None:
        """Take it that no step follows the last: no user waits for slices now."""
        self._busy, self._step_began = False, None
        self._debt.forgive()

    # ---- slices ----

    @property
    def _waits(self) -> bool:
        """Whether there is something to compute."""
        return self._running is not None or bool(self._rows)

    def _run_between_steps(self, has_prompts: bool) -> None:
        """Run the slices that steps owe, before a step."""
        if not (self._waits and self._debt.due()) or (has_prompts and self._debt.can_wait()):
            return
        with self.engine.context():
            # A GPU that is behind is not given more: the step would wait, and what is owed stays owed.
            while self._waits and self._debt.due() and (self.lockstep or self._in_flight.has_room()):
                self._debt.pay(self._run_slice(between_steps=True))

    def _run_between(self, slices: int, seconds: float, seconds_without_users: float) -> None:
        """Run at least so many slices, and more while seconds are left: others where no user is there, until one is."""
        if not self._waits:
            return
        began = self._clock()
        nobody_is_there = seconds_without_users > 0 and not self._users_are_there()
        seconds = seconds_without_users if nobody_is_there else seconds

        def goes_on() -> bool:
            # The clocks of several ranks would not agree.
            return seconds > 0 and self._clock() - began < seconds and not (nobody_is_there and self._users_are_there())

        with self.engine.context():
            while self._waits and (slices > 0 or goes_on()):
                self._run_slice(between_steps=False)
                slices -= 1

    def _run_slice(self, between_steps: bool) -> float:
        """Run a slice of the first job; return its seconds."""
        began = self._clock()
        job, resumable = self._running or self._begin_job()
        if resumable.step():
            self._running = None
            self._outcomes[job] = _outcome(resumable)
            del self._rows[job]
            if resumable.error is not None:
                self._stay_in_step()
        self._in_flight.mark(wait=not between_steps)
        seconds = self._clock() - began
        self._sliced_since += seconds
        if self.engine.device.type == "cuda":
            seconds = self._device_seconds(seconds, between_steps)
        self.counters.count_slice(seconds, between_steps)
        return seconds

    def _device_seconds(self, seconds: float, between_steps: bool) -> float:
        """Return how long a GPU computes a slice, where the clock of the host saw its launch."""
        slices = self.prover.slices
        if slices is not None:
            return sum(slices.seconds) / len(slices.seconds)
        if between_steps:  # nobody waited for it; in calls, slices are launched as fast as they are computed
            return self.counters.mean_slice_seconds or seconds
        return seconds

    def _begin_job(self) -> tuple[str, Resumable[Outcomes]]:
        job, rows = next(iter(self._rows.items()))
        config = self._config
        assert config is not None

        def body(pause: Pause) -> Outcomes:
            return self.prover.prove(config, rows, pause)

        self._running = job, Resumable(body)
        return self._running

    # ---- jobs ----

    def _reconcile(self, wanted: list[str], rows: Mapping[str, list[tuple[str, int]]]) -> None:
        """Have the jobs that are wanted, in their order; one that has begun goes on first."""
        if self._running is not None and self._running[0] not in wanted:
            self._cancel_running()
        self._outcomes = {job: outcome for job, outcome in self._outcomes.items() if job in wanted}
        known = self._rows
        self._rows = collections.OrderedDict()
        for job in wanted:
            if job not in self._outcomes and (job in known or job in rows):
                self._rows[job] = known.get(job) or [Row(*row) for row in rows[job]]

    def _cancel_running(self) -> None:
        if self._running is not None:
            _, resumable = self._running
            self._running = None
            with self.engine.context():
                resumable.cancel()

    def _give_up(self, error: Exception) -> None:
        """End every job with an error that is none of its own."""
        if self._running is not None:
            _, resumable = self._running
            self._running = None
            with contextlib.suppress(Exception):  # not in the engine's context, which may be what failed
                resumable.cancel()
        self._outcomes.update((job, _failed(error)) for job in self._rows)
        self._rows.clear()
        self._stay_in_step()

    def _stay_in_step(self) -> None:
        if self.lockstep:
            _stay_in_step(self.engine)

    def _cancel_all(self) -> None:
        self._cancel_running()
        self._rows.clear()
        self._outcomes.clear()


def _stay_in_step(engine: SessionEngine) -> None:
    """After a failure, end this process unless all ranks failed: the others would wait in a collective for ever."""
    if not engine.all_ranks_failed():
        logger.critical("a proof failed on this rank alone, which is out of step with the others: the worker ends")
        _end_process()


def _end_process() -> None:
    """End this process at once: vLLM tells users that the engine died when it is gone, and not before.

    An orderly end takes seconds of a core, for which the others have no time to spare while they wait in a collective.
    And it destroys what the ranks have in common, for which NCCL may wait until the others do so too.
    """
    os._exit(1)


@contextlib.contextmanager
def _in_step(engine: SessionEngine, lockstep: bool) -> Iterator[None]:
    """Have what fails inside the block come through, where it fails on all ranks of several; else see above."""
    try:
        yield
    except Exception:
        if lockstep:
            logger.exception("proofs cannot be tried in this worker")
            _stay_in_step(engine)
        raise


def _outcome(resumable: Resumable[Outcomes]) -> dict[str, Any]:
    """Return what a job came to, as a message."""
    error = resumable.error
    if error is not None:
        logger.error("a proof batch failed in this worker", exc_info=error)
        return _failed(error)
    values, part_seconds = resumable.result
    return {"values": list(values), "part_seconds": dict(part_seconds)}


def _failed(error: BaseException) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}


# ---- the RPC method ----


def call(worker: Any, command: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a command of the API server: see `poc_kernels.engines.vllm.messages`.

    Raises:
        ValueError: there is no such command, or no session yet.
    """
    if command == "open":
        return pack(_open(worker, unpack(Open, payload)))
    session: Session | None = getattr(worker, _ATTRIBUTE, None)
    if session is None:
        raise ValueError(f"command {command!r} needs a session, and there is none: open comes first")
    if command == "trial":
        return pack(_try(session, unpack(Trial, payload)))
    if command == "begin":
        return pack(session.begin(unpack(Begin, payload)))
    if command == "run":
        return pack(session.run(unpack(Run, payload)))
    if command == "close":
        delattr(worker, _ATTRIBUTE)
        session.close()
        return {}
    raise ValueError(f"command must be open, trial, begin, run or close, got {command!r}")


def _try(session: Session, message: Trial) -> Tried:
    """Try the engine of a session, which has no jobs yet."""
    engine = cast(VllmEngine, session.engine)
    with _in_step(engine, session.lockstep):
        differs = trial.compare(engine, message.texts, message.served)
        # In any case: other ranks compute it, and would wait for this one.
        depends = trial.independence(engine, transforms=message.transforms)
    return Tried(refusal=differs or depends)


def _open(worker: Any, message: Open) -> Opened:
    """Make the session of a worker, in place of the one that it has."""
    before: Session | None = getattr(worker, _ATTRIBUTE, None)
    if before is not None:
        delattr(worker, _ATTRIBUTE)
        before.close()
    lockstep = worker.vllm_config.parallel_config.world_size > 1
    try:
        engine = VllmEngine(
            worker, slice_seconds=message.slice_seconds, cuda_graphs=message.cuda_graphs, lockstep=lockstep
        )
        slice_seconds = UNCUT_SECONDS if lockstep else message.slice_seconds
        prover = EngineProver(engine, slice_seconds=slice_seconds, bounds=SERVER_BOUNDS)
    except ValueError as error:
        return Opened(refusal=str(error))
    layers, no_layers = 0, None
    try:
        layers = engine.layers
    except ValueError as error:
        no_layers = str(error)
        if lockstep:  # where it is a failure of this rank alone, the others are in the next forward of their search
            _stay_in_step(engine)
    with _in_step(engine, lockstep):
        if (lacking := lacking_memory(engine, prover)) is not None:
            return Opened(refusal=lacking)
        with engine.context():
            prover.compile_kernels()
    users_are_there = arrivals_at(message.arrivals)
    session = Session(worker, engine, prover, lockstep=lockstep, users_are_there=users_are_there)
    setattr(worker, _ATTRIBUTE, session)
    return Opened(
        model_type=engine.model_type,
        hidden_size=engine.hidden_size,
        vocab_size=engine.vocab_size,
        max_positions=engine.max_positions,
        layers=layers,
        no_layers=no_layers,
        windows=list(engine.windows),
        dtype=str(engine.dtype).removeprefix("torch."),
        device=str(engine.device),
    )
