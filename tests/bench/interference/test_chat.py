"""What users ask, and how near answers are to ties."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.common import models
from bench.interference import chat


def test_leads_are_those_of_a_plain_forward(tmp_path):
    case = models.Case("demo", 1, 2, 4)
    served = chat.build(case, torch.float32, torch.device("cpu"), tmp_path)
    assert served.layers == 1
    prompt, answer = [5, 6, 7], []
    with torch.inference_mode():
        for _ in range(3):
            logits = served.model(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
        first, second = logits.topk(2).values
    margins = chat.Margins(served.model)
    assert margins.exact
    lead = margins.lead(prompt, answer)
    assert 0 < lead <= float((first - second) / (first - logits.mean())) * (1 + 1e-5)
    lowest = int(logits.argmin())
    expected = float((logits[lowest] - first) / (first - logits.mean()))
    assert margins.lead(prompt, [*answer[:2], lowest]) == pytest.approx(expected, rel=1e-4)


def test_a_part_of_a_real_model_is_refused(tmp_path):
    case = models.Case("qwen3-0.6b", 2, 2, 4)
    with pytest.raises(ValueError, match="case must be a whole model"):
        chat.build(case, torch.float32, torch.device("cpu"), tmp_path)


def test_prompts_are_of_the_seed_and_their_lengths_spread():
    made = chat.prompts(200, 8, 500, 1)
    assert made == chat.prompts(200, 8, 500, 1) != chat.prompts(200, 8, 500, 2)
    assert {len(prompt) for prompt in made} == set(range(4, 13))
    assert all(3 <= token < 500 for prompt in made for token in prompt)
