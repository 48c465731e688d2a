"""The tiny model that the servers of these tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from poc_kernels.demo import model as demo_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small causal LM of random weights and its tokenizer, as ``from_pretrained`` takes it."""
    directory = tmp_path_factory.mktemp("tiny-model")
    demo_model.build(directory)
    return directory
