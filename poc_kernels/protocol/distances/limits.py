"""Which rounds fit a model, known without the model itself."""

from __future__ import annotations

from ..config import PoCConfig
from ..limits import check_length


def check_fits(config: PoCConfig, *, max_positions: int, vocab_size: int, max_logits: int | None) -> None:
    """Raise a ValueError if a round does not fit a model.

    Args:
        config: the round.
        max_positions: longest sequence that the model takes.
        vocab_size: logits per row.
        max_logits: bound on batch_size * vocab_size; None for no bound.
    """
    check_length(config, max_positions)
    rows = config.batch_size if max_logits is None else max(1, max_logits // vocab_size)
    if config.batch_size > rows:
        raise ValueError(f"batch_size must be at most {rows} with this vocabulary, got {config.batch_size}")
