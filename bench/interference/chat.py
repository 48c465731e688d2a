"""What users ask: the model that is served, prompts, and how near its answers are to ties."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import models
from poc_kernels.engines.transformers.engine import share_weights

EXACT_MARGIN = 1e-4
"""In float32, prompts are used only if every token of their answer leads by at least this share of the logits' spread.
Then the order of sums, which depends on the other rows of a step, cannot change the answer."""
TIE_MARGIN = 1 / 16
"""In half precision answers depend on the other rows of each step, with or without proofs. A token may lie this far
under the likeliest, as a share of the logits' spread; a wrong one lies nearly the whole spread under it."""


class Served(NamedTuple):
    """A model in eval mode, and what a report says about it."""

    model: Any
    case: models.Case
    layers: int
    parameters: int


def build(case: models.Case, dtype: torch.dtype, device: torch.device, directory: Path) -> Served:
    """Build the model of ``case``: the demonstration's, saved in ``directory``, or a real configuration.

    Raises:
        ValueError: the case has more layers than the model, or only some layers of a real one.
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
        model = models.build(case, dtype, device, directory).model
        layers = model.config.num_hidden_layers
    return Served(model, case, layers, model.num_parameters())


def greedy(model: Any) -> Any:
    """Return a generation configuration that takes the likeliest tokens, and that no token ends."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = None
    config.use_cache = False
    config.eos_token_id = -1
    return config


def prompts(count: int, mean_tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Draw the token ids of ``count`` prompts, half to one and a half times the mean long, without special tokens."""
    generator = random.Random(seed)
    return [
        [
            generator.randrange(3, vocabulary)
            for _ in range(generator.randint(max(1, mean_tokens // 2), 3 * mean_tokens // 2))
        ]
        for _ in range(count)
    ]


class Margins:
    """Measures how near answers are to ties, by the model's plain forward over the whole text.

    Make it before the model is given to what serves it.
    """

    def __init__(self, model: Any) -> None:
        self._twin = share_weights(model).eval()
        self.exact = model.dtype == torch.float32

    @torch.inference_mode()
    def lead(self, prompt: list[int], answer: list[int]) -> float:
        """Return the smallest lead of a token of the answer over the likeliest other token.

        It is a share of the spread, which is the distance from the mean of the logits to the largest; negative for a
        token that is not the likeliest.
        """
        ids = torch.tensor([prompt + answer], device=self._twin.device)
        logits = self._twin(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = ids[0, len(prompt) :].unsqueeze(1)
        own = logits.gather(1, chosen).squeeze(1)
        others = logits.scatter(1, chosen, -torch.inf).max(1).values
        spread = torch.maximum(own, others) - logits.mean(1)
        return float(((own - others) / spread).min())
