"""What the model's generation config does to scores is done to each request's own, by both ways of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, served_tokens, tiny
from served import load, started

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 10, 11, 12, 9, 10, 11], [5, 6, 7, 5]]
HALF = list(range(VOCABULARY // 2))
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "suppress_tokens": {"suppress_tokens": HALF},
    "begin_suppress_tokens": {"begin_suppress_tokens": HALF},
    "bad_words_ids": {"bad_words_ids": [[token] for token in HALF] + [[5, 6], [9, 10]]},
    "sequence_bias": {"sequence_bias": [[[100], 9.0], [[5, 6], -9.0]]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(2000))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": [1, 2]},
    "two": {"repetition_penalty": 1.3, "min_new_tokens": 3, "eos_token_id": HALF},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)[1]


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    text = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return list(text[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", ["llama", "gptj"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_text_is_that_of_generate(tokenizer: Any, setting: str, kind: str) -> None:
    model = tiny(kind)
    model.generation_config.eos_token_id = 2
    for name, value in SETTINGS[setting].items():
        setattr(model.generation_config, name, value)
    expected = [generated(model, prompt, 10) for prompt in PROMPTS]
    with started(model, tokenizer) as inference:
        assert inference.batched is (kind == "llama")
        assert [served_tokens(inference, [prompt], 10)[0] for prompt in PROMPTS] == expected
        assert served_tokens(inference, PROMPTS, 10) == expected
        assert inference.restarts == 0


def test_a_request_that_gave_its_cache_back_keeps_its_tokens(tokenizer: Any) -> None:
    """More at once than the cache holds: continuous batching begins some again, with what they have so far."""
    model = tiny("llama")
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = 2
    prompts = [[*prompt, 20 + number] for number, prompt in enumerate(3 * PROMPTS)]
    expected = [generated(model, prompt, 30) for prompt in prompts]
    with started(model, tokenizer, kv_block_size=4, kv_blocks=16, max_batch_tokens=16) as inference:
        assert served_tokens(inference, prompts, 30) == expected


def test_another_search_is_not_asked_for_and_said(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    expected = generated(model, PROMPTS[0], 6)
    model.generation_config.num_beams = 3
    model.generation_config.stop_strings = ["a"]
    model.generation_config.max_length = 5
    with started(model, tokenizer) as inference:
        assert served_tokens(inference, PROMPTS[:1], 6) == [expected]
    [record] = [record for record in caplog.records if "have no effect" in record.message]
    assert record.settings == ["num_beams", "stop_strings"]  # type: ignore[attr-defined]
