"""Which rounds fit a model, known without the model itself."""

from __future__ import annotations

from .config import PoCConfig


def check_length(config: PoCConfig, max_positions: int) -> None:
    """Raise a ValueError if the inputs of a round are longer than the sequences that a model takes."""
    if config.seq_len > max_positions:
        raise ValueError(f"seq_len must be at most the {max_positions} positions of the model, got {config.seq_len}")
