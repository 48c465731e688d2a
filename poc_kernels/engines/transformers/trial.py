"""The proof, made before anything is served by running it, that a way of generation gives the plain model's text."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from ...scheduling import Turns
from ..rounding import ROUNDINGS, rounded_otherwise
from .batching import OnOutput, Router
from .config import batched_positions
from .processors import processors_of, without_sampling
from .sampling import Sampling, sampling_of

_NEW_TOKENS = 8
_PROMPT_LENGTHS = (17, 3, 40, 9)
"""Tokens of the prompts: the first is asked alone, then all together. 40 is more than a block of the KV cache."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
_MAX_WINDOW = 1024
"""A model whose attention has a window of at most this many tokens is tried with a prompt that is longer."""

_MARGIN = 4.0

_MAX_COPIED = 2**26
"""Parameters of a model that is tried in float32 too, on a copy of at most 256 MiB: see `Trial`."""

_MIN_SECONDS = 60.0
_FORWARDS = 100
"""A trial may take this many times the longest prompt's forward, of which it needs some 20, and at least a minute."""

_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.05


class Generation(Protocol):
    """A way of generation, from its start to `stop`: `ContinuousBatching` or `EagerGeneration`.

    Attributes:
        max_tokens: tokens that one request can have, prompt and completion together.
    """

    max_tokens: int

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        config: GenerationConfig,
        streaming: bool,
        on_output: OnOutput,
        sampling: Sampling | None = None,
    ) -> bool:
        """Begin a request that was admitted; return False if no more are taken."""

    def cancel(self, request_id: str) -> None:
        """End a request whose client is gone."""

    def died_of(self) -> str | None:
        """Say what its thread died of; None while it lives."""

    def stalled_for(self) -> float:
        """Count the seconds since the last progress while requests are in flight."""

    def stop(self, timeout_seconds: float) -> bool:
        """End its thread; return False if a step hangs."""


Start = Callable[[Any, GenerationConfig, Router, Turns], Generation]
"""Starts a way of generation: of a model, with a sampling, for a router, in turns."""


class TrialFailedError(Exception):
    """A way of generation does not give the plain model's text; its message is the reason."""


