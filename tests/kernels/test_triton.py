"""The Triton kernels under its interpreter, bit for bit against the reference, however the work is cut up."""

import functools
import json
import warnings

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    dirty_memory,
    expected,
    laid_out,
    project,
    rows_of_every_kind,
)
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from poc_kernels import backends, definition, reference, self_test  # noqa: E402
from poc_kernels.kernels import Backend, triton_configs, triton_device  # noqa: E402
from poc_kernels.kernels import triton as kernels  # noqa: E402
from poc_kernels.kernels.triton_configs import Tile  # noqa: E402

if isinstance(kernels.product_kernel, triton.runtime.JITFunction):
    reason = "kernels are compiled here, not interpreted: TRITON_INTERPRET was not set when Triton was imported"
    pytest.skip(reason, allow_module_level=True)

SMALL = (Tile(16, 16, 1, 1, 4), Tile(64, 16, 2, 2, 8), Tile(32, 64, 2, 1, 16), Tile(128, 32, 4, 3, 4))
BACKEND = Backend("triton", kernels.project, kernels.entries, kernels.unavailable)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """NumPy 2.5 makes no int of an array of one element, which is what Triton's interpreter before 3.9 counts with."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_index)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NumPy's, on overflow
        yield


def triton_project(x, *, tile=None, splits=None, arithmetic=None, **options):
    """`helpers.project` with the choices that only these kernels have."""
    cut = functools.partial(kernels.project, tile=tile, splits=splits, arithmetic=arithmetic)
    return project(Backend("triton", cut, kernels.entries, kernels.unavailable), x, **options)


# ---- parts ---------------------------------------------------------------------------------------------------------


@triton.jit
def rounded_sum_kernel(high, low, sum_of_q, out, COUNT: tl.constexpr):  # noqa: N803
    at = tl.arange(0, COUNT)
    total = triton_device.rounded_sum(tl.load(high + at), tl.load(low + at), tl.load(sum_of_q + at), True)
    tl.store(out + at, total)


def test_sums_are_rounded_once():
    count = 1 << 16
    generator = torch.Generator().manual_seed(1)
    bound = 124 * 65536
    magnitude = torch.exp2(torch.rand(3, count, generator=generator, dtype=torch.float64) * 30)
    sign = torch.randint(0, 2, (3, count), generator=generator) * 2 - 1
    values = (magnitude * sign).long()
    high, low = values[0].clamp(-64 * bound, 64 * bound), values[1].clamp(-128 * bound, 128 * bound)
    sums = values[2].clamp(-(2**30), 2**30)
    # ties of float32, and their neighbours: 25 significant bits, then zeros or a last one
    high[:4096] = (2**24 + torch.arange(4096) * 2 + 1) // 2 * sign[0, :4096]
    low[:4096], sums[:4096] = 128 * (torch.arange(4096) % 3) - 128, torch.arange(4096) % 5 - 2
    out = torch.empty(count)
    rounded_sum_kernel[(1,)](high.int(), low.int(), sums.int(), out, COUNT=count)
    exact = 2 * (256 * high + low) + sums
    assert exact.abs().max() > 2**37
    assert_same_bits(out, exact.double().float())


@pytest.mark.parametrize(("k_start", "k", "n_start", "n"), [(0, 1, 0, 1), (5, 70, 2**32 - 60, 59), (65520, 16, 3, 200)])
def test_entries(k_start, k, n_start, n):
    seed = definition.seed_tensor(2**64 - 3)
    arguments = (seed, 2**32 - 1, k_start, k, n_start, n)
    assert_same_bits(kernels.entries(*arguments), reference.entries(*arguments))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0)])
def test_no_entries(k, n):
    assert kernels.entries(definition.seed_tensor(1), 0, 0, k, 0, n).shape == (k, n)


# ---- any product, cut up in any way --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(data=st.data())
def test_any_product_has_the_bits_of_the_reference(data):
    draw = data.draw
    rows = draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    k = draw(st.sampled_from([1, 16, 17, 127, 128, 129, 300]))
    residual = draw(st.booleans())
    column_start = draw(st.integers(0, k - 1)) if residual else draw(st.sampled_from([0, 70, 2**31 - 9, 2**32 - 90]))
    x = rows_of_every_kind(rows, k, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    options = {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "domain": draw(st.sampled_from([0, 1, 2**32 - 1])),
        "std": draw(st.sampled_from([0.01, 1.0, 1e-38, 2e-43, 3e40])),
        "activation_bits": draw(st.sampled_from([16, 8])),
        "row_mask": torch.arange(rows) % 3 != 0 if residual and draw(st.booleans()) else None,
        "column_start": column_start,
        "columns": draw(st.integers(1, k - column_start)) if residual else draw(st.sampled_from([1, 16, 33, 70])),
        "residual": residual,
    }
    cuts = {
        "tile": draw(st.sampled_from(SMALL)),
        "splits": draw(st.sampled_from([None, 1, 2, 5])),
        "arithmetic": draw(st.sampled_from(["int8", "fp16"])),
    }
    x = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    y = expected(x, **options)
    before = x.clone()
    with dirty_memory(draw(st.sampled_from([0xA5, 0xFF]))):
        result = triton_project(x, **cuts, **options)
    assert_same_bits(result, y)
    assert_same_bits(x, before, "x afterwards")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [16, 8])
def test_rows_of_every_kind(dtype, bits):
    x = rows_of_every_kind(29, 130, dtype, 11)
    assert_same_bits(triton_project(x, activation_bits=bits, tile=SMALL[3]), expected(x, activation_bits=bits))


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
def test_every_tile_of_the_tables(rows, arithmetic, bits):
    x = rows_of_every_kind(rows, 140, torch.bfloat16, rows)
    y = expected(x, activation_bits=bits, columns=50)
    chosen = {triton_configs.choose((major, 0), rows, bits, arithmetic) for major in (8, 9, 10, 12)}
    for tile in chosen:
        result = triton_project(x, tile=tile, arithmetic=arithmetic, activation_bits=bits, columns=50)
        assert_same_bits(result, y, str(tile))


@pytest.mark.parametrize(("bits", "arithmetic"), [(16, "int8"), (8, "int8"), (16, "fp16")])
def test_the_largest_sums_are_exact(bits, arithmetic):
    """Every product of a column has the same sign: sums far beyond 32 bits, near the limit of each accumulator."""
    k, columns = definition.MAX_FEATURES, 3
    signs = reference.entries(definition.seed_tensor(7), 0, 0, k, 0, columns).sign().float().t()
    x = torch.cat([signs, -signs, torch.ones(1, k)]) * torch.tensor([1 - 2.0**-20, 1.0, 0.51]).repeat(3)[:7, None]
    options = {"residual": False, "columns": columns, "activation_bits": bits}
    y = expected(x, **options)
    assert y.abs().max() > 400
    result = triton_project(x, tile=SMALL[0], splits=1, arithmetic=arithmetic, **options)
    assert_same_bits(result, y)


@pytest.mark.parametrize("mask", ["all", "nothing", "alternate", "last"])
def test_masked_rows_come_back_bit_for_bit(mask):
    x = rows_of_every_kind(37, 48, torch.float16, 15)
    rows = torch.arange(37)
    row_mask = {"all": rows >= 0, "nothing": rows < 0, "alternate": rows % 2 == 0, "last": rows == 36}[mask]
    for splits in (1, 2):
        with dirty_memory(0xA5):
            y = triton_project(x, row_mask=row_mask, tile=SMALL[0], splits=splits, column_start=7, columns=30)
        assert_same_bits(y[~row_mask], x[~row_mask][:, 7:37])
        assert_same_bits(y[row_mask], expected(x, column_start=7, columns=30)[row_mask])


def test_the_known_answers_of_a_first_use():
    answers = json.loads(json.dumps(self_test._known_answers()))

    def size(case):
        return case["M"] * case["K"] * case.get("N", case["K"])

    few = {
        "entries": answers["entries"],
        "edge": answers["edge"],
        **{form: sorted(answers[form], key=size)[:3] for form in ("residual", "projection")},
    }
    assert self_test.wrong_answers(BACKEND, CPU, few) == []


# ---- choices -------------------------------------------------------------------------------------------------------


def test_tiles_by_rows():
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1), (13, 0)]:
        for bits in (16, 8):
            tiles = triton_configs.tiles(capability, bits, "int8")
            assert [tile.rows for tile in tiles] == sorted(tile.rows for tile in tiles)
            for rows in (1, 16, 17, 64, 65, 10**6):
                tile = triton_configs.choose(capability, rows, bits, "int8")
                assert tile.rows >= rows or tile == tiles[-1]
            assert all(tile.columns % (16 * tile.warps) == 0 for tile in tiles)


def test_few_tiles_are_cut_along_k_until_there_is_work_for_every_multiprocessor():
    assert triton_configs.splits(tiles=1000, panels=64, multiprocessors=132) == 1
    assert triton_configs.splits(tiles=128, panels=64, multiprocessors=132) == 4
    assert triton_configs.splits(tiles=1, panels=64, multiprocessors=132) == 64
    assert triton_configs.splits(tiles=1, panels=1, multiprocessors=132) == 1


def test_arithmetic_by_capability_and_by_the_environment(monkeypatch):
    assert [triton_configs.arithmetic(each) for each in [(8, 0), (9, 0), (10, 0), (10, 3)]] == [*["int8"] * 3, "fp16"]
    monkeypatch.setenv("POC_KERNELS_TRITON_ARITHMETIC", "fp16")
    x = rows_of_every_kind(3, 40, torch.float32, 1)
    assert_same_bits(triton_project(x, tile=SMALL[0]), expected(x))
    with pytest.raises(ValueError, match="POC_KERNELS_TRITON_ARITHMETIC must be int8 or fp16, got bf16"):
        triton_project(x, arithmetic="bf16")


def test_warmup_runs_every_size():
    kernels.warmup("cpu", 40, dtype=torch.float16, activation_bits=8, rows=(1, 17))


def test_the_cpu_is_served_by_the_interpreter_only_when_it_is_asked_for(fresh_choice, monkeypatch):
    triton_backend = next(backend for backend in backends.backends() if backend.name == "triton")
    assert triton_backend.unavailable(CPU) == "runs on GPUs only"
    monkeypatch.setenv("POC_KERNELS_BACKEND", "triton")
    assert triton_backend.unavailable(CPU) is None
    x = rows_of_every_kind(3, 40, torch.float32, 2)
    assert_same_bits(project(triton_backend, x), expected(x))
    assert triton_backend.entries(definition.seed_tensor(1), 0, 0, 2, 0, 2).shape == (2, 2)
    assert triton_backend.unavailable(torch.device("meta")) == "runs on GPUs only"
