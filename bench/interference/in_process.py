"""A node in this process, without HTTP: turns, continuous batching and proof worker, as a served node has them."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from bench.interference.chat import EXACT_MARGIN, TIE_MARGIN, Margins, Served, greedy, prompts
from bench.interference.load import EQUAL, PARTITION, PRIORITIES, Condition, DifferenceError, Request, ask_alone
from bench.interference.validation import EqualLanes, Validation, difference, distances_alone, round_config
from poc_kernels.engines.transformers.batching import ContinuousBatching, Router
from poc_kernels.engines.transformers.config import InferenceLimits, batching_config
from poc_kernels.protocol import ValidatedBatch
from poc_kernels.scheduling import Pacing, PriorityLanes, Turn, Turns

_STOP_SECONDS = 30.0


class TimedTurns(Turns):
    """Turns that note in ``step_waits`` the seconds that each step of inference waited for its turn."""

    def __init__(self, pacing: Pacing | None) -> None:
        super().__init__(pacing)
        self.step_waits: list[float] = []

    def inference(self, busy: Callable[[], bool] | None = None) -> Any:
        return _TimedTurn(super().inference(busy), self.step_waits)


class _TimedTurn:
    def __init__(self, turn: Turn, waits: list[float]) -> None:
        self._turn, self._waits = turn, waits

    def __enter__(self) -> None:
        began = time.perf_counter()
        self._turn.__enter__()
        self._waits.append(time.perf_counter() - began)

    def __exit__(self, *error: Any) -> None:
        self._turn.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._turn, name)


class InProcessRig:
    """A `Rig` whose node is in this process: `start` it before the first block, `close` it in the end.

    Args:
        served: the model; nothing else may serve it.
        new_tokens: length of each answer.
        prompt_tokens: mean length of a prompt.
        prompt_count: number of different prompts.
        projection: whether the round uses the random projection.
        slice_seconds, slices_in_flight: as the settings of a node.
        sms: SMs of a GPU that validation is kept to in the condition of a partition; None without that condition.
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
        sms: int | None,
        seed: int,
    ) -> None:
        model = served.model
        config = round_config(served.case, projection)
        self._batches = distances_alone(model, config)
        self._margins = Margins(model)
        self._turns = TimedTurns(Pacing())
        lanes = {PRIORITIES: PriorityLanes(model.device), EQUAL: EqualLanes(model.device)}
        if sms is not None:
            lanes[PARTITION] = PriorityLanes(model.device, validation_sms=sms)
        self.slices: list[float] = []
        self.step_waits = self._turns.step_waits
        self.slice_waits: list[float] = []
        self._validations = {
            name: Validation(
                *(model, self._turns, lanes_of_one, self.slices, self.slice_waits, config),
                slice_seconds=slice_seconds,
                slices_in_flight=slices_in_flight,
            )
            for name, lanes_of_one in lanes.items()
        }
        self._validation = self._validations[PRIORITIES]
        self._router = Router()
        self._generation = greedy(model)
        self._generation.max_new_tokens = new_tokens
        limits = batching_config(InferenceLimits(max_new_tokens=1, stall_seconds=1.0), model.device.type)
        self._batching = ContinuousBatching(
            model, self._generation, limits, self._router, self._turns, lanes[PRIORITIES]
        )
        self._new_tokens = new_tokens
        self._candidates = prompts(prompt_count, prompt_tokens, self._validation.engine.vocab_size, seed)
        self._answers: list[list[int]] = []
        self._checked: dict[tuple[int, ...], float] = {}
        self._serial = 0
        self.conditions: list[Condition] = []
        """The only conditions that are possible; empty if all are."""
        self.prompts = 0
        self.proofs = len(self._batches)
        self.min_lead = float("inf")
        """The smallest lead of a token, in answers given alone and in those that differ from them."""
        self.differing = 0
        """The number of answers in half precision that differ, at near ties, from those given alone."""

    async def start(self, timeout_seconds: float) -> None:
        """Measure slices, have everything compiled and captured, and generate every answer alone.

        Raises:
            DifferenceError: a distance in slices is not that of one slice, or an answer is not that of a plain forward.
        """
        for validation in self._validations.values():
            validation.start(self._batches, timeout_seconds)
        every, self._candidates = self._candidates, []
        for prompt in every:
            self._candidates.append(prompt)
            request = await ask_alone(self, len(self._candidates) - 1, timeout_seconds)
            if len(request.times) != len(request.answer):
                raise RuntimeError(f"{len(request.answer)} tokens came in {len(request.times)} outputs, not one by one")
            lead = self._margins.lead(prompt, request.answer)
            if lead < -(EXACT_MARGIN if self._margins.exact else TIE_MARGIN):
                raise DifferenceError(f"an answer alone is not that of a plain forward: a token lies {-lead:.3g} under")
            if self._margins.exact and lead < EXACT_MARGIN:
                self._candidates.pop()
                continue
            self.min_lead = min(self.min_lead, lead)
            self._answers.append(request.answer)
        if not self._answers:
            raise RuntimeError(f"prompts must have an answer without near ties, none of {len(every)} has")
        self.prompts = len(self._answers)

    async def close(self) -> None:
        """End the proof workers and continuous batching."""
        for validation in self._validations.values():
            validation.close(_STOP_SECONDS)
        self._turns.close()
        self._batching.stop(_STOP_SECONDS)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the node: slices as planned, and how the answers were compared."""
        validation = self._validations[PRIORITIES]
        slices = validation.engine.slices
        return {
            "prompts": self.prompts,
            "parts_per_batch": validation.parts_per_batch,
            "planned_slices": None if slices is None else list(slices.seconds),
            "answers_exact": self._margins.exact,
            "answers_near_ties": self.differing,
            "least_lead": self.min_lead,
        }

    # ---- Rig ----

    async def switch(self, condition: Condition) -> None:
        share = condition.share
        self._turns.pacing = None if share is None else Pacing(share=share, paced=condition.paced)
        self._validation = self._validations[condition.lanes]

    async def counters(self) -> dict[str, float] | None:
        """Return None: what the node counts is known slice by slice."""
        return None

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

        self._validation.submit(expected).add_done_callback(done)

    def nonces_between(self, begin: float, end: float) -> float:
        return self._validation.nonces_between(begin, end)

    def trouble(self) -> str | None:
        return self._batching.died_of() or self._validation.trouble()

    def check(self, requests: Sequence[Request]) -> None:
        self._validation.check()
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
        self.min_lead = min(self.min_lead, self._checked[key])
        if self._checked[key] < -TIE_MARGIN:
            raise DifferenceError(
                f"an answer to prompt {request.prompt} has a token that lies {-self._checked[key]:.3g} of the logits' "
                f"spread under the likeliest: more than a near tie ({TIE_MARGIN})"
            )
