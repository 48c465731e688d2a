"""x + x @ P on a GPU: the op against a stored P, against a P drawn as normals, and against what the device can do.

One round runs every call once, one after another, as CUDA graphs; with few rows each starts from a cold L2, as in
a model. A case is timed only after its results have been checked: the op's bit for bit against the CPU. The cases that
have goals come first; those of the largest D are followed by products of few rows with K in 1, 2 and 4 parts.
POC_BENCH_QUICK=1 runs small cases, also on a CPU (--bench-device cpu), to try the suite itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import poc_kernels
from bench.common import memory
from bench.common.spread import ratio_spread, spread
from bench.projection.checks import Call, assert_near, assert_same_bits, exact_row, op, some_rows
from bench.projection.gpu_clock import Clock, captured, kernel_seconds
from poc_kernels import backends, definition

try:
    from bench.projection import randn_product
except ImportError:  # no Triton
    randn_product = None  # type: ignore[assignment]

TRUSTED = tuple(filter(None, os.environ.get("POC_BENCH_TRUST", "").split(",")))
"""Backends that are measured although `poc-kernels verify` rejected them, or did not end in time."""
VERDICT = os.environ.get("POC_BENCH_VERDICT", "REJECTED BY VERIFY")
"""What is said of them."""
QUICK = os.environ.get("POC_BENCH_QUICK") == "1"
SIZES = (128,) if QUICK else (1024, 4096, 5120, 7168, 8192)
ROWS = (1, 32) if QUICK else (1, 8, 32, 64, 256, 1024, 4096, 8192, 16384)
COLD_ROWS = 64
"""Cases of at most this many rows start from a cold L2."""
BITS = (16, 8)
SPLIT_SIZE, SPLIT_ROWS, SPLITS = 8192, (16, 32, 64), (1, 2, 4)
"""D, M and the numbers of parts of K."""
CASE_SECONDS = 0.1 if QUICK else 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 50
COPY_BYTES = 2**22 if QUICK else 2**30
PRODUCT_SIZE = 256 if QUICK else 8192
SEED = 20_240_607
DTYPE = torch.bfloat16

RELATIVE_ERROR = 8e-3
"""Limit for a result in bfloat16 from P in bfloat16, as a norm over a row."""


class Stored(NamedTuple):
    """P [D, D] in bfloat16: the definition's, and the normals that a peer draws (None without Triton or a GPU)."""

    seed: Tensor
    p: Tensor
    normals: Tensor | None

    @property
    def size(self) -> int:
        """D."""
        return len(self.p)

    @property
    def device(self) -> torch.device:
        return self.p.device


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    kind = request.config.getoption("--bench-device")
    return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


@pytest.fixture(scope="module")
def clock(device: torch.device) -> Clock:
    return Clock(device)


@pytest.fixture(autouse=True)
def trusted(device: torch.device) -> None:
    """Use the backends that are asked for without trying them: each case compares its own bits."""
    for name in TRUSTED if device.type == "cuda" else ():
        backends.trust(name, torch.empty(0, device=device).device)


def _urgency(case: tuple[int, int]) -> tuple[bool, bool, int, int]:
    """Return the order of a case: cases with a goal come first, and first of them those of the largest D."""
    size, rows = case
    goal = rows >= 2048 or (size == 8192 and rows <= 64)
    return not (goal and size == 8192), not goal, -size, rows


CASES = sorted(itertools.product(SIZES, ROWS), key=_urgency)
FIRST_CASES = 1 if QUICK else sum(not _urgency(case)[0] for case in CASES)
"""How many cases have goals and the largest D."""


@functools.lru_cache(maxsize=1)
def _stored(size: int, device: torch.device) -> Stored:
    """Make the P of one size, kept for the next case; skips the case if memory is short."""
    needed = 24 * size**2 + 16 * max(ROWS) * size + 2**31 * (device.type == "cuda")
    available = memory.available(device)
    if available < needed:
        pytest.skip(f"D = {size} needs {needed >> 20} MiB of memory, {available >> 20} are free")
    seed = poc_kernels.seed_tensor(SEED, device)
    draws = randn_product is not None and device.type == "cuda"
    normals = randn_product.randn_matrix(size, SEED, DTYPE, device) if draws else None
    return Stored(seed, poc_kernels.projection_matrix(seed, 0, 0, size, 0, size, dtype=DTYPE), normals)


