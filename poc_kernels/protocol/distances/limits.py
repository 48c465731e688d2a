"""Which rounds fit a model, known without the model itself."""

from __future__ import annotations

from ..config import PoCConfig
from ..limits import check_length, check_rows


def check_fits(config: PoCConfig, *, max_positions: int, vocab_size: int, max_logits: int | None) -> None:
    """Raise a ValueError if a round does not fit a model.

    Args:
        config: the round.
        max_positions: longest sequence that the model takes.
        vocab_size: logits per row.
        max_logits: bound on batch_size * vocab_size; None for no bound.
    """
    check_length(config, max_positions)
    check_rows(config, per_row=vocab_size, bound=max_logits, what="with this vocabulary")
