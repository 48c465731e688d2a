"""What the projection is, shown on this machine: one answer in every way of computing it, its time and its memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, definition, ops
from .projection import RandomProjection
from .self_test import digest

BLOCK_HASH = "0x00000000000000000001a2b3c4d5e6f7"
MAX_DIM = 16384
_ROUNDS = 7
_MEBIBYTE = 2**20


def _ways(projection: RandomProjection, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute the projection of x before the model that must not differ in a bit."""
    half = x.shape[0] // 2
    middle = max(1, projection.dim // 3)

    def shards() -> Tensor:
        first = ops.residual_projection(x, projection.seed, columns=middle)
        if middle == projection.dim:
            return first
        return torch.cat([first, ops.residual_projection(x, projection.seed, column_start=middle)], dim=1)

    def one_thread() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return projection.pre(x)
        finally:
            torch.set_num_threads(threads)

    def masked() -> Tensor:
        mask = torch.arange(x.shape[0]) < half
        return torch.cat([projection.pre(x, row_mask=mask)[:half], projection.pre(x, row_mask=~mask)[half:]])

    ways: dict[str, Callable[[], Tensor]] = {
        "row by row": lambda: torch.cat([projection.pre(row) for row in x.unsqueeze(1)]),
        "two column shards": shards,
        "one thread": one_thread,
        "two batches mixed by row_mask": masked,
    }
    cpu = torch.device("cpu")

    def forced(name: str) -> Tensor:
        with backends.use_backend(name):
            return projection.pre(x)

    for backend in backends.backends():
        if backend.unavailable(cpu) is None:
            ways[f"backend {backend.name}"] = functools.partial(forced, backend.name)
    return ways


def _interleaved(contenders: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median seconds of each contender, all run in turn, after one warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(_ROUNDS + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn > 0:
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


@torch.inference_mode()
def run(block_hash: str, dim: int, rows: int) -> int:
    """Print the demonstration for ``rows`` bfloat16 rows of ``dim`` features; 1 if any two answers differ, else 0."""
    projection = RandomProjection.from_block_hash(block_hash, dim)
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), device="cpu").bfloat16()
    serving = backends.select(x.device).name

    print(f"A round with block hash {block_hash}")
    print(f"  seed {int(projection.seed) % 2**64:016x}, {rows} rows of {dim} features in bfloat16")
    print(f"  {torch.get_num_threads()} threads, backend {serving}, torch {torch.__version__}\n")

    expected = digest(projection.pre(x))
    print(f"x + x @ P for the layer before the model, SHA-256 {expected[:16]}...")
    differing = 0
    for name, way in _ways(projection, x).items():
        same = digest(way()) == expected
        differing += not same
        print(f"  {name:<32} {'same bits' if same else 'DIFFERENT BITS'}")

    before = projection.seed.data_ptr()
    projection.set_block_hash(block_hash + "/next")
    changed = digest(projection.pre(x)) != expected and projection.seed.data_ptr() == before
    projection.set_block_hash(block_hash)
    print(f"  {'next round, seed set in place':<32} {'another P, in the same buffer' if changed else 'NOT CHANGED'}")
    differing += not changed

    stored = {
        dtype: ops.projection_matrix(projection.seed, definition.DOMAIN_PRE, 0, dim, 0, dim, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    }
    wide = x.float()
    times = _interleaved(
        {
            "P never stored, 16 bits": lambda: projection.pre(x),
            "P never stored, 8 bits": lambda: ops.residual_projection(x, projection.seed, activation_bits=8),
            "P stored in bfloat16, addmm": lambda: torch.addmm(x, x, stored[torch.bfloat16]),
            "P stored in float32, addmm": lambda: torch.addmm(wide, wide, stored[torch.float32]),
        }
    )
    held = [8, 8, *(matrix.nbytes for matrix in stored.values())]
    base = times["P stored in bfloat16, addmm"]
    print(f"\n  {'':<32} {'time':>11} {'of bfloat16':>12} {'bytes of P held':>16}")
    for (name, seconds), size in zip(times.items(), held, strict=True):
        shown = f"{size / _MEBIBYTE:.0f} MiB" if size >= _MEBIBYTE else f"{size} B (seed)" if size == 8 else f"{size} B"
        print(f"  {name:<32} {seconds * 1e3:>8.2f} ms {seconds / base:>11.2f}x {shown:>16}")

    few = torch.randn(2, dim, generator=torch.Generator().manual_seed(1), device="cpu")
    exact = few.double() + few.double() @ stored[torch.float32].double()
    error = (projection.pre(few).double() - exact).norm() / exact.norm()
    print(f"\n  distance to the product in float64, relative: {error:.1e} for float32 x at 16 activation bits")
    return 1 if differing else 0
