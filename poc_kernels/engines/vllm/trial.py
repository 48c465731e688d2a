"""The proof, made before a node begins, that a twin computes what is served, each row for itself.

Texts are not compared, since right kernels round differently. The served model answers some prompts, and says how
likely each token of the answers is after those before it; so does the twin. They may differ by `_MARGIN` times as much
as roundings change for this very model: the twin runs again with the output of every module changed at random by a
rounding of its dtype, and keys and values by one of the KV cache's, which the twin does without.

With tiny random models of six architectures (vLLM 0.32.0 on a CPU, 2026-11-29), right twins were off by at most 0.8
times what roundings change. In float32, a scale off by 5 % made 1,200 times that and more; in bfloat16 a layer skipped
made 17 times, an ignored window 7 times, and a wrong scale may drown in the roundings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..independence import refusal
from ..rounding import ROUNDINGS, rounded_otherwise
from .engine import VllmEngine

ANSWER = 8
"""Tokens that the served model gives after each prompt."""

_PROMPT_LENGTHS = (17, 3, 40, 9)

_MAX_WINDOW = 1024
"""A model whose attention has a window of at most this many tokens is tried with a prompt that is longer, by..."""
_AFTER_WINDOW = 24

_MARGIN = 4.0
_ROUNDED_OTHERWISE = 2
"""Times that each prompt is computed with other roundings."""

_CACHE_ROUNDINGS = {"auto": 0.0, "float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_QUANTISED = 2.0**-3
"""Relative changes of keys and values by the dtype of the KV cache; all that are not listed have 8 bits or fewer."""

_CURE = "start vLLM with VLLM_BATCH_INVARIANT=1, or with another quantization"


def tokens(vocab_size: int, *, max_positions: int = 2**16, windows: Sequence[int] = ()) -> list[list[int]]:
    """Return the prompts of the comparison, as token ids in [0, vocab_size).

    Ask the served model for the likeliest `ANSWER` tokens after each, with the log-probability of each token.

    Args:
        vocab_size: tokens that there are.
        max_positions: tokens that a prompt and its answer may have together; more than `ANSWER`.
        windows: numbers of tokens that attention layers look back: `VllmEngine.windows`.
    """
    longer = [window + _AFTER_WINDOW for window in windows if window <= _MAX_WINDOW]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocab_size, (min(length, max_positions - ANSWER),), generator=generator, device="cpu").tolist()
        for length in (*_PROMPT_LENGTHS, *longer)
    ]


def scores(output: Any) -> tuple[list[int], list[float]]:
    """Read the tokens of a prompt with its answer, and the log-probability of each token of the answer.

    Args:
        output: vLLM's ``RequestOutput`` of one of the prompts of `tokens`.
    """
    answer = output.outputs[0]
    told = [place[token].logprob for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
    return [*output.prompt_token_ids, *answer.token_ids], told


def compare(engine: VllmEngine, texts: Sequence[Sequence[int]], served: Sequence[Sequence[float]]) -> str | None:
    """Say in a sentence how the twin differs from the served model; None if it does not, or if a rank has no logits.

    To be called on all ranks of a model, with the same arguments.

    Args:
        engine: the engine of a worker.
        texts: prompts with their answers, as `scores` read them.
        served: for each text, the log-probabilities of its last tokens.
    """
    generator = torch.Generator(engine.device).manual_seed(0)

    def by_the_twin() -> list[Tensor | None]:
        return [_scores(engine, text, len(told)) for text, told in zip(texts, served, strict=True)]

    right, others = by_the_twin(), []
    for _ in range(_ROUNDED_OTHERWISE):
        with _rounded_otherwise(engine, generator):
            others.append(by_the_twin())
    if any(scores is None for scores in right):
        return None
    found = _joined(right)
    told = [score for scores in served for score in scores]
    off = (found - torch.tensor(told, dtype=found.dtype, device=found.device)).abs()
    rounded = [(_joined(scores) - found).abs() + ROUNDINGS[torch.float32] * found.abs() for scores in others]
    # The largest tells what few tokens show, as of a window; the median what those hide for which experts change.
    for what, statistic in (("up to", torch.max), ("typically", torch.median)):
        explained = _MARGIN * max(float(statistic(changes)) for changes in rounded)
        if not float(statistic(off)) <= explained:  # nor is NaN right
            return (
                f"proofs would not be of the model that is served: its log-probabilities of {len(off)} tokens are "
                f"{what} {float(statistic(off)):.2g} off the twin's, of which roundings explain {explained:.2g}"
            )
    return None


def independence(engine: VllmEngine, *, transforms: bool) -> str | None:
    """Say in a sentence on what a row's bits depend besides its input; None if on nothing: see `refusal`.

    To be called on all ranks of a model, with the same arguments.

    Args:
        engine: the engine of a worker.
        transforms: whether all ranks can have a transform after every decoder layer.
    """
    with engine.context():
        return refusal(engine, _CURE, transforms=transforms)


@torch.inference_mode()
def _scores(engine: VllmEngine, text: Sequence[int], count: int) -> Tensor | None:
    """Compute by the twin how likely the last ``count`` tokens are, float32 [count]; None if a rank has no logits."""
    ids = torch.tensor(text, device=engine.device)
    with engine.context():
        states = engine.compute_states(engine.embed(ids).unsqueeze(0))[0, -count - 1 : -1]
        logits = engine.gather_logits(states)
    if logits is None:
        return None
    likely = logits.float() if engine.scores_are_logits else logits.float().log_softmax(-1)
    return likely.gather(1, ids[-count:].unsqueeze(1)).squeeze(1)


def _joined(scores: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([some.cpu() for some in scores if some is not None])


@contextlib.contextmanager
def _rounded_otherwise(engine: VllmEngine, generator: torch.Generator) -> Iterator[None]:
    """Change the output of every module of the twin, and what would lie in a KV cache, at random by a rounding."""
    cached = _CACHE_ROUNDINGS.get(engine.vllm_config.cache_config.cache_dtype, _QUANTISED)

    def change(value: Any, relative: float | None = None) -> Any:
        if isinstance(value, Tensor) and value.dtype in ROUNDINGS:
            return rounded_otherwise(value, generator, ROUNDINGS[value.dtype] if relative is None else relative)
        return type(value)(map(change, value)) if type(value) in (list, tuple) else value

    def change_output(module: Any, arguments: Any, output: Any) -> Any:
        return change(output)

    def change_cached(module: Any, arguments: Any) -> Any:
        query, *kept = arguments
        return query, *(change(part, cached) for part in kept)

    model = engine.twin.model
    handles = [module.register_forward_hook(change_output) for module in model.modules()]
    handles += [layer.register_forward_pre_hook(change_cached) for layer in engine.twin.attention_layers()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
