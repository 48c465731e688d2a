"""x + x @ P on a CPU, with one thread and with all of torch's: the op against a stored P, and what bounds either.

One round runs every callable once, one after another, so that a machine that slows down slows them all. Each call is
timed by the clock on the wall and by the CPU time that it takes. A case is timed only after its results have been
checked. POC_BENCH_QUICK=1 runs a small subset, to try the suite itself.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import poc_kernels
from bench.common import memory
from bench.common.spread import ratio_spread
from bench.projection.checks import Call, assert_near, assert_same_bits, exact_row, op, some_rows
from poc_kernels import backends

QUICK = os.environ.get("POC_BENCH_QUICK") == "1"
SIZES = (1024,) if QUICK else (1024, 4096, 8192)
ROWS = (1, 32) if QUICK else (1, 8, 32, 64, 256, 1024, 2048)
MANY_ROWS = ROWS[-1]
VARIANTS = (("bfloat16", 16), ("bfloat16", 8), ("float32", 16))
"""The dtype of x, and activation_bits."""

THREADS = tuple(sorted({1, torch.get_num_threads()}))

CASE_WORK = 1.3e11
"""Multiply-adds of one callable in all rounds of a case; bounds the time of the suite."""
MIN_ROUNDS, MAX_ROUNDS, BOUND_ROUNDS = 3, 40, 10

ROUNDING_ERROR = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
"""Relative error, as a norm over a row, that a result may have for its dtype."""
ACTIVATION_ERROR = {16: 2e-4, 8: 2e-2}
"""Relative error that the integers of activation_bits may add."""


class Stored(NamedTuple):
    """The P [D, D] of one seed, in the forms that the peers read."""

    seed: Tensor
    float32: Tensor
    bfloat16: Tensor
    bfloat16_transposed: Tensor
    """The same values as `bfloat16`, a view of the contiguous transpose."""

    @property
    def size(self) -> int:
        """D."""
        return len(self.float32)


class CpuTimed:
    """A call that notes the CPU seconds of each time it runs, in ``seconds``.

    With one thread they are those of the calling thread; with more those of the process, in which threads of OpenMP
    that wait may be counted too.
    """

    def __init__(self, call: Call) -> None:
        self.seconds: list[float] = []
        self._call = call
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time

    def __call__(self) -> Tensor:
        start = self._clock()
        result = self._call()
        self.seconds.append(self._clock() - start)
        return result


class Interleaved:
    """Runs and times every call once when it is called itself, each time beginning with the next one.

    ``seconds`` has the times of each call, by name and in the order of the rounds.
    """

    def __init__(self, calls: dict[str, CpuTimed]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._calls = calls
        self._first = itertools.count()

    def __call__(self) -> None:
        names = list(self._calls)
        first = next(self._first) % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            result = self._calls[name]()
            self.seconds[name].append(time.perf_counter() - start)
            del result  # freed outside the timing, as for the op


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"D{size}")
def stored(request: pytest.FixtureRequest) -> Stored:
    size = request.param
    needed = 24 * size**2 + 2**29  # three stored forms, two prepacked, others while they are made; x and results
    available = memory.available(torch.device("cpu"))
    if available < needed:
        pytest.skip(f"P stored at D = {size} needs {needed >> 20} MiB of memory, {available >> 20} are available")
    seed = poc_kernels.seed_tensor(20_240_607)
    wide, narrow = (
        poc_kernels.projection_matrix(seed, 0, 0, size, 0, size, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return Stored(seed, wide, narrow, narrow.t().contiguous().t())


def _activations(rows: int, stored: Stored, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, stored.size, generator=torch.Generator().manual_seed(rows)).to(dtype)


def _generation(stored: Stored) -> Call:
    """Return a call that does little more than draw P: the op on one row at 8 bits."""
    return op(_activations(1, stored, torch.bfloat16), stored.seed, 8)


def _prepacked(x: Tensor, transposed: Tensor) -> Call:
    """Return x + x @ P with P [N, K], transposed, in oneDNN's own layout: what torch.compile makes with freezing."""
    packed = torch.ops.mkldnn._reorder_linear_weight(transposed, len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, None, "add")


def _peers(x: Tensor, stored: Stored) -> dict[str, Call]:
    """Return the products with a stored P that serve x. Float32 serves bfloat16 x too; the conversion is not timed."""
    wide = x.float()
    onednn = torch.backends.mkldnn.is_available()
    peers: dict[str, Call] = {"float32": lambda: torch.addmm(wide, wide, stored.float32)}
    if onednn:
        peers["float32_prepacked"] = _prepacked(wide, stored.float32.t().contiguous())
    if x.dtype == torch.bfloat16:
        peers["bfloat16"] = lambda: torch.addmm(x, x, stored.bfloat16)
        # The product of F.linear, with x added in the same call.
        peers["bfloat16_transposed"] = lambda: torch.addmm(x, x, stored.bfloat16_transposed)
        if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            peers["bfloat16_prepacked"] = _prepacked(x, stored.bfloat16_transposed.t())
    return peers


def _assert_bits_of_another_backend(y: Tensor, x: Tensor, seed: Tensor, activation_bits: int) -> None:
    """Fail unless a few rows of y are, bit for bit, what another backend makes of these rows alone."""
    rows = some_rows(x)
    with poc_kernels.use_backend("reference" if x.shape[1] <= 1024 else "native-portable"):
        expected = op(x[rows], seed, activation_bits)()
    assert_same_bits("the op against another backend", y, expected, rows)


