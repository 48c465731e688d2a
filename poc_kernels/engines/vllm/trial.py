"""The proof, made before a node begins, that a twin computes what is served, each row for itself.

Texts are not compared, since right kernels round differently. The served model says how likely each token of some
prompts is after those before it, and so does the twin. They may differ by `_MARGIN` times as much as roundings do to
this very model: the twin runs again with the output of every module changed at random by a rounding of its dtype, and
keys and values by one of the KV cache's, which the twin does without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...protocol import PoCConfig
from ..rounding import ROUNDINGS, rounded_otherwise
from .engine import VllmEngine

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

_LOGITS_AT_ONCE = 64
"""Rows of logits that exist at a time: vocabularies are large, and a GPU's memory may be nearly full."""

_BATCH, _LENGTH = 4, 32
"""Shape in which rows are tried on a CPU, where one of a round may take minutes."""


def tokens(vocab_size: int, *, max_positions: int = 2**16, windows: Sequence[int] = ()) -> list[list[int]]:
    """Return the prompts of the comparison, as token ids in [0, vocab_size).

    Ask the served model for each with ``SamplingParams(prompt_logprobs=0, max_tokens=1)``.

    Args:
        vocab_size: tokens that there are.
        max_positions: tokens that a prompt and an answer may have together, at least 3.
        windows: numbers of tokens that attention layers look back: `VllmEngine.windows`.
    """
    longer = [window + _AFTER_WINDOW for window in windows if window <= _MAX_WINDOW]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocab_size, (min(length, max_positions - 1),), generator=generator, device="cpu").tolist()
        for length in (*_PROMPT_LENGTHS, *longer)
    ]


def scores(output: Any) -> list[float]:
    """Read how likely the served model finds the second and each later token of a prompt.

    Args:
        output: vLLM's ``RequestOutput`` of one of the prompts of `tokens`.
    """
    prompt = output.prompt_token_ids
    return [output.prompt_logprobs[place][prompt[place]].logprob for place in range(1, len(prompt))]


def compare(engine: VllmEngine, prompts: Sequence[Sequence[int]], served: Sequence[Sequence[float]]) -> str | None:
    """Say in a sentence how the twin differs from the served model; None if it does not, or if a rank has no logits.

    To be called on all ranks of a model, with the same arguments.

    Args:
        engine: the engine of a worker.
        prompts: the prompts of `tokens`.
        served: what `scores` read for each of them.
    """
    generator = torch.Generator(engine.device).manual_seed(0)
    found = [_scores(engine, prompt) for prompt in prompts]
    others = []
    for _ in range(_ROUNDED_OTHERWISE):
        with _rounded_otherwise(engine, generator):
            others.append([_scores(engine, prompt) for prompt in prompts])
    if any(scores is None for scores in found):
        return None
    twin = _joined(found)
    off = (twin - torch.tensor([score for scores in served for score in scores])).abs()
    rounded = [(_joined(scores) - twin).abs() + ROUNDINGS[torch.float32] * twin.abs() for scores in others]
    # The largest tells what few tokens show, as of a window; the median what those hide for which experts change.
    for what, statistic in (("up to", torch.max), ("typically", torch.median)):
        explained = _MARGIN * max(float(statistic(changes)) for changes in rounded)
        if not float(statistic(off)) <= explained:  # nor is NaN right
            return (
                f"proofs would not be of the model that is served: its log-probabilities of {len(off)} tokens are "
                f"{what} {float(statistic(off)):.2g} off the twin's, of which roundings explain {explained:.2g}"
            )
    return None


def independence(engine: VllmEngine) -> str | None:
    """Say in a sentence on what a row's bits depend besides its input; None if on nothing.

    Rows are computed among others, again, permuted, beside others, and alone, as rounds do it: in one shape. On a GPU
    it is that of a round with default settings, whose forward is measured and captured with it. To be called on all
    ranks of a model.
    """
    batch, length = (PoCConfig.batch_size, PoCConfig.seq_len) if engine.device.type == "cuda" else (_BATCH, _LENGTH)
    length = min(length, engine.max_positions)
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        x = torch.randn(batch, length, engine.hidden_size, generator=generator, device="cpu")
        return x.to(engine.device, engine.dtype)

    x, order = random(), torch.arange(batch - 1, -1, -1, device=engine.device)
    beside = random()
    beside[0] = x[0]
    ways: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = [
        ("the call", x, lambda rows: rows),
        ("its place in the batch", x[order], lambda rows: rows[order]),
        ("the rows beside it", beside, lambda rows: rows[:1]),
        ("the rows beside it", x[:1].expand_as(x), lambda rows: rows[:1].expand_as(rows)),
    ]
    with engine.context():
        expected = _results(engine, x)
        found = [(what, _results(engine, others), pick) for what, others, pick in ways]
    if not all(bool(part.isfinite().all()) for part in expected):
        return "proofs need finite logits, which this model does not compute of random inputs: serve another model"
    for what, results, pick in found:
        for right, part in zip(expected, results, strict=True):
            wanted = pick(right)
            if not torch.equal(part[: len(wanted)], wanted):
                return (
                    f"proofs need rows whose bits depend on nothing else, here they depend on {what}: start vLLM with "
                    "VLLM_BATCH_INVARIANT=1, or with another quantization"
                )
    return None


def _results(engine: VllmEngine, x: Tensor) -> list[Tensor]:
    """Compute the last hidden states and the logits of inputs, as a round does."""
    hidden = engine.forward(x)[:, -1].clone(memory_format=torch.contiguous_format)
    return [hidden, engine.compute_logits(hidden)]


@torch.inference_mode()
def _scores(engine: VllmEngine, prompt: Sequence[int]) -> Tensor | None:
    """Compute by the twin what `scores` reads of the served model: float32 [tokens - 1]; None if a rank has none."""
    ids = torch.tensor(prompt, device=engine.device)
    with engine.context():
        states = engine.compute_states(engine.embed(ids).unsqueeze(0))[0, :-1]
        logits = [engine.gather_logits(rows) for rows in torch.split(states, _LOGITS_AT_ONCE)]
        found = [
            (rows.float() if engine.scores_are_logits else rows.float().log_softmax(-1)).gather(1, after.unsqueeze(1))
            for rows, after in zip(logits, torch.split(ids[1:], _LOGITS_AT_ONCE), strict=True)
            if rows is not None
        ]
    return torch.cat(found).squeeze(1) if found else None


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
