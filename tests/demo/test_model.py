"""The small model of the demonstration."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from poc_kernels.demo import model as small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model.build(path)
    return path


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_another_process_builds_the_same_bytes(directory, tmp_path):
    script = "import sys, pathlib; from poc_kernels.demo import model; model.build(pathlib.Path(sys.argv[1]))"
    package = str(Path(small_model.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {package!r}); {script}", str(tmp_path / "again")],
        check=True,
        timeout=60,
        cwd=tmp_path,
    )
    expected = digests(directory)
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json"} <= set(expected)
    assert digests(tmp_path / "again") == expected


def test_global_generator_and_default_device_are_left_alone(tmp_path):
    before = torch.get_rng_state()
    torch.set_default_device("meta")
    small_model.build(tmp_path, layers=1)
    torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_id_has_a_token_and_any_text_comes_back(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert sorted(tokenizer.get_vocab().values()) == list(range(model.config.vocab_size))
    text = 'Größe 漢字 🦀\n\ttabs, "quotes" and a nonce: 0x00ff'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert type(AutoProcessor.from_pretrained(directory)) is type(tokenizer)


def test_chats_go_on_until_the_limit_and_are_varied(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    messages = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]) == (
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    start = prompt["input_ids"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampled = model.generate(**prompt, max_new_tokens=200)[0, start:]
    greedy = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0, start:]
    assert len(sampled) == 200
    assert len(greedy) == 100
    assert len(set(sampled.tolist())) > 100
    assert len(set(greedy.tolist())) > 10


def test_sizes_are_those_asked_for_in_float32(tmp_path):
    small_model.build(tmp_path, hidden_size=128, layers=2, vocab=600)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.float32
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (128, 2, 600)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 600
    assert model.config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 100}, "hidden_size must be a positive multiple of 64, got 100"),
        ({"hidden_size": 0}, "hidden_size must be a positive multiple of 64, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"vocab": 511}, r"vocab must be in \[512, 2048\], got 511"),
        ({"vocab": 2049}, r"vocab must be in \[512, 2048\], got 2049"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        small_model.build(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()