def _check(call: Call, peers: dict[str, Call], x: Tensor, stored: Stored, activation_bits: int) -> None:
    """Fail unless everything that is about to be timed gives right results."""
    y, exact = call(), exact_row(x[0], stored.float32)
    _assert_bits_of_another_backend(y, x, stored.seed, activation_bits)
    assert_near("op", y[0], exact, ROUNDING_ERROR[x.dtype] + ACTIVATION_ERROR[activation_bits])
    for name, peer in peers.items():
        result = peer()
        # Twice: P and the result are both rounded.
        assert_near(name, result[0], exact, 2 * ROUNDING_ERROR[result.dtype])


class Measured(NamedTuple):
    """Seconds of each round, by name; the benchmarked call is "benchmarked"."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


def _measure(benchmark: BenchmarkFixture, call: Call, others: dict[str, Call], rounds: int) -> Measured:
    """Measure ``call``, and in each round before it the others."""
    if not benchmark.enabled:
        pytest.skip("--benchmark-disable: checked, not timed")
    timed = {name: CpuTimed(each) for name, each in {"benchmarked": call, **others}.items()}
    interleaved = Interleaved({name: timed[name] for name in others})
    benchmark.pedantic(timed["benchmarked"], setup=interleaved, rounds=rounds, iterations=1, warmup_rounds=1)
    wall = {name: samples[1:] for name, samples in interleaved.seconds.items()}  # without the warm-up
    return Measured(
        {"benchmarked": list(benchmark.stats.stats.data), **wall},
        {name: each.seconds[1:] for name, each in timed.items()},
    )


def _setting(stored: Stored) -> dict[str, Any]:
    backend = backends.select(torch.device("cpu")).name
    return {"D": stored.size, "backend": backend, "threads": torch.get_num_threads()}


def _bests(medians: dict[str, float]) -> dict[str, str]:
    """Return the fastest peer, and the fastest of those with P in bfloat16 if there are any."""
    bests = {"best": min(medians, key=medians.__getitem__)}
    halves = [name for name in medians if name.startswith("bfloat16")]
    if halves:
        bests["bfloat16"] = min(halves, key=medians.__getitem__)
    return bests


def _ratios(seconds: dict[str, list[float]], bests: dict[str, str]) -> dict[str, dict[str, float]]:
    return {name: ratio_spread(seconds["benchmarked"], seconds[form]) for name, form in bests.items()}


@pytest.mark.benchmark(group="projection")
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"M{rows}")
@pytest.mark.parametrize(("dtype", "activation_bits"), VARIANTS)
@pytest.mark.parametrize("threads", THREADS, ids=lambda threads: f"t{threads}")
@torch.inference_mode()
def test_projection(
    benchmark: BenchmarkFixture, stored: Stored, threads: int, dtype: str, activation_bits: int, rows: int
) -> None:
    torch.set_num_threads(threads)
    x = _activations(rows, stored, getattr(torch, dtype))
    call, peers = op(x, stored.seed, activation_bits), _peers(x, stored)
    _check(call, peers, x, stored, activation_bits)

    rounds = int(CASE_WORK / (rows * stored.size**2))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    measured = _measure(benchmark, call, {**peers, "generation": _generation(stored)}, rounds)

    medians = {name: statistics.median(measured.wall[name]) for name in peers}
    cpu_medians = {name: statistics.median(measured.cpu[name]) for name in peers}
    bests = _bests(medians)
    benchmark.extra_info.update(
        **_setting(stored),
        M=rows,
        dtype=dtype,
        activation_bits=activation_bits,
        stored_seconds=medians,
        best_stored=bests["best"],
        ratios=_ratios(measured.wall, bests),
        cpu_seconds=statistics.median(measured.cpu["benchmarked"]),
        stored_cpu_seconds=cpu_medians,
        cpu_ratios=_ratios(measured.cpu, _bests(cpu_medians)),
        generation_share=ratio_spread(measured.wall["generation"], measured.wall["benchmarked"])["median"],
        stored_bytes={name: getattr(stored, name.split("_")[0]).nbytes for name in peers},
        held_bytes=0,
    )


@pytest.mark.benchmark(group="bounds")
@torch.inference_mode()
def test_bounds(benchmark: BenchmarkFixture, stored: Stored) -> None:
    """Measure the rates of drawing P, of multiplying and of reading memory; the benchmarked call draws P."""
    torch.set_num_threads(THREADS[-1])
    x = _activations(MANY_ROWS, stored, torch.bfloat16)
    calls = {
        "product_16": op(x, stored.seed, 16),
        "product_8": op(x, stored.seed, 8),
        "read_float32": lambda: stored.float32.sum(),
        "read_bfloat16": lambda: stored.bfloat16.view(torch.float32).sum(),  # the same bytes, read as float32
    }
    for activation_bits in (16, 8):
        _check(calls[f"product_{activation_bits}"], {}, x, stored, activation_bits)

    measured = _measure(benchmark, _generation(stored), calls, BOUND_ROUNDS)

    medians = {name: statistics.median(samples) for name, samples in measured.wall.items()}
    multiply_adds = MANY_ROWS * stored.size**2
    benchmark.extra_info.update(
        **_setting(stored),
        product_rows=MANY_ROWS,
        generated_entries_per_second=stored.size**2 / medians["benchmarked"],
        multiply_adds_per_second={str(bits): multiply_adds / medians[f"product_{bits}"] for bits in (16, 8)},
        read_bytes_per_second={
            name: getattr(stored, name).nbytes / medians[f"read_{name}"] for name in ("bfloat16", "float32")
        },
    )
