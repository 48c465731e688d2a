"""A node in this process, without HTTP: scheduler, continuous batching and proof worker, as a served node has them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch
from beside_load import Condition, DifferenceError, Request, ending, one
from beside_models import EXACT_MARGIN, TIE_MARGIN, Margins, Served, greedy, prompts

from poc_kernels.protocol import BatchReport, PoCConfig, PoCManager, PoCState, ProofBatch, ValidatedBatch
from poc_kernels.scheduling import Pacing, StreamPartition, Turn, Turns
from poc_kernels.scheduling.slices import MEASURED_FORWARDS
from poc_kernels.serving.batching import Batching, Router
from poc_kernels.serving.batching_config import InferenceLimits, batching_config
from poc_kernels.serving.engine import TransformersEngine
from poc_kernels.serving.worker import ProofWorker

BLOCK_HASH, PUBLIC_KEY = "0x00000000000000000001a2b3c4d5e6f7", "bench"
PROOFS = 4
"""Batches of proofs that come again and again."""
_STOP_SECONDS = 30.0


class SwitchedTurns:
    """The interface of a `Turns`, behind which there is another one in each block; times what steps wait.

    So one continuous batching, with its cache and its graphs, serves all conditions.
    """

    def __init__(self, turns: Turns) -> None:
        self._now = turns
        self.waits: list[float] = []
        """Seconds that each step of inference waited for its turn."""

    @property
    def now(self) -> Turns:
        """The one that turns are taken in."""
        return self._now

    def switch(self, turns: Turns) -> None:
        """Take turns in another one from the next turn on."""
        self._now = turns

    def inference(self, busy: Callable[[], bool] | None = None) -> Any:
        return _SwitchedTurn(self, lambda turns: turns.inference(busy), self.waits)

    def proof(self) -> Any:
        return _SwitchedTurn(self, Turns.proof, None)

    @property
    def inference_held(self) -> bool:
        return self._now.inference_held

    @property
    def closed(self) -> bool:
        return self._now.closed

    def hold_inference(self) -> None:
        self._now.hold_inference()

    def release_inference(self) -> None:
        self._now.release_inference()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._now.alone():
            yield

    def close(self) -> None:
        self._now.close()


class _SwitchedTurn:
    def __init__(self, switched: SwitchedTurns, make: Callable[[Turns], Turn], waits: list[float] | None) -> None:
        self._switched, self._make, self._waits = switched, make, waits
        self._turns = switched.now
        self._turn = make(self._turns)

    def __enter__(self) -> _SwitchedTurn:
        if self._turns is not self._switched.now:
            self._turns = self._switched.now
            self._turn = self._make(self._turns)
        if self._waits is None:
            self._turn.__enter__()
        else:
            began = time.perf_counter()
            self._turn.__enter__()
            self._waits.append(time.perf_counter() - began)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turn.__exit__(kind, error, traceback)

    @property
    def waiting(self) -> bool:
        return self._turn.waiting

    @property
    def computing(self) -> bool:
        return self._turn.computing

    def pause(self) -> float:
        return self._turn.pause()

    def end(self) -> float:
        return self._turn.end()

    def cancel(self) -> None:
        self._turn.cancel()


class Recorder:
    """What the worker and the manager tell: in place of the node's metrics."""

    def __init__(self) -> None:
        self.slices: list[float] = []
        self.parts: list[float] = []
        """Times at which a slice was done."""
        self.batches: list[int] = []
        """How many slices were done at the end of each batch."""
        self.held: list[float] = []
        """Seconds that each slice was held back."""
        self.failures = 0
        self.frauds = 0

    def slice(self, seconds: float) -> None:
        self.slices.append(seconds)
        self.parts.append(time.monotonic())

    def held_back(self, seconds: float) -> None:
        self.held.append(seconds)

    def validation_ended(self, state: Any, seconds: float) -> None:
        """Every batch's outcome is looked at where it was submitted."""

    def batch(self, report: BatchReport) -> None:
        self.batches.append(len(self.parts) + 1)  # the last slice ends after its batch

    def batch_failed(self) -> None:
        self.failures += 1

    def fraud(self) -> None:
        self.frauds += 1


class _NoCallbacks:
    """A round without a callback URL sends none."""

    def generated(self, url: str, batch: dict[str, Any]) -> None:
        raise AssertionError(f"a callback to {url}")

    validated = generated


def round_config(case: Any, projection: bool) -> PoCConfig:
    """The round that proofs are validated in: every distance is valid, so an honest batch is judged honest."""
    return PoCConfig(
        block_hash=BLOCK_HASH,
        block_height=1,
        public_key=PUBLIC_KEY,
        r_target=2.0,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        use_random_projection=projection,
    )