def _activations(rows: int, stored: Stored) -> Tensor:
    generator = torch.Generator().manual_seed(stored.size)
    return torch.randn(rows, stored.size, generator=generator).to(DTYPE).to(stored.device)


def _calls(x: Tensor, stored: Stored) -> dict[str, Call]:
    calls: dict[str, Call] = {f"op_{bits}": op(x, stored.seed, bits) for bits in BITS}
    calls["stored"] = lambda: torch.addmm(x, x, stored.p)
    if stored.normals is not None:
        calls["normals"] = lambda: randn_product.randn_product(x, SEED)
    return calls


# ---- checks --------------------------------------------------------------------------------------------------------


def _assert_bits_of_the_cpu(y: Tensor, x: Tensor, seed: Tensor, activation_bits: int) -> None:
    """Fail unless a few rows of y are, bit for bit, what the CPU makes of these rows alone."""
    rows = some_rows(x)
    expected = op(x[rows].cpu(), seed.cpu(), activation_bits)()
    assert_same_bits(f"the op at {activation_bits} bits against the CPU", y, expected, rows)


def _check(calls: dict[str, Call], x: Tensor, stored: Stored) -> None:
    """Fail unless everything that is about to be timed gives right results."""
    for bits in BITS:
        _assert_bits_of_the_cpu(calls[f"op_{bits}"](), x, stored.seed, bits)
    last = len(x) - 1
    assert_near("stored", calls["stored"]()[last], exact_row(x[last], stored.p), RELATIVE_ERROR)
    if stored.normals is not None:
        assert_near("normals", calls["normals"]()[last], exact_row(x[last], stored.normals), RELATIVE_ERROR)


# ---- measurements --------------------------------------------------------------------------------------------------


def _workspace(x: Tensor, seed: Tensor, activation_bits: int) -> int | None:
    """Return the bytes that the op takes during a call beyond its result; None on a CPU."""
    if x.device.type != "cuda":
        return None
    return memory.workspace_cuda(op(x, seed, activation_bits), x.device)


def _graphs(device: torch.device) -> bool:
    """Return whether calls are timed as graphs. The reference moves constants to the GPU, which no graph captures."""
    return device.type == "cuda" and backends.select(device).name != "reference"


def _timed(benchmark: BenchmarkFixture, clock: Clock, calls: dict[str, Call], device: torch.device, cold: bool) -> Any:
    """Return the seconds of each call in each round. pytest-benchmark itself times all rounds together."""
    if not benchmark.enabled:
        pytest.skip("--benchmark-disable: checked, not timed")
    with captured(calls, device) if _graphs(device) else contextlib.nullcontext(calls) as graphs:
        limits = {"min_rounds": MIN_ROUNDS, "max_rounds": MAX_ROUNDS, "cold": cold}
        return benchmark.pedantic(
            clock.interleaved, args=(graphs, CASE_SECONDS), kwargs=limits, rounds=1, iterations=1, warmup_rounds=0
        )


def _backend(device: torch.device) -> str:
    """Return which backend serves the device, and what `verify` has against it."""
    name = backends.select(device).name
    return f"{name}, {VERDICT}" if name in TRUSTED else name


@pytest.mark.benchmark(group="bounds-gpu")
@pytest.mark.parametrize("size", sorted(SIZES, reverse=True), ids=lambda size: f"D{size}")
@torch.inference_mode()
def test_bounds(benchmark: BenchmarkFixture, clock: Clock, device: torch.device, size: int) -> None:
    """Measure what the device can do, and the time to draw P once per round in order to store it."""
    seed = poc_kernels.seed_tensor(SEED, device)
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=DTYPE, device=device) for _ in range(2))
    calls: dict[str, Call] = {
        "generation": lambda: poc_kernels.projection_matrix(seed, 0, 0, size, 0, size, dtype=DTYPE),
        "copy": lambda: target.copy_(source),
        "product": lambda: a @ b,
    }
    assert torch.equal(
        calls["generation"]()[:, :3].cpu(),
        poc_kernels.projection_matrix(seed.cpu(), 0, 0, size, 0, 3, dtype=DTYPE),
    )

    seconds = _timed(benchmark, clock, calls, device, cold=False)

    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    benchmark.extra_info.update(
        D=size,
        generation_seconds=medians["generation"],
        copy_bytes_per_second=2 * COPY_BYTES / medians["copy"],
        product_multiply_adds_per_second=PRODUCT_SIZE**3 / medians["product"],
    )


