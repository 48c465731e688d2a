"""The prover and the device of rounds in vLLM's API server; what computes is a `Session` in each worker.

The proofs' thread pumps: one bounded RPC after another, each saying which jobs are wanted. While users compute nothing,
the RPCs compute slices; while users are served, slices run between their steps, and RPCs only fetch what is done. The
next RPC is under way while an outcome is handled, or the workers would compute nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from ...protocol import EngineProver, Outcomes, PoCConfig, Row
from ...protocol.engine import Engine, never
from ...protocol.form import ProofForm
from ...protocol.limits import SERVER_BOUNDS
from ...scheduling import Pacing, Slices, TurnsClosed
from ...scheduling.slices import Pause
from ...service.device import SliceTimes
from . import compat, trial
from .arrivals import Arrivals
from .link import EngineError, Link, UnderWay, unless_lost
from .messages import METHOD, Begin, Begun, Open, Opened, Progress, Run, Trial, Tried, pack, unpack
from .pacing import slices_per_1000_steps

logger = logging.getLogger("poc_kernels")

_IDLE_SECONDS = 0.004
"""Of slices per RPC while a user is there who computes nothing: a first token waits that much longer at most."""
_ALONE_SECONDS = 0.2
"""While none is there, or users are paused: it ends when one comes, and a phase that much later at most. Between two
RPCs a worker computes nothing for some milliseconds, and then finds its caches and its threads cold."""
_POLL_SECONDS = 0.02
"""Between two RPCs while users are served: each delays their next step by its overhead."""
_RESUME_SECONDS = 1.0
"""For which the end of a server waits until the engine lets users go on: once vLLM ends it, it takes no call."""
_LOOK_SECONDS = 0.001
"""Between two looks at whether users are still served: it costs the engine nothing."""
_STILL_SECONDS = 0.25
"""Without a step after they came, users' requests do not compute, whatever they wait for."""
_FIRST_SLICES = 4
"""Of an RPC to several ranks, before a slice was timed."""
_MAX_SLICES = 1000
_OPEN_SECONDS = 1800.0
"""In which a worker has compiled its kernels and tried its model, however slow it is: longer is to hang."""
_AGAIN_SECONDS = (0.01, 0.1, 0.5)
"""After which a call that failed is made again."""