class Trial:
    """Questions to a way of generation, whose answers are compared with what the plain model says.

    A prompt is asked alone, then together with others in packed steps, and each answer has several tokens: a cache
    that is not used shows in the tokens after the first, and a neighbour that is seen in those of the others.

    Texts are not compared, since right ways round differently, which may swap two tokens that are nearly as likely.
    One forward of the plain model over a prompt and its answer, without a cache, says how likely each token of the
    answer is after those before it, given what the generation config bans or forces. The way must report that
    log-probability, and no other token may be likelier, both within what roundings do. How much that is for this model
    is measured: the forward runs again with the output of every module changed at random by a rounding of the dtype.
    The way may be off by `_MARGIN` times the largest change that this makes. With tiny random models of 45
    architectures and SmolLM2-135M (CPU, torch 2.13.0, transformers 5.23.0, 2026-11-29), right ways were off by at most
    that change, wrong ones in float32 by 400 times as much.

    Where context hardly matters, as with small random weights, the error of a wrong way may drown in the roundings of
    bfloat16. A small model of another dtype is therefore tried in float32 too: what is wrong there is wrong in any.

    Args:
        model: a causal LM in eval mode, on its device, with the attention that it was loaded with.
        sampling: how the node samples. A last request with it has to end, whatever its text.
        special_tokens: left out of the prompts.
        clock: counts the seconds until an answer is given up.

    Attributes:
        tokens: how many tokens, of prompts and answers, there are at once.
        requests: how many requests there are at once.
    """

    def __init__(
        self,
        model: Any,
        sampling: GenerationConfig,
        special_tokens: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._sampling = copy.deepcopy(sampling)
        self._clock = clock
        config = model.config.get_text_config()
        positions = batched_positions(model.config)
        self._new_tokens = min(_NEW_TOKENS, positions - 1)
        self._sampling.max_new_tokens = min(2, self._new_tokens)
        self._sampling.min_length = self._sampling.min_new_tokens = None  # transformers warns of more than the maximum
        self._greedy = without_sampling(sampling)
        self._greedy.max_new_tokens, self._greedy.pad_token_id = self._new_tokens, 0
        # An answer that ends early shows little, and this penalty changes nothing but the end.
        self._greedy.eos_token_id = self._greedy.exponential_decay_length_penalty = None
        windows = [getattr(config, name, None) for name in _WINDOWS]
        longer = [window + _NEW_TOKENS for window in windows if isinstance(window, int) and 0 < window <= _MAX_WINDOW]
        lengths = [min(length, positions - self._new_tokens) for length in (*_PROMPT_LENGTHS, *longer)]
        ids = set(range(model.get_input_embeddings().num_embeddings))
        allowed = torch.tensor(sorted(ids - set(special_tokens)) or sorted(ids), device="cpu")
        generator = torch.Generator().manual_seed(0)
        self._prompts = [
            allowed[torch.randint(len(allowed), (length,), generator=generator, device="cpu")].tolist()
            for length in lengths
        ]
        self.requests = len(lengths)
        self.tokens = sum(lengths) + self.requests * self._new_tokens

    def prove(self, start: Start) -> None:
        """Try a way of generation, and stop it.

        Raises:
            TrialFailedError: it does not start, or it fails, does not end, or is wrong.
        """
        try:
            with _without_logs_of_batching(), _cheap_collections():
                for model in self._models():
                    answers = self._ask(model, start, self._greedy, [self._prompts[:1], self._prompts])
                    _compare(_Plain(model, self._greedy), answers, self._new_tokens)
                self._ask(self._model, start, self._sampling, [self._prompts[:1]])
        except TrialFailedError:
            raise
        except Exception as error:
            raise TrialFailedError(f"{type(error).__name__}: {error}") from error

    def _models(self) -> Iterator[Any]:
        yield self._model
        small = sum(parameter.numel() for parameter in self._model.parameters()) <= _MAX_COPIED
        if small and self._model.dtype != torch.float32:
            yield copy.deepcopy(self._model).float()

    def _ask(
        self, model: Any, start: Start, sampling: GenerationConfig, rounds: Sequence[Sequence[list[int]]]
    ) -> list[GenerationOutput]:
        began = self._clock()
        _Plain(model, self._greedy).log_probabilities(max(self._prompts, key=len), [0])
        seconds = max(_MIN_SECONDS, _FORWARDS * (self._clock() - began))
        router, turns = _TrialRouter(), Turns()
        generation = start(model, sampling, router, turns)
        try:
            asking = _Asking(generation, router, turns, sampling, lambda: self._clock() - began > seconds)
            return asyncio.run(asking.answers(rounds))
        finally:
            turns.close()
            generation.stop(_STOP_SECONDS)


class _Plain:
    """The plain model: one forward over a whole sequence, without a cache, and what its config does to scores."""

    def __init__(self, model: Any, config: GenerationConfig) -> None:
        self._model, self._config = model, config
        self._generator = torch.Generator(model.device).manual_seed(0)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Compute the log-probabilities [len(answer), vocabulary] of what may follow at each token of an answer."""
        ids: Any = torch.tensor([[*prompt, *answer]], device=self._model.device)
        count = len(answer) + 1
        keep = {"logits_to_keep": count} if self._keeps else {}
        logits = self._model(input_ids=ids, use_cache=False, **keep).logits
        scores: Tensor = logits[0, -count:-1].float()
        if processors := processors_of(self._model, self._config, prompt):
            rows = [processors(ids[:, : len(prompt) + row], scores[row : row + 1]) for row in range(len(answer))]
            scores = torch.cat(rows)
        return scores.log_softmax(-1).cpu()

    @contextlib.contextmanager
    def rounded_otherwise(self) -> Iterator[None]:
        """Change the output of every module at random, by at most a rounding of its dtype."""

        def change(module: Any, arguments: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or output.dtype not in ROUNDINGS:
                return None
            return rounded_otherwise(output, self._generator, ROUNDINGS[output.dtype])

        handles = [module.register_forward_hook(change) for module in self._model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _compare(plain: _Plain, answers: Sequence[GenerationOutput], new_tokens: int) -> None:
    rounding, off = 0.0, []
    for answer in answers:
        if len(answer.generated_tokens) != new_tokens:
            raise TrialFailedError(f"{len(answer.generated_tokens)} tokens came where {new_tokens} were asked for")
        sequence = answer.prompt_ids, answer.generated_tokens
        right = plain.log_probabilities(*sequence)
        tokens = torch.tensor(answer.generated_tokens, device=right.device).unsqueeze(1)
        with plain.rounded_otherwise():
            changed = plain.log_probabilities(*sequence).gather(1, tokens).squeeze(1)
        likeliest, right = right.max(1).values, right.gather(1, tokens).squeeze(1)
        rounding = max(rounding, float((changed - right).abs().max()))
        logprobs: Any = answer.logprobs  # each a TokenLogprob
        told = torch.tensor([each.logprob for each in logprobs], dtype=right.dtype, device=right.device)
        off.append(float(torch.maximum((told - right).abs(), likeliest - right).max()))
    for number, worst in enumerate(off):
        if not worst <= _MARGIN * rounding:  # nor is NaN right
            where = "alone" if number == 0 else "beside others"
            raise TrialFailedError(
                f"its text is not the plain model's: after a prompt of {len(answers[number].prompt_ids)} tokens asked "
                f"{where}, log-probabilities are off by up to {worst:.2g}, of which roundings explain "
                f"{_MARGIN * rounding:.2g}"
            )


class _TrialRouter(Router):
    """A router that keeps the reasons of failures, and logs none."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []

    def _log_failure(self, output: GenerationOutput) -> None:
        self.failures.append(str(output.error))


class _Asking:
    """Puts prompts to a way of generation and waits for the answers, not longer than until ``late``."""

    def __init__(
        self,
        generation: Generation,
        router: _TrialRouter,
        turns: Turns,
        sampling: GenerationConfig,
        late: Callable[[], bool],
    ) -> None:
        self._generation, self._router, self._turns = generation, router, turns
        self._sampling, self._late = sampling, late

    async def answers(self, rounds: Sequence[Sequence[list[int]]]) -> list[GenerationOutput]:
        """Ask the prompts of one round together, one round after another."""
        answers = []
        for number, prompts in enumerate(rounds):
            self._turns.pause_inference()  # until all are there
            asked = [self._ask(f"trial {number}.{place}", prompt) for place, prompt in enumerate(prompts)]
            self._turns.resume_inference()
            answers += await self._wait(asked)
        return answers

    def _ask(self, request_id: str, prompt: list[int]) -> asyncio.Future[GenerationOutput]:
        answer: asyncio.Future[GenerationOutput] = asyncio.get_running_loop().create_future()
        told = dataclasses.replace(sampling_of(self._sampling), logprobs=0)
        if not self._generation.submit(request_id, prompt, self._sampling, False, answer.set_result, told):
            raise TrialFailedError(self._generation.died_of() or "it takes no requests")
        return answer

    async def _wait(self, asked: Sequence[asyncio.Future[GenerationOutput]]) -> list[GenerationOutput]:
        while True:
            _, waiting = await asyncio.wait(asked, timeout=_POLL_SECONDS)
            if self._router.failures:
                raise TrialFailedError(self._generation.died_of() or self._router.failures[0])
            if not waiting:
                return [answer.result() for answer in asked]
            if (died_of := self._generation.died_of()) is not None:
                raise TrialFailedError(died_of)
            if self._late():
                raise TrialFailedError(f"{len(waiting)} of {len(asked)} requests did not end in time")


@contextlib.contextmanager
def _without_logs_of_batching() -> Iterator[None]:
    """Keep continuous batching from logging, with a traceback, what the trial reports in a line."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


@contextlib.contextmanager
def _cheap_collections() -> Iterator[None]:
    """Leave what exists out of garbage collections: each life of continuous batching ends with two full ones."""
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
