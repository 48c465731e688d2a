"""Which rounds fit a model, and what the largest of them takes."""

from __future__ import annotations

import pytest
from helpers import Largest
from small_engine import SmallEngine

from poc_kernels.protocol import EngineProver, PoCConfig, Row
from poc_kernels.protocol.limits import Bounds, check_rows


def config(batch_size: int) -> PoCConfig:
    return PoCConfig("block", 7, "key", 1.4, batch_size=batch_size, seq_len=6, use_random_projection=True)


@pytest.mark.parametrize(("bound", "rows"), [(1, 1), (29, 2), (30, 3), (31, 3)])
def test_rows_are_bounded_by_what_they_take(bound: int, rows: int) -> None:
    check_rows(config(rows), per_row=10, bound=bound, what="here")
    with pytest.raises(ValueError, match=f"^batch_size must be at most {rows} here, got {rows + 1}$"):
        check_rows(config(rows + 1), per_row=10, bound=bound, what="here")
    check_rows(config(4096), per_row=10, bound=None, what="here")


def test_logits_of_a_forward_are_bounded() -> None:
    """They, and what becomes of them, are the largest where the vocabulary is large."""
    vocabulary, rows = 5000, 3
    prover = EngineProver(SmallEngine(vocab_size=vocabulary), bounds=Bounds(logits=vocabulary * rows))
    prover.check(config(rows))
    with pytest.raises(ValueError, match=f"batch_size must be at most {rows} with this vocabulary, got {rows + 1}"):
        prover.check(config(rows + 1))
    with Largest() as largest:
        prover.prove(config(rows), [Row("key", nonce) for nonce in range(rows)])
    assert largest.numbers == vocabulary * rows
