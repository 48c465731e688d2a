"""One life of transformers' plain generation: one request at a time, for models that continuous batching gets wrong."""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ...scheduling import PriorityLanes, Turn, Turns, TurnsClosed
from .batching import OnOutput, Router
from .config import max_positions
from .sampling import Row, Sampling, TokenLogprob, choose, sampling_of, without_warpers

logger = logging.getLogger("poc_kernels")


class _Request(NamedTuple):
    request_id: str
    prompt: list[int]
    config: GenerationConfig
    streaming: bool
    sampling: Sampling


class EagerGeneration:
    """``model.generate`` on one request after another in a thread of its own, from start to stop.

    It has the methods of `ContinuousBatching` and is used like it. Each token is a step that takes its turn, so that
    validation shares the device, and a pause keeps the request and its cache. A request that fails ends alone.

    Args:
        model: a causal LM in eval mode.
        router: takes the outputs.
        turns: every step of the model takes its turn there.
        lanes: steps run on the stream of inference.
        clock: counts the seconds without progress.
        max_tokens: bound of the attribute; None for what the model's positions allow.

    Attributes:
        max_tokens: tokens that one request can have, prompt and completion together.
    """

    def __init__(
        self,
        model: Any,
        router: Router,
        turns: Turns,
        lanes: PriorityLanes,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int | None = None,
    ) -> None:
        positions = max_positions(model.config)
        self.max_tokens = positions if max_tokens is None else min(positions, max_tokens)
        # A request's config is complete: `generate` would fill its gaps, such as a temperature, with the model's own.
        self._model = copy.copy(model)
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._router = router
        self._turns = turns
        self._turn = turns.inference(lambda: router.in_flight() > 0)
        self._lanes = lanes
        self._clock = clock
        self._progress = clock()
        self._waiting: dict[str, _Request] = {}  # in the order of arrival
        self._changed = threading.Condition()  # guards _waiting and _stopping
        self._stopping = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="eager-generation", daemon=True)
        self._thread.start()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        config: GenerationConfig,
        streaming: bool,
        on_output: OnOutput,
        sampling: Sampling | None = None,
    ) -> bool:
        """Begin a request: see `ContinuousBatching.submit`."""
        if self._stopping or not self._thread.is_alive():
            return False
        if self._router.in_flight() == 0:
            self._progress = self._clock()
        sampling = sampling or sampling_of(config)
        config = without_warpers(config)
        config.do_sample = False  # the token was chosen before
        config.eos_token_id = config.eos_token_id or None
        config.use_cache = True
        config.num_beams = 1
        config.cache_implementation = None  # one that grows: a static one would be made, and compiled for, per request
        self._router.register(request_id, on_output)
        with self._changed:
            self._waiting[request_id] = _Request(request_id, list(prompt), config, streaming, sampling)
            self._changed.notify()
        return True

    def cancel(self, request_id: str) -> None:
        """End a request whose client is gone: after the step that runs, or before it begins."""
        self._router.forget(request_id)
        with self._changed:
            self._waiting.pop(request_id, None)

    def died_of(self) -> str | None:
        """Say what the thread died of; None while it lives."""
        if self._stopping or self._turns.closed or self._thread.is_alive():
            return None
        return "its thread ended" if self._error is None else f"{type(self._error).__name__}: {self._error}"

    def stalled_for(self) -> float:
        """Count the seconds since the last progress: see `ContinuousBatching.stalled_for`."""
        paused = self._turns.inference_paused and not self._turn.computing
        if self._turn.waiting or paused or self._router.in_flight() == 0:
            return 0.0
        return self._clock() - self._progress

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread: see `ContinuousBatching.stop`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._turn.cancel()
        self._thread.join(timeout_seconds)
        self._turn.end()
        return not self._thread.is_alive()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with self._lanes.inference():
                while (request := self._next()) is not None:
                    self._serve(request)
        except TurnsClosed:
            pass  # nothing computes any more
        except Exception as error:
            logger.exception("generation fails")
            self._error = error

    def _next(self) -> _Request | None:
        """Wait for a request and take it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return None if self._stopping else self._waiting.pop(next(iter(self._waiting)))

    def _serve(self, request: _Request) -> None:
        progress = _Progress(request, self._router, self._turn, self._progressed)
        try:
            with self._turn:
                self._progressed()
                if not self._router.knows(request.request_id):
                    return  # its client left while it waited for the turn
                tokens = torch.tensor([request.prompt], device=self._model.device)
                self._model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=request.config,
                    logits_processor=[progress.choice],
                    stopping_criteria=[progress],
                )
        except TurnsClosed:
            raise
        except Exception as error:
            progress.deliver(RequestStatus.FAILED, f"{type(error).__name__}: {error}")
        else:
            progress.deliver(RequestStatus.FINISHED)
        finally:
            self._progressed()

    def _progressed(self) -> None:
        self._progress = self._clock()


class _Choice(LogitsProcessor):
    """Chooses each token as the request asks: no other one keeps a chance.

    Attributes:
        logprob: of the latest token, if the request asks for it.
    """

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._chance = random.Random()
        self.logprob: TokenLogprob | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prompt = self._request.prompt
        row = Row(self._request.sampling, prompt, input_ids[0, len(prompt) :].tolist())
        tokens, (self.logprob,) = choose(scores.float(), [row], self._chance)
        return torch.full_like(scores, -torch.inf).index_fill_(1, tokens, 0.0)


class _Progress(StoppingCriteria):
    """Looks at a request after each of its steps: delivers the token, ends what is over, lets others have the device.

    ``generate`` may call it once more after the end; that step is ignored.
    """

    def __init__(self, request: _Request, router: Router, turn: Turn, progressed: Callable[[], None]) -> None:
        ends = request.config.eos_token_id
        self._ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        self._request, self._router, self._turn, self._progressed = request, router, turn, progressed
        self._created = time.perf_counter()
        self._tokens: list[int] = []
        self._logprobs: list[Any] = []  # each a TokenLogprob
        self._over = False
        self.choice = _Choice(request)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if not self._over:
            self._take(int(input_ids[0, -1]))
        return torch.full((1,), self._over, device=input_ids.device)

    def _take(self, token: int) -> None:
        self._tokens.append(token)
        if self.choice.logprob is not None:
            self._logprobs.append(self.choice.logprob)
        self._progressed()
        if token in self._ends or len(self._tokens) >= self._request.config.max_new_tokens:
            self.deliver(RequestStatus.FINISHED)
        elif not self._router.knows(self._request.request_id):
            self._over = True
        else:
            if self._request.streaming:
                self.deliver(RequestStatus.DECODING)
            self._turn.pause()
            self._progressed()

    def deliver(self, status: RequestStatus, error: str | None = None) -> None:
        """Deliver what there is so far; nothing after a last output."""
        if self._over:
            return
        self._over = status >= RequestStatus.FINISHED
        self._router.deliver(
            GenerationOutput(
                request_id=self._request.request_id,
                prompt_ids=self._request.prompt,
                generated_tokens=self._tokens.copy(),
                logprobs=self._logprobs.copy(),
                error=error,
                status=status,
                created_time=self._created,
            )
        )
