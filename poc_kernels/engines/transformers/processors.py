"""What a generation config does to scores before a token is chosen: tokens that are forced, banned or biased."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from .sampling import without_warpers


def without_processors(config: GenerationConfig) -> GenerationConfig:
    """Copy what ``config`` says of a text's length and end, and nothing that changes scores."""
    kept = ("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache")
    return GenerationConfig(do_sample=False, **{name: getattr(config, name) for name in kept})  # type: ignore[no-untyped-call]


def without_sampling(config: GenerationConfig) -> GenerationConfig:
    """Copy ``config``, and leave out what `sampling.choose` does."""
    copied = without_warpers(config)
    copied.do_sample = False
    return copied


def processors_of(model: Any, config: GenerationConfig, prompt: Sequence[int]) -> LogitsProcessorList:
    """Make the processors that ``model.generate`` would apply to the scores after ``prompt``."""
    config = copy.deepcopy(config)
    tokens = torch.tensor([prompt], device=model.device)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    processors: LogitsProcessorList = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=tokens,
        device=model.device,
        model_kwargs={"attention_mask": torch.ones_like(tokens)},
    )
    return processors


class OwnProcessors:
    """Applies the processors of a generation config to each request's scores, with the tokens of that request alone.

    Continuous batching drops some of them, and shows others the last tokens of all requests as if they were one text.

    Attributes:
        needed: whether the config has any.
    """

    def __init__(self, model: Any, config: GenerationConfig) -> None:
        self._model, self._config = model, without_sampling(config)
        self._processors: dict[int, tuple[Any, LogitsProcessorList]] = {}
        self.needed = len(processors_of(model, self._config, [0])) > 0

    def __call__(self, scores: Tensor, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]]) -> Tensor:
        """Process scores [rows, vocabulary].

        Args:
            scores: left as they are.
            requests: what stands for the request in all of its steps, its prompt and its answer so far, of each row.
        """
        kept, self._processors = self._processors, {}
        rows = []
        for row, (request, prompt, generated) in enumerate(requests):
            entry = kept.get(id(request))
            if entry is None:
                entry = request, processors_of(self._model, self._config, prompt)
            self._processors[id(request)] = entry  # with the request, so that no other gets its id
            tokens: Any = torch.tensor([[*prompt, *generated]], device=scores.device)
            rows.append(entry[1](tokens, scores[row : row + 1].clone()))
        return torch.cat(rows) if rows else scores