def _for_cases(cases: list[tuple[int, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("size", "rows"), cases, ids=[f"D{size}-M{rows}" for size, rows in cases])


@pytest.mark.benchmark(group="projection-gpu")
@_for_cases(CASES[:FIRST_CASES])
@torch.inference_mode()
def test_first(benchmark: BenchmarkFixture, clock: Clock, device: torch.device, size: int, rows: int) -> None:
    _measure_projection(benchmark, clock, device, size, rows)


@pytest.mark.benchmark(group="splits-gpu")
@pytest.mark.parametrize("rows", SPLIT_ROWS, ids=lambda rows: f"D{SPLIT_SIZE}-M{rows}")
@torch.inference_mode()
def test_splits(benchmark: BenchmarkFixture, clock: Clock, device: torch.device, rows: int) -> None:
    """Measure few rows with K in each number of parts, by which `Tile.blocks` is judged."""
    if device.type != "cuda" or backends.select(device).name != "triton":
        pytest.skip("parts of K are those of the Triton kernels on a GPU")
    from poc_kernels.kernels.triton import product as triton
    from poc_kernels.kernels.triton import tiles as tile_table

    stored = _stored(SPLIT_SIZE, device)
    x = _activations(rows, stored)
    capability, _ = triton.hardware(device)
    coefficient = definition.coefficient(definition.DEFAULT_STD)
    calls: dict[str, Call] = {
        f"op_{bits} in {splits}": functools.partial(
            *(triton.project, x, stored.seed),
            definition.Request(0, coefficient, bits, columns=SPLIT_SIZE, residual=True),
            splits=splits,
        )
        for bits, splits in itertools.product(BITS, SPLITS)
    }
    for (bits, _), call in zip(itertools.product(BITS, SPLITS), calls.values(), strict=True):
        _assert_bits_of_the_cpu(call(), x, stored.seed, bits)

    seconds = _timed(benchmark, clock, calls, device, cold=True)

    benchmark.extra_info.update(
        D=SPLIT_SIZE,
        M=rows,
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
        blocks_per_multiprocessor=tile_table.choose(capability, rows, 16, triton.choose_arithmetic(capability)).blocks,
        rounds=len(next(iter(seconds.values()))),
        seconds={
            f"op_{bits}": {str(splits): spread(seconds[f"op_{bits} in {splits}"])._asdict() for splits in SPLITS}
            for bits in BITS
        },
    )


@pytest.mark.benchmark(group="projection-gpu")
@_for_cases(CASES[FIRST_CASES:])
@torch.inference_mode()
def test_projection(benchmark: BenchmarkFixture, clock: Clock, device: torch.device, size: int, rows: int) -> None:
    _measure_projection(benchmark, clock, device, size, rows)


def _measure_projection(benchmark: BenchmarkFixture, clock: Clock, device: torch.device, size: int, rows: int) -> None:
    stored = _stored(size, device)
    x = _activations(rows, stored)
    calls = _calls(x, stored)
    _check(calls, x, stored)

    seconds = _timed(benchmark, clock, calls, device, rows <= COLD_ROWS)

    benchmark.extra_info.update(
        D=stored.size,
        M=rows,
        backend=_backend(device),
        cold=rows <= COLD_ROWS,
        graphs=_graphs(device),
        rounds=len(seconds["stored"]),
        seconds={name: spread(samples)._asdict() for name, samples in seconds.items()},
        speedups={
            name: ratio_spread(seconds["stored"], samples) for name, samples in seconds.items() if name != "stored"
        },
        kernels={f"op_{bits}": kernel_seconds(calls[f"op_{bits}"], device) for bits in BITS},
        workspace={f"op_{bits}": _workspace(x, stored.seed, bits) for bits in BITS},
        held={"op": 0, "stored": stored.p.nbytes},
    )
