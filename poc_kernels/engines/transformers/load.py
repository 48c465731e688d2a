"""Loads a model and its tokenizer from a directory or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def model_name(name: str) -> str:
    """Name a model for its users: a directory by its last part, a model of the hub by its id."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _check_path(name: str) -> None:
    """Raise ValueError if ``name`` can be no id of the hub, and no directory is there."""
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"model must be a directory or an id on the Hugging Face hub, got the file {name!r}")
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ValueError(f"model must be a directory or an id on the Hugging Face hub: {name!r} does not exist")


def load_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a causal language model, in eval mode on its device, and its tokenizer.

    Args:
        name: a directory, or an id on the Hugging Face hub.
        device: as torch names it, or "auto": a CUDA device if there is one, else the CPU.
        dtype: name of a dtype of torch, or "auto": the one that the weights are stored in.

    Raises:
        OSError, ValueError: there is no such directory or model, or no such device; the model cannot be loaded.
    """
    _check_path(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError of a torch without CUDA
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error
    if there.is_meta:
        raise ValueError(f"device must be one that computes, got {device!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be a directory, or an id on the Hugging Face hub, of a model with a tokenizer, "
            f"got {name!r}: {error}"
        ) from error
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.to(torch.device(device)).eval(), tokenizer
