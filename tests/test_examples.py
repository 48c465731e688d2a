"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_mixed_batch_says_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    load("mixed_batch").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:2]] == ["True", "True"]
    assert float(lines[2].split(": ")[1].split()[0]) < 1e-5


@torch.inference_mode()
def test_any_mix_of_rows_gives_users_the_bits_of_a_batch_without_a_round() -> None:
    example = load("mixed_batch")
    model = example.PackedModel().eval()
    projection = example.RandomProjection.from_block_hash("ab" * 32, example.HIDDEN_SIZE)
    generator = torch.Generator().manual_seed(0)
    for lengths, proofs in (([1, 1], [True, False]), ([3, 63, 7], [False, True, False]), ([5, 4], [False, False])):
        x = torch.randn(sum(lengths), example.HIDDEN_SIZE, generator=generator)
        is_proof = torch.tensor(proofs).repeat_interleave(torch.tensor(lengths))
        plain = example.forward(model, None, x, is_proof, lengths)
        mixed = example.forward(model, projection, x, is_proof, lengths)
        users = ~torch.tensor(proofs)
        assert torch.equal(mixed[users].view(torch.int32), plain[users].view(torch.int32))
        assert all(not torch.equal(mixed[row], plain[row]) for row, proof in enumerate(proofs) if proof)