class RemoteDevice:
    """The device of vLLM's workers: a `Device` of the service.

    Args:
        link: to the engine.
        share: fraction of the device that validation is guaranteed while users' steps follow each other.
        ranks: how many workers compute each forward.
        arrivals: counts users' requests from their heads on; None where the engine's own count has to do.
    """

    def __init__(self, link: Link, *, share: float, ranks: int = 1, arrivals: Arrivals | None = None) -> None:
        self.link, self.ranks, self._arrivals = link, ranks, arrivals
        self.pacing = Pacing(share=share)
        self.counters: Mapping[str, float] = {}
        """Of the first worker, as it told last: see `poc_kernels.engines.vllm.pacing.Counters`."""
        self.waiting = False
        self._users_paused = False
        self._slice_seconds = self._taken_at = 0.0
        self._steps, self._stepped = -1.0, time.monotonic()
        self._users_were_there, self._looked = False, time.monotonic()

    # ---- for the proofs' thread ----

    def lane(self) -> AbstractContextManager[None]:
        """Return nothing to run in: slices have their lane in the workers."""
        return contextlib.nullcontext()

    def take(self) -> float:
        """Have the device at once, for what the workers let through: see `Device.take`."""
        self.link.check()
        self._slice_seconds, self._taken_at = 0.0, time.monotonic()
        return 0.0

    def pause(self) -> SliceTimes:
        """End what the workers computed since the last pause as one slice: see `Device.pause`."""
        slice_seconds, began = self._slice_seconds, self._taken_at
        self.take()
        return SliceTimes(slice_seconds, max(0.0, self._taken_at - began - slice_seconds))

    def give_back(self) -> float:
        """End the last slice: see `Device.give_back`."""
        seconds, self._slice_seconds = self._slice_seconds, 0.0
        return seconds

    def cancel(self) -> None:
        """Let the proofs' thread never have the device again: see `Device.cancel`."""
        self.link.cancel()

    def drain_users(self, timeout_seconds: float) -> bool:
        """Wait until no request is in flight: see `Device.drain_users`."""
        deadline = time.monotonic() + timeout_seconds
        while self._users() > 0:
            left = deadline - time.monotonic()
            if left <= 0 or self.link.cancelled:
                return False
            self.link.sleep(min(left, _LOOK_SECONDS))
        return True

    def pause_users(self) -> None:
        """Have vLLM's scheduler give no tokens to requests in flight; they and their KV cache stay."""
        client = self.link.client
        try:
            self.link.call(lambda: client.pause_generation(mode="keep", clear_cache=False))
        except BaseException:  # perhaps it was done, and only its answer lost
            self.link.drop(client.resume_generation)
            raise
        self._users_paused = True

    def resume_users(self) -> None:
        """Undo `pause_users`. Idempotent."""
        if self._users_paused:
            resume = self.link.client.resume_generation
            if self.link.lost is not None or self.link.cancelled:  # the loop may wait for this very thread
                self.link.drop(resume, _RESUME_SECONDS)
            else:
                self.link.call(resume)
            self._users_paused = False

    def status(self) -> dict[str, Any]:
        """Return how users and proofs share the workers, for people."""
        return {"ranks": self.ranks, "users_paused": self._users_paused, "lost": self.link.lost, **self.counters}

    # ---- for the prover ----

    def told(self, progress: Progress) -> None:
        """Take what the first worker told of its steps and slices."""
        now, before = time.monotonic(), self.counters
        self.counters = progress.counters
        self._slice_seconds += max(0.0, self.counters["slice_seconds"] - before.get("slice_seconds", 0.0))
        if self.counters["steps"] != self._steps:
            self._steps, self._stepped = self.counters["steps"], now

    def budget(self) -> dict[str, Any]:
        """Return the fields of the next `Run` that say how much to compute."""
        share = self.pacing.share
        alone, means = self.users_compute_nothing(), ("mean_step_seconds", "mean_slice_seconds")
        step_seconds, slice_seconds = (self.counters.get(name, 0.0) for name in means)
        seconds = _ALONE_SECONDS if self._users_paused else _IDLE_SECONDS
        if self.ranks == 1:
            without_users = 0.0 if self._users_paused or self._users() > 0 else _ALONE_SECONDS
            return {"alone": alone, "share": share, "seconds": seconds, "seconds_without_users": without_users}
        slices = _FIRST_SLICES if slice_seconds <= 0 else max(1, min(_MAX_SLICES, int(seconds / slice_seconds)))
        between = slices_per_1000_steps(share, step_seconds, slice_seconds)
        return {"alone": alone, "share": share, "slices": slices, "slices_per_1000_steps": between}

    def wait_for_users(self) -> None:
        """Wait until the next RPC is worth what it delays: a while, or until no user is served any more.

        Whoever has just come is served: the engine gets their request in some milliseconds.
        """
        self.waiting = True
        try:
            deadline = time.monotonic() + _POLL_SECONDS
            while time.monotonic() < deadline and not self.users_compute_nothing() and not self.link.cancelled:
                self.link.sleep(_LOOK_SECONDS)
        finally:
            self.waiting = False

    def users_compute_nothing(self) -> bool:
        """Tell whether no user waits for a step, as far as is known."""
        before, self._users_were_there = self._users_were_there, self._users() > 0
        looked, self._looked = self._looked, time.monotonic()
        if self._users_were_there and (not before or self._looked - looked > _STILL_SECONDS):
            self._stepped = self._looked  # they came, or what they did meanwhile is not known
        still = self._looked - self._stepped > _STILL_SECONDS
        return self._users_paused or still or not self._users_were_there

    def _users(self) -> int:
        in_engine = self.link.users()
        return in_engine if self._arrivals is None else max(in_engine, self._arrivals.count)


@dataclass
class _Job:
    """A forward that the workers were told of."""

    rows: tuple[Row, ...]
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    put: bool = False
    """Whether the workers have it, as far as is known."""
    outcome: Mapping[str, Any] | None = None


class _Call(NamedTuple):
    """A `Run` whose answer was not taken yet."""

    message: Mapping[str, Any]
    under_way: UnderWay[list[dict[str, Any]]]


