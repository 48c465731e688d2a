"""Where a model comes from: what can be no model is said before anything is loaded, and asked of no hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from poc_kernels.engines.transformers import load
from poc_kernels.engines.transformers.load import load_model, model_name


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "AutoTokenizer", None)  # nothing is asked for


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name", ["/models/nowhere", "./nowhere", "../nowhere/at/all", "~/nowhere", "a/b/c", "nowhere/"]
)
def test_a_path_that_does_not_exist_is_said_not_to(name: str) -> None:
    with pytest.raises(ValueError, match=f"a directory or an id on the Hugging Face hub: '{name}' does not exist"):
        load_model(name, "cpu", "auto")


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"a directory or an id on the Hugging Face hub, got the file '.*model\.gguf'"):
        load_model(str(tmp_path / "model.gguf"), "cpu", "auto")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(("device", "why"), [("nowhere", "that torch has here"), ("meta", "that computes")])
def test_a_device_that_cannot_serve_is_named(tmp_path: Path, device: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one {why}, got '{device}'"):
        load_model(str(tmp_path), device, "auto")


def test_an_id_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="of a model with a tokenizer, got 'nobody/nothing': "):
        load_model("nobody/nothing", "cpu", "auto")


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/.", "{}/../Qwen3"])
def test_a_directory_is_named_by_its_last_part(tmp_path: Path, written: str) -> None:
    directory = tmp_path / "Qwen3"
    directory.mkdir()
    assert model_name(written.format(directory)) == "Qwen3"


def test_names_that_are_no_directories_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_name(".") == tmp_path.name
