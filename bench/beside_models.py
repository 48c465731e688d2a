"""What the suite beside inference serves: a model with random weights, prompts, and what it answers to them alone."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, NamedTuple

import round_models
import torch

from poc_kernels.engines.transformers.engine import share_weights

EXACT_MARGIN = 1e-4
"""Prompts are used in float32 only if no token of their answer is nearer to a tie than so much of the logits' spread:
then no order of sums, which the batch of a step decides, can change the answer."""
TIE_MARGIN = 1 / 16
"""In half precision answers hang on the batch of each step, proofs or none: a token may lie so far under the likeliest,
as a share of the logits' spread. Another one, wrongly computed, lies near the whole spread under it."""


class Served(NamedTuple):
    """A model in eval mode, and what a report says of it."""

    model: Any
    case: round_models.Case
    layers: int
    parameters: int


def build(case: round_models.Case, dtype: torch.dtype, device: torch.device, directory: Path) -> Served:
    """The model of ``case``: the demonstration's, saved in ``directory``, or a real configuration with random weights.

    Raises:
        ValueError: the model has not so many layers, or a part of a real one is asked for.
        MemoryError: the device has too little free memory.
    """
    if case.model == "demo":
        from transformers import AutoModelForCausalLM

        from poc_kernels.demo import model as demo

        layers = 4 if case.layers is None else case.layers
        demo.build(directory, layers=layers)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    else:
        if case.layers is not None:
            raise ValueError(f"case must be a whole model, whose steps and forwards are all timed, got {case}")
        model = round_models.build(case, dtype, device, directory).model
        layers = model.config.num_hidden_layers
    return Served(model, case, layers, model.num_parameters())


def greedy(model: Any) -> Any:
    """A generation configuration of the likeliest tokens, of which none ends an answer."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = None
    config.use_cache = False
    config.eos_token_id = -1
    return config


def prompts(count: int, mean_tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids of ``count`` prompts, of half to one and a half times the mean length; no special token is in them."""
    generator = random.Random(seed)
    return [
        [
            generator.randrange(3, vocabulary)
            for _ in range(generator.randint(max(1, mean_tokens // 2), 3 * mean_tokens // 2))
        ]
        for _ in range(count)
    ]


class Margins:
    """How near answers are to ties, by the model's plain forward over the whole text.

    Make it before the model is given to what serves it.
    """

    def __init__(self, model: Any) -> None:
        self._twin = share_weights(model).eval()
        self.exact = model.dtype == torch.float32

    @torch.inference_mode()
    def lead(self, prompt: list[int], answer: list[int]) -> float:
        """By how much the answer's tokens lead before the likeliest other, the least lead of all.

        In shares of the spread, from the mean of the logits to the largest; negative for a token that is not the
        likeliest.
        """
        ids = torch.tensor([prompt + answer], device=self._twin.device)
        logits = self._twin(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = ids[0, len(prompt) :].unsqueeze(1)
        own = logits.gather(1, chosen).squeeze(1)
        others = logits.scatter(1, chosen, -torch.inf).max(1).values
        spread = torch.maximum(own, others) - logits.mean(1)
        return float(((own - others) / spread).min())