class RemoteModel:
    """What is known here of the model in the workers: of an `Engine`, all that the check of a round reads.

    Args:
        opened: what a worker told.
    """

    def __init__(self, opened: Opened) -> None:
        self.model_type, self.hidden_size, self.vocab_size = opened.model_type, opened.hidden_size, opened.vocab_size
        self.max_positions, self.dtype = opened.max_positions, getattr(torch, opened.dtype)
        self.device = torch.device("cpu")  # nothing is computed here
        self._opened = opened

    @property
    def layers(self) -> int:
        """Number of decoder layers; raises a ValueError where no transform is possible after them."""
        if self._opened.no_layers is not None:
            raise ValueError(self._opened.no_layers)
        return self._opened.layers


class RemoteProver:
    """Computes proofs of every form in vLLM's workers: a `Prover` of the protocol.

    Args:
        device: of the workers.
        opened: what one of them told of its model.
    """

    forms: Mapping[str, ProofForm] = EngineProver.forms
    slices: Slices | None = None

    def __init__(self, device: RemoteDevice, opened: Opened) -> None:
        self.model = RemoteModel(opened)
        self._checks = EngineProver(cast(Engine, self.model), bounds=SERVER_BOUNDS)
        self.device, self._link = device, device.link
        self._config: PoCConfig | None = None
        self._round = ""
        self._jobs: list[_Job] = []
        self._call: _Call | None = None
        self.refreshed = 0
        """How often weights were found to be replaced."""

    def check(self, config: PoCConfig) -> None:
        """Raise a ValueError if the round does not fit the model. It asks no worker."""
        self._checks.check(config)

    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        """Have the workers compute rows and, while they are at it, what follows: see `Prover.prove`.

        Raises:
            EngineLost: there is no engine any more.
            EngineError: a worker failed, at these rows or at every call.
            TimeoutError: the engine did not answer in time.
            ValueError: the round cannot be computed in the workers.
        """
        try:
            self._want(config, [rows, *then])
            job = self._jobs[0]
            while job.outcome is None:
                if self._config is not config:
                    self._begin(config, pause)
                self._take_answer(self._call or self._send(), pause)
                if job.outcome is None:
                    pause()
                    self.device.wait_for_users()
            self._go_on()
        except BaseException:
            self.cancel()
            raise
        self._jobs.remove(job)
        if "error" in job.outcome:
            raise EngineError(job.outcome["error"])
        return Outcomes(job.outcome["values"], job.outcome["part_seconds"])

    def cancel(self) -> None:
        """Have the workers forget every job, without waiting for them."""
        self._jobs.clear()
        self._call = None
        if self._config is not None:
            self._link.drop(self._link.command("run", pack(Run(round=self._round))))

    def _want(self, config: PoCConfig, forwards: Sequence[Sequence[Row]]) -> None:
        """Keep the jobs that are wanted, make those that are missing, and give up the others."""
        begun = {job.rows: job for job in self._jobs} if self._config is config else {}
        keys = dict.fromkeys(tuple(rows) for rows in forwards)
        self._jobs = [begun[rows] if rows in begun else _Job(rows) for rows in keys]

    def _begin(self, config: PoCConfig, pause: Pause) -> None:
        """Begin a round in all workers: none computes anything before all have agreed."""
        self._config = self._call = None
        self._round = uuid.uuid4().hex
        # callback_url can hold secrets, and is no worker's business.
        values = {**dataclasses.asdict(config), "callback_url": None}
        answers = self._link.tell("begin", pack(Begin(round=self._round, config=values)), pause)
        begun = [unpack(Begun, answer) for answer in answers]
        for rank, each in enumerate(begun):
            if each.refusal is not None:
                raise EngineError(f"worker {rank} cannot compute this round: {each.refusal}")
        if any(each.refreshed for each in begun):
            self.refreshed += 1
            logger.info("the served weights were replaced: proofs are of those that serve now")
        self._config = config
        for job in self._jobs:
            job.put = False

    def _send(self) -> _Call:
        """Say what is wanted, and how much to compute."""
        missing = {job.id: [(row.public_key, row.nonce) for row in job.rows] for job in self._jobs if not job.put}
        wanted = [job.id for job in self._jobs if job.outcome is None]
        message = pack(Run(round=self._round, jobs=wanted, rows=missing, **self.device.budget()))
        self._call = _Call(message, self._link.start(self._link.command("run", message)))
        return self._call

    def _go_on(self) -> None:
        """Have the workers compute what follows, while nobody waits for it, unless users compute."""
        unfinished = any(job.outcome is None for job in self._jobs)
        if unfinished and self._call is None and self.device.users_compute_nothing():
            with contextlib.suppress(TurnsClosed):  # the outcome that is there is given all the same
                self._send()

    def _take_answer(self, call: _Call, pause: Pause) -> None:
        """Wait for the answer of a `Run`, and take what is done from it."""
        self._call = None
        answers = [unpack(Progress, answer) for answer in self._answered(call, pause)]
        self.device.told(answers[0])
        if any(answer.round != self._round for answer in answers):
            logger.warning("a worker has lost the round: it is begun again")
            self._config = None
            return
        for job in self._jobs:
            job.put = job.outcome is not None or all(job.id in answer.jobs for answer in answers)
            ended = [answer.outcomes[job.id] for answer in answers if job.id in answer.outcomes]
            if len(ended) == len(answers):
                # The logits come together on the first rank; an error on any of them is the job's.
                job.outcome = next((outcome for outcome in ended if "error" in outcome), ended[0])

    def _answered(self, call: _Call, pause: Pause) -> list[dict[str, Any]]:
        """Wait for the answer of a `Run`, which is sent again where it fails.

        It says what is wanted, and an answer that was lost is given again.
        """
        under_way = call.under_way
        for wait in _AGAIN_SECONDS:
            try:
                return self._link.finish(under_way, pause)
            except EngineError as error:
                logger.warning("a call of the workers failed and is made again: %s", error)
                pause()
                self._link.sleep(wait)
            under_way = self._link.start(self._link.command("run", call.message))
        return self._link.finish(under_way, pause)


