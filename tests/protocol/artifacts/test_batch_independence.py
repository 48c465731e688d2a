"""Artifacts of every form are the same in every batch."""

import dataclasses

import pytest
import torch
from small_engine import SmallEngine

from poc_kernels.protocol import EngineProver, PoCConfig, Row


@pytest.mark.parametrize(("proof", "seq_len"), [("vectors", 9), ("fingerprint", 27)])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_artifact_does_not_depend_on_its_batch(dtype, projection, proof, seq_len, device):
    engine = SmallEngine(dtype=dtype, device=device)
    prover = EngineProver(engine)
    of = PoCConfig(
        block_hash="block",
        block_height=7,
        public_key="key",
        proof=proof,
        batch_size=6,
        seq_len=seq_len,
        use_random_projection=projection,
    )
    rows = [Row("one", nonce) for nonce in range(4)] + [Row("two", 1), Row("two", 2)]
    together = prover.prove(of, rows).values
    assert None not in together
    assert len(set(together)) == 6
    order = [4, 0, 5, 2, 1, 3]
    assert prover.prove(of, [rows[place] for place in order]).values == [together[place] for place in order]
    for row, text in zip(rows, together, strict=True):
        assert prover.prove(of, [row]).values == [text]
    others = dataclasses.replace(of, use_random_projection=not projection)
    assert set(prover.prove(others, rows).values).isdisjoint(together)
    assert EngineProver(engine, slice_seconds=1e-9).prove(of, rows).values == together
