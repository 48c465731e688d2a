"""Which rounds fit a model, known without the model itself."""

from __future__ import annotations

from typing import NamedTuple

from .config import PoCConfig


class Bounds(NamedTuple):
    """Bounds on what a forward's rows take beside the model; None for no bound.

    A round that takes more is refused: its forwards cannot be divided, since their shape decides bits.
    """

    logits: int | None = None
    """batch_size * vocab_size of a round of distances: each takes some 30 bytes, with its permutation and what the
    distance needs."""
    signs: int | None = None
    """batch_size * layers * hidden_size of a round of fingerprints: each takes as many bytes as a number of the model's
    dtype."""


NO_BOUNDS = Bounds()
SERVER_BOUNDS = Bounds(logits=2**26, signs=2**28)
"""Those of a server, whose rounds others choose."""


def check_rows(config: PoCConfig, *, per_row: int, bound: int | None, what: str) -> None:
    """Raise a ValueError if the rows of a round's forwards take more than they may.

    Args:
        config: the round.
        per_row: numbers that a row takes.
        bound: on the numbers of all rows; one row may take more. None for no bound.
        what: they are for, as the end of a sentence.
    """
    rows = config.batch_size if bound is None else max(1, bound // per_row)
    if config.batch_size > rows:
        raise ValueError(f"batch_size must be at most {rows} {what}, got {config.batch_size}")


def check_length(config: PoCConfig, max_positions: int) -> None:
    """Raise a ValueError if the inputs of a round are longer than the sequences that a model takes."""
    if config.seq_len > max_positions:
        raise ValueError(f"seq_len must be at most the {max_positions} positions of the model, got {config.seq_len}")
