"""A node in this process, without HTTP: scheduler, continuous batching and proof worker, as a served node has them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from beside_load import EQUAL, PARTITION, PRIORITIES, Condition, DifferenceError, Request, one
from beside_models import EXACT_MARGIN, TIE_MARGIN, Margins, Served, greedy, prompts
from beside_turns import SwitchedTurns
from beside_validation import EqualStreams, Side, difference, distances_alone, round_config

from poc_kernels.engines.transformers.batching import ContinuousBatching, Router
from poc_kernels.engines.transformers.config import InferenceLimits, batching_config
from poc_kernels.protocol import ValidatedBatch
from poc_kernels.scheduling import Pacing, PriorityLanes, Turns

_STOP_SECONDS = 30.0


class Node:
    """A `Rig`: `start` it before the first block, `close` it in the end.

    Args:
        served: the model; no other may serve it.
        new_tokens: of each answer.
        prompt_tokens: of a prompt, in the mean.
        prompt_count: different prompts.
        projection: whether the round uses the random projection.
        slice_seconds, slices_in_flight: as the settings of a node.
        multiprocessors: of a GPU, that validation is kept to in the condition of a partition; None for no such one.
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
        self._turns = SwitchedTurns(Turns(Pacing()))
        turns: Any = self._turns
        streams = {PRIORITIES: PriorityLanes(model.device), EQUAL: EqualStreams(model.device)}
        if multiprocessors is not None:
            streams[PARTITION] = PriorityLanes(model.device, validation_sms=multiprocessors)
        self.slices: list[float] = []
        self.held: list[float] = []
        self._sides = {
            name: Side(
                *(model, turns, partition, self.slices, self.held, config),
                slice_seconds=slice_seconds,
                slices_in_flight=slices_in_flight,
            )
            for name, partition in streams.items()
        }
        self._side = self._sides[PRIORITIES]
        self._router = Router()
        self._generation = greedy(model)
        self._generation.max_new_tokens = new_tokens
        limits = batching_config(InferenceLimits(), model.device.type)
        self._batching = ContinuousBatching(model, self._generation, limits, self._router, turns, streams[PRIORITIES])
        self._new_tokens = new_tokens
        self._candidates = prompts(prompt_count, prompt_tokens, self._side.engine.vocab_size, seed)
        self._answers: list[list[int]] = []
        self._checked: dict[tuple[int, ...], float] = {}
        self._serial = 0
        self.conditions: list[Condition] = []
        """All there can be, if not those of the suite."""
        self.prompts = 0
        self.proofs = len(self._batches)
        self.waits = self._turns.waits
        self.least_lead = float("inf")
        """The least lead of a token that an answer alone has, or one that differs from it."""
        self.differing = 0
        """Answers in half precision that are not those given alone, but for near ties."""

    async def start(self, timeout_seconds: float) -> None:
        """Measure slices, have everything compiled and captured, and generate every answer alone.

        Raises:
            DifferenceError: a distance in slices is not that of one go, or an answer is not that of a plain forward.
        """
        for side in self._sides.values():
            side.start(self._batches, timeout_seconds)
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

    async def close(self) -> None:
        """End the proof workers and continuous batching."""
        for side in self._sides.values():
            side.close(_STOP_SECONDS)
        self._turns.close()
        self._batching.stop(_STOP_SECONDS)

    def facts(self) -> dict[str, Any]:
        """What a report says of the node: slices as planned, and how the answers were compared."""
        side = self._sides[PRIORITIES]
        slices = side.engine.slices
        return {
            "prompts": self.prompts,
            "parts_per_batch": side.parts_per_batch,
            "planned_slices": None if slices is None else list(slices.seconds),
            "answers_exact": self._margins.exact,
            "answers_near_ties": self.differing,
            "least_lead": self.least_lead,
        }

    # ---- Rig ----

    def switch(self, condition: Condition) -> None:
        pacing = None
        if condition.share is not None:
            pacing = Pacing(share=condition.share, paced=condition.paced)
        self._turns.switch(Turns(pacing))
        self._side = self._sides[condition.side]

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

        self._side.submit(expected).add_done_callback(done)

    def nonces_between(self, begin: float, end: float) -> float:
        return self._side.nonces_between(begin, end)

    def trouble(self) -> str | None:
        return self._batching.died_of() or self._side.trouble()

    def check(self, requests: Sequence[Request]) -> None:
        self._side.check()
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


def device_of(name: str) -> torch.device:
    """The device, or an error that names it.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch has here, got 'cuda'")
    return torch.device(name)
