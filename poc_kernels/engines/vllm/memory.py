"""Whether a round finds the memory that it takes on a GPU, most of which vLLM has given to its KV cache by then."""

from __future__ import annotations

import contextlib
import math

import torch

from ...protocol import EngineProver, PoCConfig
from ...protocol.engine import LayerTransform
from .engine import VllmEngine

_RESERVE = 1.25
"""What a forward takes is extrapolated from shorter ones, and graphs keep some of it to themselves."""


def lacking_memory(engine: VllmEngine, prover: EngineProver, config: PoCConfig | None = None) -> str | None:
    """Say in a sentence how much memory a round lacks on the GPU, and what to do; None if it does not.

    Forwards of one and of two rows tell what each row takes. What graphs and ``prover`` keep of rounds before is given
    back rather than that a round is refused. To be called on all ranks of a model before anything is computed on them,
    since a rank that fails later would leave the others waiting for it.

    Args:
        engine: the engine of a worker.
        prover: computes proofs on it; no forward of it is under way.
        config: the round; None for rounds of the default shape, in the form that takes most, before the first one.
    """
    if engine.device.type != "cuda":
        return None
    batch_size, seq_len = (PoCConfig.batch_size, PoCConfig.seq_len)
    transforms: list[LayerTransform | None] = []
    if config is not None:
        batch_size, seq_len, transforms = config.batch_size, config.seq_len, prover.transforms(config)
    length = min(seq_len, engine.max_positions)
    shape = batch_size, length, engine.hidden_size
    if any(engine.repeated.holds(shape, transform) for transform in transforms):
        return None  # graphs have it since the round before; another such forward beside them need not fit
    engine.repeated.release()  # as the first forward of another kind does: what graphs have is given back
    one, two = (_forward_bytes(engine, rows, length) for rows in (1, 2))
    drawn = _drawn_bytes(engine, length)
    needed = int(_RESERVE * (one + (batch_size - 1) * max(two - one, 0) + batch_size * drawn))
    free, total = _free_and_total(engine)
    if needed > free:
        prover.release()  # signs of earlier fingerprints: those that this round takes are in what it needs
        free, total = _free_and_total(engine)
    if needed <= free:
        return None
    fraction = math.ceil((needed - free) / total * 100) / 100
    return (
        f"proofs of {batch_size} x {length} tokens need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on "
        f"{engine.device}: take {fraction:.2f} off --gpu-memory-utilization"
    )


def _free_and_total(engine: VllmEngine) -> tuple[int, int]:
    """Return the bytes that a GPU has free and in all, after what torch keeps for later was given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(engine.device)


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