def distances_alone(model: Any, config: PoCConfig) -> list[ProofBatch]:
    """Batches with the distances that an engine of its own computes: in one go, with nothing else on the device."""
    manager = PoCManager(TransformersEngine(model, cuda_graphs=False, slice_seconds=1e9))
    manager.start_round(config, PoCState.VALIDATING)
    batches = []
    for index in range(PROOFS):
        nonces = list(range(index * config.batch_size, (index + 1) * config.batch_size))
        computed = manager.validate(ProofBatch(PUBLIC_KEY, BLOCK_HASH, 1, nonces, [])).dist
        batches.append(ProofBatch(PUBLIC_KEY, BLOCK_HASH, 1, nonces, computed))
    manager.stop_round()
    return batches


class Node:
    """A `Rig`: `start` it before the first block, `close` it in the end.

    Args:
        served: the model; no other may serve it.
        new_tokens: of each answer.
        prompt_tokens: of a prompt, in the mean.
        prompt_count: different prompts.
        projection: whether the round uses the random projection.
        slice_seconds, slices_in_flight, multiprocessors: as the settings of a node.
        seed: of the prompts.
    """

    def __init__(
        self,
        served: Served,
        *,
        new_tokens: int,
        prompt_tokens: int,
        prompt_count: int,
        projection: bool,
        slice_seconds: float,
        slices_in_flight: int,
        multiprocessors: int | None,
        seed: int,
    ) -> None:
        model = served.model
        config = round_config(served.case, projection)
        self._batches = distances_alone(model, config)
        self._margins = Margins(model)
        self._turns = SwitchedTurns(Turns(Pacing(), concurrent=True))
        turns: Any = self._turns
        self.engine = TransformersEngine(model, slice_seconds=slice_seconds, alone=self._turns.alone)
        streams = StreamPartition(model.device, validation_multiprocessors=multiprocessors)
        self._recorder = recorder = Recorder()
        self._manager = PoCManager(self.engine, recorder.batch)
        self._router = Router()
        self._generation = greedy(model)
        self._generation.max_new_tokens = new_tokens
        limits = batching_config(InferenceLimits(), model.device.type)
        self._batching = Batching(model, self._generation, limits, self._router, turns, streams)
        sinks: Any = (_NoCallbacks(), recorder)
        self._worker = ProofWorker(
            self._manager,
            turns,
            streams,
            *sinks,
            drain=self._router.wait_idle,
            drain_seconds=0.0,
            max_queued_nonces=4 * config.batch_size,
            stall_seconds=600.0,
            most_in_flight=slices_in_flight,
        )
        self._manager.start_round(config, PoCState.VALIDATING)
        self._new_tokens = new_tokens
        self._candidates = prompts(prompt_count, prompt_tokens, self.engine.vocab_size, seed)
        self._answers: list[list[int]] = []
        self._checked: dict[tuple[int, ...], float] = {}
        self._serial = 0
        self.conditions: list[Condition] = []
        """All there can be, if not those of the suite."""
        self.prompts = 0
        self.proofs = len(self._batches)
        self.progress = recorder.parts
        self.slices = recorder.slices
        self.waits = self._turns.waits
        self.held = recorder.held
        self.nonces_per_part = 0.0
        self.parts_per_batch = 0
        self.least_lead = float("inf")
        """The least lead of a token that an answer alone has, or one that differs from it."""
        self.differing = 0
        """Answers in half precision that are not those given alone, but for near ties."""

    async def start(self, timeout_seconds: float) -> None:
        """Measure slices, have everything compiled and captured, and generate every answer alone.

        Raises:
            DifferenceError: a distance in slices is not that of one go, or an answer is not that of a plain forward.
        """
        self._worker.start()
        for index in range(MEASURED_FORWARDS + 2):  # those that measure, one that captures, one as all others
            await self._validated(index % self.proofs, timeout_seconds)
        ends = self._recorder.batches
        self.parts_per_batch = ends[-1] - ends[-2]
        self.nonces_per_part = len(self._batches[0]) / self.parts_per_batch
        every, self._candidates = self._candidates, []
        for prompt in every:
            self._candidates.append(prompt)
            request = await one(self, len(self._candidates) - 1, timeout_seconds)
            if len(request.times) != len(request.answer):
                raise RuntimeError(f"{len(request.answer)} tokens came in {len(request.times)} outputs, not one by one")
            lead = self._margins.lead(prompt, request.answer)
            if lead < -(EXACT_MARGIN if self._margins.exact else TIE_MARGIN):
                raise DifferenceError(f"an answer alone is not that of a plain forward: a token lies {-lead:.3g} under")
            if self._margins.exact and lead < EXACT_MARGIN:
                self._candidates.pop()
                continue
            self.least_lead = min(self.least_lead, lead)
            self._answers.append(request.answer)
        if not self._answers:
            raise RuntimeError(f"prompts must have an answer without near ties, none of {len(every)} has")
        self.prompts = len(self._answers)

    async def _validated(self, proof: int, timeout_seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        self.validate(proof, done.set_result)
        error = await ending(self, done, timeout_seconds)
        if error is not None:
            raise error

    async def close(self) -> None:
        """End the proof worker and continuous batching."""
        self._manager.stop_round()
        self._worker.close(_STOP_SECONDS)
        self._turns.close()
        self._batching.stop(_STOP_SECONDS)

    def facts(self) -> dict[str, Any]:
        """What a report says of the node: slices as planned, and how the answers were compared."""
        slices = self.engine.slices
        return {
            "prompts": self.prompts,
            "parts_per_batch": self.parts_per_batch,
            "planned_slices": None if slices is None else list(slices.seconds),
            "answers_exact": self._margins.exact,
            "answers_near_ties": self.differing,
            "least_lead": self.least_lead,
        }

    # ---- Rig ----

    def switch(self, condition: Condition) -> None:
        pacing = None if condition.share is None else Pacing(share=condition.share)
        if pacing is None and condition.chat != condition.validation:
            pacing = Pacing()  # one side alone: there is nothing to pace
        self._turns.switch(Turns(pacing, concurrent=True))

    def begin(self, request: Request, ended: Callable[[Request], None]) -> None:
        loop = asyncio.get_running_loop()

        def on_output(output: Any) -> None:
            if output.error is None:
                request.times.append(loop.time())
            if output.is_finished():
                request.answer, request.error = output.generated_tokens, output.error
                ended(request)

        self._serial += 1
        prompt = self._candidates[request.prompt]
        if not self._batching.submit(str(self._serial), prompt, self._generation, True, on_output):
            raise RuntimeError(f"continuous batching takes no requests: {self._batching.died_of()}")

    def validate(self, proof: int, ended: Callable[[BaseException | None], None]) -> None:
        loop = asyncio.get_running_loop()
        expected = self._batches[proof]

        def done(result: Future[ValidatedBatch]) -> None:
            error = result.exception()
            if error is None and result.result().dist != expected.dist:
                error = difference(expected, result.result().dist)
            loop.call_soon_threadsafe(functools.partial(ended, error))

        self._worker.submit(expected).add_done_callback(done)

    def trouble(self) -> str | None:
        return self._batching.died_of() or self._worker.trouble()

    def check(self, requests: Sequence[Request]) -> None:
        if self._recorder.failures or self._recorder.frauds:
            raise DifferenceError(
                f"{self._recorder.failures} batches failed, {self._recorder.frauds} honest ones were judged fraud"
            )
        for request in requests:
            if request.error is not None:
                raise RuntimeError(f"a request failed: {request.error}")
            if request.answer != self._answers[request.prompt]:
                self._check_near_tie(request)

    def _check_near_tie(self, request: Request) -> None:
        alone = self._answers[request.prompt]
        if self._margins.exact or len(request.answer) != len(alone):
            at = next(
                (i for i, pair in enumerate(zip(alone, request.answer, strict=False)) if pair[0] != pair[1]), None
            )
            raise DifferenceError(
                f"an answer to prompt {request.prompt} is not the one given alone: {len(request.answer)} tokens "
                f"instead of {len(alone)}, the first that differs is number {at}"
            )
        self.differing += 1
        key = (request.prompt, *request.answer)
        if key not in self._checked:
            self._checked[key] = self._margins.lead(self._candidates[request.prompt], request.answer)
        self.least_lead = min(self.least_lead, self._checked[key])
        if self._checked[key] < -TIE_MARGIN:
            raise DifferenceError(
                f"an answer to prompt {request.prompt} has a token that lies {-self._checked[key]:.3g} of the logits' "
                f"spread under the likeliest: more than a near tie ({TIE_MARGIN})"
            )


def difference(expected: ProofBatch, computed: Sequence[float]) -> DifferenceError:
    """What to say of distances that are not those computed alone."""
    for nonce, alone, beside in zip(expected.nonces, expected.dist, computed, strict=False):
        if alone != beside:
            return DifferenceError(f"the distance of nonce {nonce} is {beside!r}, alone it is {alone!r}")
    return DifferenceError(f"{len(computed)} distances came for {len(expected.nonces)} nonces")


def device_of(name: str) -> torch.device:
    """The device, or an error that names it.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch has here, got 'cuda'")
    return torch.device(name)
