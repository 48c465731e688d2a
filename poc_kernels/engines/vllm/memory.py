"""Whether a round finds the memory that it takes on a GPU, most of which vLLM has given to its KV cache by then."""

from __future__ import annotations

import contextlib
import math

import torch

from ...protocol import PoCConfig
from .engine import VllmEngine

_RESERVE = 1.25
"""What a forward takes is extrapolated from shorter ones, and graphs keep some of it to themselves."""


def lacking_memory(
    engine: VllmEngine, *, batch_size: int = PoCConfig.batch_size, seq_len: int = PoCConfig.seq_len
) -> str | None:
    """Say in a sentence how much memory rounds of that shape lack on the GPU, and what to do; None if they do not.

    Forwards of one and of two rows tell what each row takes. To be called on all ranks of a model before anything is
    computed on them, since a rank that fails later would leave the others waiting for it.

    Args:
        engine: the engine of a worker.
        batch_size: rows of a forward.
        seq_len: positions of a row.
    """
    if engine.device.type != "cuda":
        return None
    length = min(seq_len, engine.max_positions)
    if engine.repeated.holds((batch_size, length, engine.hidden_size)):
        return None  # graphs have it since the round before; another such forward beside them need not fit
    engine.repeated.release()  # as the first forward of another shape does: what graphs have is given back
    one, two = (_forward_bytes(engine, rows, length) for rows in (1, 2))
    drawn = _drawn_bytes(engine, length)
    needed = int(_RESERVE * (one + (batch_size - 1) * max(two - one, 0) + batch_size * drawn))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(engine.device)
    if needed <= free:
        return None
    fraction = math.ceil((needed - free) / total * 100) / 100
    return (
        f"proofs of {batch_size} x {length} tokens need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on "
        f"{engine.device}: take {fraction:.2f} off --gpu-memory-utilization"
    )


def _drawn_bytes(engine: VllmEngine, length: int) -> int:
    """Return what a row takes beside its forward, in the form of proofs that takes most."""
    layers = 0
    with contextlib.suppress(ValueError):
        layers = engine.layers
    inputs = length * engine.hidden_size * engine.dtype.itemsize
    permutation = engine.vocab_size * 8
    signs_and_states = engine.hidden_size * (layers * engine.dtype.itemsize + length * 4)
    return inputs + max(permutation, signs_and_states)


@torch.inference_mode()
def _forward_bytes(engine: VllmEngine, rows: int, length: int) -> int:
    """Measure the most memory that a forward and its logits take at a time."""
    before = torch.cuda.memory_allocated(engine.device)
    torch.cuda.reset_peak_memory_stats(engine.device)
    with engine.context():
        x = torch.zeros(rows, length, engine.hidden_size, dtype=engine.dtype, device=engine.device)
        engine.compute_logits(engine.compute_states(x)[:, -1]).float().clone()
    return int(torch.cuda.max_memory_allocated(engine.device)) - before
