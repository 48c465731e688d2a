"""Samples each request's next token as that request asks: continuous batching itself samples all requests alike."""

from __future__ import annotations

import collections
import copy
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

MAX_LOGPROBS = 20
"""Likeliest tokens that a request may ask for at each position."""
_KEY = "sampling"
_MIN_TEMPERATURE = 1e-5  # below, the likeliest token is all that is left
_CANDIDATES = 256  # tokens in which top_p is nearly always reached
_LEAST_LOGPROB = -9999.0  # for a token that cannot come: JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: that many of the likeliest tokens are kept; 0 keeps all.
        top_p: the likeliest tokens are kept until their probabilities add up to it, in [0, 1].
        min_p: tokens are kept that are at least that many times as probable as the likeliest one, in [0, 1].
        seed: the same seed draws the same token from the same probabilities; None draws another one each time.
        repetition_penalty: divides positive logits of tokens in prompt and answer, and multiplies negative ones.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted as often as the token is in the answer.
        logit_bias: added to the logits of these token ids.
        logprobs: None for no log probabilities, else how many of the likeliest tokens have theirs told beside the
            chosen one, at most `MAX_LOGPROBS`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _MIN_TEMPERATURE

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    @property
    def truncates(self) -> bool:
        """Whether the unlikeliest tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token as the model gives it: before temperature, penalties, biases and truncation.

    Attributes:
        logprob: natural logarithm.
        top: (token id, logprob) of the likeliest tokens, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Row:
    """A request whose next token is chosen: how, and its token ids so far."""

    sampling: Sampling
    prompt: Sequence[int]
    generated: Sequence[int]


def sampling_of(config: GenerationConfig) -> Sampling:
    """Return what a generation config says of sampling."""
    return Sampling(
        temperature=(config.temperature if config.temperature is not None else 1.0) if config.do_sample else 0.0,
        top_k=config.top_k or 0,
        top_p=config.top_p if config.top_p is not None else 1.0,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


def without_warpers(config: GenerationConfig) -> GenerationConfig:
    """Return a copy of ``config`` that leaves to `choose` what each request may set."""
    copied = copy.deepcopy(config)
    copied.temperature = copied.top_k = copied.top_p = copied.min_p = copied.repetition_penalty = None
    return copied


def choose(logits: Tensor, rows: Sequence[Row], chance: random.Random) -> tuple[Tensor, list[TokenLogprob | None]]:
    """Choose the next token of every row.

    Args:
        logits: float32 [rows, vocabulary]; left as they are.
        rows: one per row of ``logits``.
        chance: draws for the rows that have no seed.

    Returns:
        token ids [rows], int64 on the device of ``logits``; and for each row that asks for them, log probabilities.
    """
    adjusted = logits
    if any(row.sampling.adjusts for row in rows):
        adjusted = logits.clone()
        for scores, row in zip(adjusted, rows, strict=True):
            if row.sampling.adjusts:
                _adjust(scores, row)
    tokens = adjusted.argmax(-1)
    drawn = [n for n, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(adjusted[index], [rows[n] for n in drawn], chance)
    return tokens, _logprobs(logits, rows, tokens)


def _adjust(scores: Tensor, row: Row) -> None:
    """Penalise tokens of the answer (of the prompt too, for repetition) and add biases, in place."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.generated}), device=scores.device)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    changes: dict[int, float] = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in collections.Counter(row.generated).items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    if changes:
        scores[torch.tensor(list(changes), device=scores.device)] += scores.new_tensor(list(changes.values()))


def _draw(logits: Tensor, rows: Sequence[Row], chance: random.Random) -> Tensor:
    """Draw a token for each row, by one uniform number per row and the inverse of the cumulated probabilities."""
    each = [row.sampling for row in rows]
    scaled = logits / _column(logits, [sampling.temperature for sampling in each])
    if any(sampling.truncates for sampling in each):
        scaled = scaled.masked_fill(scaled < _least(scaled, each, _CANDIDATES), -torch.inf)
    cumulated = scaled.softmax(-1).double().cumsum(-1)
    uniform = _column(cumulated, [_uniform(row, chance) for row in rows])
    # The first token beyond: one of probability zero never is.
    places = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return places.clamp_(max=logits.shape[1] - 1).squeeze(1)


def _least(scaled: Tensor, each: Sequence[Sampling], candidates: int) -> Tensor:
    """Return the least logit [rows, 1] that top_k, top_p and min_p leave in each row; of equal ones, they leave all.

    To sort a whole vocabulary takes longer than the rest: the likeliest ``candidates`` are looked at first, and all
    only where those are not enough.
    """
    vocabulary = scaled.shape[1]
    top_k = [min(sampling.top_k or vocabulary, vocabulary) for sampling in each]
    candidates = min(max(candidates, *(k for k in top_k if k < vocabulary), 1), vocabulary)
    likeliest = scaled.topk(candidates, dim=-1).values  # the likeliest first
    least = likeliest.gather(1, _column(scaled, [k - 1 for k in top_k], torch.int64).clamp(max=candidates - 1))
    least = least.masked_fill(_column(scaled, [k == vocabulary for k in top_k], torch.bool), -torch.inf)
    if any(sampling.top_p < 1 for sampling in each):
        top_p = _column(scaled, [sampling.top_p for sampling in each], torch.float64)
        whole = scaled.masked_fill(scaled < least, -torch.inf).logsumexp(-1, keepdim=True)
        probabilities = (likeliest - whole).exp().masked_fill(likeliest < least, 0.0).double()
        cumulated = probabilities.cumsum(-1)
        short = (cumulated[:, -1:] < top_p) & (top_p < 1) & (likeliest[:, -1:] > least)
        if candidates < vocabulary and short.any():
            return _least(scaled, each, vocabulary)
        kept = (cumulated - probabilities < top_p).sum(-1, keepdim=True).clamp(min=1)
        least = torch.maximum(least, likeliest.gather(1, kept - 1).masked_fill(top_p == 1, -torch.inf))
    return torch.maximum(least, likeliest[:, :1] + _column(scaled, [sampling.min_p for sampling in each]).log())


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(1)