async def open_engine(
    client: Any,
    *,
    share: float,
    slice_seconds: float,
    cuda_graphs: bool,
    answer_seconds: float,
    arrivals: Arrivals | None = None,
) -> tuple[RemoteProver, RemoteDevice]:
    """Make the sessions of all workers, try them, and return what proves in them, and their device.

    Call it on the server's loop, before it has users.

    Args:
        client: vLLM's ``EngineClient``.
        share: see `RemoteDevice`.
        slice_seconds: how long a slice should take at most.
        cuda_graphs: whether to capture the forward on CUDA.
        answer_seconds: how long an answer may take until a call fails.
        arrivals: count users' requests; None where nobody does.

    Raises:
        ValueError: proofs do not support the model or its configuration, or the trial failed.
        EngineLost: the engine died meanwhile.
        TimeoutError: the engine did not answer in time: it hangs.
    """
    message = Open(
        slice_seconds=slice_seconds,
        cuda_graphs=cuda_graphs,
        arrivals=None if arrivals is None else arrivals.path,
    )
    opened = await unless_lost(client, _open_and_try(client, message), _OPEN_SECONDS)
    without_layers = next((each for each in opened if each.no_layers is not None), None)
    if without_layers is not None:
        logger.warning("rounds of distances alone are served: %s", without_layers.no_layers)
    link = Link(client, asyncio.get_running_loop(), answer_seconds)
    device = RemoteDevice(link, share=share, ranks=len(opened), arrivals=arrivals)
    return RemoteProver(device, without_layers or opened[0]), device


async def _open_and_try(client: Any, message: Open) -> list[Opened]:
    """Make the sessions of all workers, and try them; raise a ValueError if one is refused."""
    answers = await client.collective_rpc(METHOD, args=("open", pack(message)))
    opened = [unpack(Opened, answer) for answer in answers]
    for each in opened:
        if each.refusal is not None:
            raise ValueError(each.refusal)
    await _try(client, opened)
    return opened


async def _try(client: Any, workers: Sequence[Opened]) -> None:
    """Have all workers compare what they prove with to what the server serves; raise a ValueError if it differs."""
    opened, transforms = workers[0], all(each.no_layers is None for each in workers)
    prompts = trial.tokens(opened.vocab_size, max_positions=opened.max_positions, windows=opened.windows)
    scored = [trial.scores(await compat.scored(client, prompt, trial.ANSWER)) for prompt in prompts]
    texts, served = [text for text, _ in scored], [told for _, told in scored]
    message = Trial(texts=texts, served=served, transforms=transforms)
    answers = await client.collective_rpc(METHOD, args=("trial", pack(message)))
    for answer in answers:
        if (refusal := unpack(Tried, answer).refusal) is not None:
            raise ValueError(refusal)
