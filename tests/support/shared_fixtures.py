"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from interleaving import Instruments


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small causal LM of random weights and its tokenizer, as ``from_pretrained`` takes it."""
    from poc_kernels.demo import model as demo_model

    directory = tmp_path_factory.mktemp("tiny-model")
    demo_model.build(directory)
    return directory


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """A simulated clock, and threads that run one at a time, in `turns`."""
    from interleaving import Instruments

    from poc_kernels.scheduling import turns

    made = Instruments()
    made.patch(monkeypatch, turns)
    return made