def _uniform(row: Row, chance: random.Random) -> float:
    """Return a number in [0, 1); with a seed, a function of it and of the position alone."""
    if row.sampling.seed is None:
        return chance.random()
    position = len(row.prompt) + len(row.generated)
    digest = hashlib.blake2b(f"{row.sampling.seed} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32


def _logprobs(logits: Tensor, rows: Sequence[Row], tokens: Tensor) -> list[TokenLogprob | None]:
    told: list[TokenLogprob | None] = [None] * len(rows)
    asked = [n for n, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asked:
        return told
    index = torch.tensor(asked, device=logits.device)
    logprobs = logits[index].log_softmax(-1).clamp_(min=_LEAST_LOGPROB)
    chosen = logprobs.gather(1, tokens[index].unsqueeze(1)).squeeze(1).tolist()
    most = min(max(rows[n].sampling.logprobs or 0 for n in asked), logits.shape[1])
    values, ids = (part.tolist() for part in logprobs.topk(most, dim=-1))
    for place, n in enumerate(asked):
        count = rows[n].sampling.logprobs or 0
        pairs = zip(ids[place][:count], values[place][:count], strict=True)
        told[n] = TokenLogprob(chosen[place], tuple(pairs))
    return told


_GREEDY = Sampling()  # of requests that continuous batching makes up to warm up


class BatchSampler:
    """Has `choose` sample the requests of a batch processor of continuous batching.

    The model's forward may be replayed from a captured graph, which holds whatever was computed when it was captured.
    So it ends with the logits, in a buffer that stays in place; sampling follows outside, by what each request asks.

    Make it before the processor computes anything.

    Args:
        processor: the ``batch_processor`` of a manager of continuous batching, not asynchronous.
        process: changes the logits [rows, vocabulary] first, given of each row what stands for its request, its prompt
            and its answer so far.
    """

    def __init__(self, processor: Any, process: Callable[[Tensor, Sequence[Any]], Tensor] | None = None) -> None:
        self._process = process
        self._chance = random.Random()
        self._in_and_out = processor.inputs_and_outputs
        runner = processor.model_runner
        self._forward = runner.compute_batch
        self._max_rows = runner.cb_config.max_requests_per_batch if runner.pad_inputs else None
        self._logits: Any = None
        self._logprobs: list[TokenLogprob | None] = []
        self._update = self._in_and_out.prepare_batch_update
        processor.logit_processor.supported_keys[_KEY] = Sampling
        runner._sample = self._keep
        runner.compute_batch = self._compute
        self._in_and_out.prepare_batch_update = self._with_logprobs

    @staticmethod
    def arguments(sampling: Sampling) -> dict[str, Any]:
        """Return the arguments of ``add_request`` for a request that is sampled so."""
        return {_KEY: sampling}

    def _keep(self, logits: Tensor, _: Tensor) -> None:
        """Take the logits [1, rows, vocabulary] of a forward. Runs within a capture too."""
        logits = logits[0]
        if self._max_rows is None:
            self._logits = logits
            return
        if self._logits is None:  # the forward before the first capture
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        self._logits[: logits.shape[0]].copy_(logits)

    def _compute(self, model: Any, batch_data: Any) -> None:
        self._forward(model, batch_data)
        states = [each.state for each in self._in_and_out.requests_in_batch if each.has_new_token]
        with torch.cuda.stream(self._in_and_out.compute_stream):
            rows = [self._row(state) for state in states]
            logits = self._logits[: len(rows)]
            if self._process is not None:
                requests = [(state, row.prompt, row.generated) for state, row in zip(states, rows, strict=True)]
                logits = self._process(logits, requests)
            tokens, self._logprobs = choose(logits, rows, self._chance)
            self._in_and_out.output_ids[0, : len(rows)].copy_(tokens)
        if self._max_rows is None:
            self._logits = None

    def _row(self, state: Any) -> Row:
        sampling = state.logit_processor_kwargs.get(_KEY, _GREEDY)
        prompt, generated = state.initial_tokens, state.generated_tokens
        # A request that had to make room begins again, with what it had generated at the end of its prompt.
        size = state._true_initial_tokens
        return Row(sampling, prompt[:size], prompt[size:] + generated) if size else Row(sampling, prompt, generated)

    def _with_logprobs(self) -> tuple[Any, list[int], list[TokenLogprob | None]]:
        requests, tokens, _ = self._update()
        return requests, tokens, self._logprobs
