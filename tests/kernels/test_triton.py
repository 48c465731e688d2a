"""The Triton kernels under its interpreter, bit for bit against the reference, however the work is cut up."""

import contextlib
import functools
import itertools
import json
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    LAYOUTS,
    NEAR_ROUNDINGS,
    WOULD_COMPILE,
    assert_same_bits,
    dirty_memory,
    expected,
    laid_out,
    project,
    rows_of_every_kind,
    rows_of_sums,
    run_python,
)
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
import triton.language as tl

from poc_kernels import backends, definition, reference
from poc_kernels.kernels import Backend, self_test, trial
from poc_kernels.kernels.triton import device as triton_device
from poc_kernels.kernels.triton import plan
from poc_kernels.kernels.triton import product as kernels
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile

if isinstance(kernels.product_kernel, triton.runtime.JITFunction):
    reason = "kernels are compiled here, not interpreted: TRITON_INTERPRET was not set when Triton was imported"
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("interpreter")

SMALL = (
    Tile(16, 16, 1, 1, 4),
    Tile(64, 16, 2, 2, 8, turn=2),
    Tile(32, 64, 2, 1, 8, joined=True),
    Tile(128, 32, 4, 3, 4, turn=2, joined=True),
)
BACKEND = Backend("triton", kernels.project, kernels.entries, kernels.unavailable)


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


@pytest.mark.parametrize("power", [23, 24, 25, 26])
def test_sums_near_a_power_of_two_are_rounded_once(power):
    """Every rest under 512 of sums near 512 * 2**power, in each of the ways to make the sum."""
    tops = torch.tensor([sign * 2**power + near for sign in (1, -1) for near in (-2, -1, 0, 1)])
    total = (512 * tops[:, None] + torch.arange(512)).flatten()
    sums = torch.arange(len(total)) % 7 * 101 - 303 + (total + 1) % 2  # of the total's parity
    sums += (total - sums) % 2
    half = (total - sums) // 2
    low = (half & 255) + 256 * (torch.arange(len(total)) % 5 - 2)
    high = (half - low) // 256
    assert (2 * (256 * high + low) + sums == total).all()
    out = torch.empty(len(total))
    rounded_sum_kernel[(1,)](high.int(), low.int(), sums.int(), out, COUNT=len(total))
    assert_same_bits(out, total.double().float())


@triton.jit
def tiles_of_kernel(columns, out, COLUMNS: tl.constexpr):  # noqa: N803
    tl.store(out, triton_device.tiles_of(columns, COLUMNS))


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 2**31 - 64, 2**31 - 63, 2**31 - 1, 2**31, 2**32 - 1])
def test_tiles_of_columns_up_to_the_limit_of_the_definition(columns):
    out = torch.zeros(1, dtype=torch.int64)
    tiles_of_kernel[(1,)](columns, out, COLUMNS=64)
    assert out.item() == -(-columns // 64)


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


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
def test_every_tile_of_the_tables(bits, arithmetic, splits):
    capabilities = [tile_table.HIP, (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]
    tiles = {  # stages are the compiler's alone
        tile._replace(stages=1) for each in capabilities for tile in tile_table.tiles(each, bits, arithmetic)
    }
    x = rows_of_every_kind(max(tile.rows for tile in tiles), 140, torch.bfloat16, bits)
    y = expected(x, activation_bits=bits, columns=20)
    for tile in tiles:
        rows = tile.rows - 3
        result = triton_project(
            x[:rows], tile=tile, splits=splits, arithmetic=arithmetic, activation_bits=bits, columns=20
        )
        assert_same_bits(result, y[:rows], str(tile))


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


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
def test_sums_beyond_32_bits_are_rounded_once(arithmetic, splits):
    x = rows_of_sums(NEAR_ROUNDINGS, 4096, seed=7)
    options = {"residual": False, "columns": 2, "seed": 7}
    y = triton_project(x, tile=Tile(16, 64, 1, 1, 8), splits=splits, arithmetic=arithmetic, **options)
    assert_same_bits(y, expected(x, **options))


@pytest.mark.parametrize("mask", ["all", "nothing", "alternate", "last"])
def test_masked_rows_come_back_bit_for_bit(mask):
    x = rows_of_every_kind(37, 48, torch.float16, 15)
    rows = torch.arange(37)
    row_mask = {"all": rows >= 0, "nothing": rows < 0, "alternate": rows % 2 == 0, "last": rows == 36}[mask]
    shard = {"column_start": 7, "columns": 30}
    for splits, arithmetic, fill in itertools.product((1, 2), ("int8", "fp16"), (0xA5, 0xFF)):
        with dirty_memory(fill):  # limbs of NaN in fp16
            y = triton_project(x, row_mask=row_mask, tile=SMALL[0], splits=splits, arithmetic=arithmetic, **shard)
        assert_same_bits(y[~row_mask], x[~row_mask][:, 7:37])
        assert_same_bits(y[row_mask], expected(x, **shard)[row_mask])


@contextlib.contextmanager
def allocations():
    """What torch.empty gives, full of 0xA5 at first."""
    given, empty = [], torch.empty

    def recorded(*size, **options):
        given.append(empty(*size, **options))
        given[-1].view(torch.uint8).fill_(0xA5)
        return given[-1]

    with mock.patch.object(torch, "empty", recorded):
        yield given


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_that_are_masked_off_are_not_quantised(bits):
    x, row_mask = rows_of_every_kind(37, 200, torch.bfloat16, 3), torch.arange(37) % 5 == 0
    with allocations() as given:
        triton_project(x, row_mask=row_mask, activation_bits=bits, tile=SMALL[0], splits=1)
    _, limbs, rows, _ = given
    rows = rows.view(torch.uint8).reshape(2, -1, 4)[:, :37]
    by_row = limbs.view(torch.uint8).reshape(len(limbs), -1, bits // 8, SMALL[0].rows, limbs.shape[-1])
    by_row = by_row.permute(1, 3, 0, 2, 4).flatten(0, 1)[:37]
    for touched in (by_row, rows.transpose(0, 1)):
        left_alone = (touched.reshape(37, -1) == 0xA5).all(1)
        assert torch.equal(left_alone, ~row_mask)


@pytest.mark.parametrize("bits", [16, 8])
def test_tiles_whose_rows_are_all_masked_off_add_nothing_to_the_sums_of_parts(bits, monkeypatch):
    from triton.runtime import interpreter

    added, add = [], interpreter.interpreter_builder.create_atomic_rmw

    def recorded(operation, pointers, values, mask, *rest):
        added.append(int(mask.data.sum()) if mask.data.ndim == 2 else 0)
        return add(operation, pointers, values, mask, *rest)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_atomic_rmw", recorded)
    x, options = (
        rows_of_every_kind(48, 256, torch.bfloat16, 3),
        {"tile": SMALL[0], "splits": 2, "activation_bits": bits},
    )
    for wanted_tiles in ([], [1], [0, 1, 2]):
        row_mask = torch.isin(torch.arange(48) // 16, torch.tensor(wanted_tiles)) & (torch.arange(48) % 16 == 5)
        added.clear()
        y = triton_project(x, row_mask=row_mask, columns=20, **options)
        assert sum(added) == len(wanted_tiles) * 16 * 32 * 2 * (bits // 8)  # of two tiles of 16 columns
        assert_same_bits(y, expected(x, row_mask=row_mask, columns=20, activation_bits=bits))


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


def test_a_tile_that_only_calls_of_many_rows_take_is_found_before_its_use(fresh_choice, monkeypatch):
    whole = kernels.project

    def broken(x, seed, request, tile=None, splits=None, **options):
        """One bit is wrong where the largest tile of 8 bits sums K in one part."""
        y = whole(x, seed, request, tile=tile, splits=splits, **options)
        tile = tile or tile_table.choose((9, 0), len(x), request.activation_bits, "int8")
        if tile == tile_table.tiles((9, 0), 8, "int8")[-1] and splits == 1:
            y.view(torch.int16)[-1, -1] ^= 1
        return y

    monkeypatch.setattr(kernels, "project", broken)
    monkeypatch.setattr(plan, "LONGEST_BLOCK", 256)  # for the interpreter's sake
    few = {"entries": [], "residual": [], "projection": [], "edge": self_test._known_answers()["edge"]}
    monkeypatch.setattr(self_test, "_known_answers", lambda: few)
    monkeypatch.setenv("POC_KERNELS_BACKEND", "triton")
    triton_backend = next(backend for backend in backends.backends() if backend.name == "triton")
    assert self_test.wrong_answers(triton_backend, CPU) == [], "known answers are of few rows"
    tile = "Tile(columns=128, rows=256, warps=8, stages=2, run=4, turn=2, joined=True, blocks=1)"
    assert backends.verdict(triton_backend, CPU) == [
        f"{dtype}, 8 bits in int8 by {tile}, K = {k} whole"
        for dtype, k in (("bfloat16", 140), ("bfloat16", 384), ("float16", 384))
    ]
    with pytest.raises(RuntimeError, match="triton: wrong answers in its self-test"):
        backends.select(CPU)


@pytest.mark.parametrize(("capability", "parts"), [((9, 0), 2), (tile_table.HIP, 1)])
@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
def test_the_tiles_of_a_device_are_tried_whole_and_in_parts_and_with_every_dtype(
    arithmetic, capability, parts, monkeypatch
):
    calls = []

    def recorded(x, seed, request, **options):
        calls.append((x.dtype, x.shape[1], request.activation_bits, options["tile"], options["splits"]))
        assert options["arithmetic"] == arithmetic
        return torch.zeros(len(x), request.columns, dtype=x.dtype)

    monkeypatch.setenv("POC_KERNELS_TRITON_ARITHMETIC", arithmetic)
    monkeypatch.setattr(kernels, "project", recorded)
    monkeypatch.setattr(kernels, "hardware", lambda device: (capability, 4))
    wrong = kernels.wrong_tiles(CPU)
    assert len(wrong) == len(set(wrong)) == len(calls)
    cut = {1: "whole", 2: "in 2 parts"}
    assert wrong[1] == f"bfloat16, 16 bits in {arithmetic} by {calls[1][3]}, K = 140 {cut[calls[1][4]]}"
    short = {
        (torch.bfloat16, 140, bits, tile, splits)
        for bits in (16, 8)
        for tile in tile_table.tiles(capability, bits, arithmetic)
        for splits in range(1, parts + 1)
    }
    beyond_a_block = {
        (dtype, 8320, bits, tile_table.tiles(capability, bits, arithmetic)[-1], splits)
        for dtype, bits, splits in [
            *((torch.bfloat16, bits, 1) for bits in (16, 8)),
            *((torch.float32, 16, 1), (torch.float32, 8, parts)),
            *((torch.float16, 16, parts), (torch.float16, 8, 1)),
        ]
    }
    assert set(calls) == short | beyond_a_block


@pytest.mark.parametrize("std", [1.0, 0.01, 3e40, 1e-36, 2e-38, 1e-38, 2e-43])
def test_the_factor_goes_to_the_kernel_as_its_bits_whatever_becomes_of_subnormals(std, monkeypatch):
    given = []

    class Recorded:
        arg_names = kernels.product_kernel.arg_names

        def __getitem__(self, grid):
            return lambda *arguments, **options: given.append(dict(zip(self.arg_names, arguments, strict=False)))

    wanted = int(np.array(definition.coefficient(std), np.float32).view(np.int32))
    monkeypatch.setattr(kernels, "product_kernel", Recorded())
    torch.set_flush_denormal(True)
    triton_project(torch.ones(1, 16), std=std)
    torch.set_flush_denormal(False)
    assert [arguments["coefficient"] for arguments in given] == [wanted]


# ---- choices -------------------------------------------------------------------------------------------------------


def test_tiles_by_rows():
    for capability in [tile_table.HIP, (8, 0), (8, 9), (9, 0), (10, 0), (12, 1), (13, 0)]:
        for bits in (16, 8):
            tiles = tile_table.tiles(capability, bits, "int8")
            assert [tile.rows for tile in tiles] == sorted(tile.rows for tile in tiles)
            for rows in (1, 16, 17, 64, 65, 10**6):
                tile = tile_table.choose(capability, rows, bits, "int8")
                assert tile.rows >= rows or tile == tiles[-1]
            assert all(tile.columns % (16 * tile.warps) == 0 for tile in tiles)


FEW, MANY = Tile(64, 64, 4, 3, blocks=3), Tile(128, 64, 8, 3)


@pytest.mark.parametrize(
    ("tile", "tiles", "panels", "sms", "parts"),
    [
        (MANY, 1000, 64, 132, 1),
        (MANY, 67, 64, 132, 1),
        (MANY, 66, 64, 132, 2),
        (FEW, 128, 64, 108, 2),
        (FEW, 128, 64, 132, 3),
        (FEW, 163, 64, 108, 1),
        (FEW, 162, 64, 108, 2),
        (FEW, 1000, 64, 132, 1),
        (FEW, 1, 64, 132, 64),
        (FEW, 1, 1, 132, 1),
    ],
)
def test_few_tiles_are_cut_along_k_until_all_sms_have_as_many_blocks_as_fit(tile, tiles, panels, sms, parts):
    assert tile_table.splits((8, 0), tile, tiles, panels, sms) == parts


@pytest.mark.parametrize(("numbers", "arch"), [((9, 4), "gfx942"), ((9, 0), "gfx90a"), ((10, 3), "gfx1030")])
def test_an_amd_gpu_takes_no_tile_arithmetic_or_parts_by_numbers_that_mean_other_things(numbers, arch, monkeypatch):
    properties = mock.Mock(major=numbers[0], minor=numbers[1], multi_processor_count=304, gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    capability, sms = kernels.hardware.__wrapped__(torch.device("cuda", 0))
    assert (capability, sms) == (tile_table.HIP, 304)
    assert kernels.choose_arithmetic(capability) == "int8"
    assert tile_table.forms_of_k(capability) == (1,)
    for bits in (16, 8):
        tiles = tile_table.tiles(capability, bits, "int8")
        assert {tile.stages for tile in tiles} == {2}
        assert {tile_table.splits(capability, tile, 1, 64, 304) for tile in tiles} == {1}
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.hardware.__wrapped__(torch.device("cuda", 0)) == (numbers, 304)


def test_arithmetic_by_capability_and_by_the_environment(monkeypatch):
    assert [tile_table.arithmetic(each) for each in [(8, 0), (9, 0), (10, 0), (10, 3)]] == [*["int8"] * 3, "fp16"]
    monkeypatch.setenv("POC_KERNELS_TRITON_ARITHMETIC", "fp16")
    x = rows_of_every_kind(3, 40, torch.float32, 1)
    assert_same_bits(triton_project(x, tile=SMALL[0]), expected(x))
    with pytest.raises(ValueError, match="POC_KERNELS_TRITON_ARITHMETIC must be int8 or fp16, got bf16"):
        triton_project(x, arithmetic="bf16")


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_wrong_arithmetic_in_the_environment_is_an_error_at_the_first_call(place, fresh_choice, monkeypatch):
    """Not a wrong answer of the kernels, upon which another backend would serve."""
    monkeypatch.setenv("POC_KERNELS_TRITON_ARITHMETIC", "in8")
    monkeypatch.setattr(kernels, "hardware", lambda device: ((9, 0), 4))
    if place == "cpu":
        monkeypatch.setenv("POC_KERNELS_BACKEND", "triton")
    for _ in range(2):
        with pytest.raises(ValueError, match="POC_KERNELS_TRITON_ARITHMETIC must be int8 or fp16, got in8"):
            backends.select(torch.device(place, 0) if place == "cuda" else CPU)
    assert not trial.verdicts
    assert not backends._selected


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "needs compute capability 8.0"), ((8, 0), None)])
def test_old_cards_are_refused(capability, reason, monkeypatch):
    monkeypatch.setattr(kernels, "hardware", lambda device: (capability, 4))
    assert kernels.unavailable(torch.device("cuda", 0)) == reason


@pytest.mark.parametrize(
    ("release", "capability", "refused"),
    [
        ((3, 6, 0), (9, 0), True),
        ((3, 7, 0), (9, 0), True),
        ((3, 7, 1), (9, 0), False),
        ((3, 10, 0), (9, 0), False),
        ((3, 6, 0), (8, 9), False),
        ((3, 6, 0), (10, 0), False),
        ((3, 6, 0), tile_table.HIP, False),
    ],
)
def test_a_triton_without_fences_is_refused_where_products_need_them(release, capability, refused, monkeypatch):
    monkeypatch.setattr(tile_table, "release", lambda: release)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "hardware", lambda device: (capability, 4))
    version = ".".join(map(str, release))
    sentence = (
        f"Triton {version} leaves out a memory fence that products on compute capability 9.x need: "
        "install Triton 3.7.1 or later"
    )
    assert kernels.unavailable(torch.device("cuda", 0)) == (sentence if refused else None)


def test_the_interpreter_needs_no_fences(monkeypatch):
    monkeypatch.setattr(tile_table, "release", lambda: (3, 6, 0))
    assert kernels.unavailable(CPU) is None


@pytest.mark.parametrize(("capability", "forms"), [((9, 0), {1, 2}), (tile_table.HIP, {1})])
@pytest.mark.parametrize("dim", [1, 200])
def test_warmup_runs_every_tile(dim, capability, forms, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "hardware", lambda device: (capability, 4))
        patch.setattr(tile_table, "tiles", lambda *_: SMALL[:2])
        patch.setattr(kernels, "project", lambda *arguments, **options: calls.append((arguments, options)))
        kernels.warmup("cpu", dim, dtype=torch.float16, activation_bits=8)
    assert {options["tile"] for _, options in calls} == set(SMALL[:2])
    assert {options["splits"] for _, options in calls} == forms
    for arguments, options in calls:
        x, _, request = arguments
        assert x.shape[1] == dim
        assert kernels.project(*arguments, **options).shape == (2, min(dim, request.columns))


COMPILED = f"""
{WOULD_COMPILE}
import itertools, torch
from poc_kernels import definition
from poc_kernels.kernels import self_test
from poc_kernels.kernels import Backend
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton import product as kernels
"""
NO_COMPILATION_AFTER_WARMUP = """
for sms, bits in itertools.product((132, 30), (16, 8)):
    kernels.hardware = lambda device: ((9, 0), sms)
    for dim in (256, 1000, 1001, 1):
        kernels.warmup("cpu", dim, dtype=torch.bfloat16, activation_bits=bits)
        before = len(compiled)
        assert before
        seeds, memory = torch.zeros(3, dtype=torch.int64), torch.zeros(3 * 1100 * 1100, dtype=torch.bfloat16)
        sizes = [*range(1, 20), 32, 33, 64, 65, 100, 128, 129, 255, 256, 257, 1024, 1025]
        strides = [(dim, 0), (1024, 0), (1024, 3), (1027, 0), (1027, 8), (0, 0), (1, 2)]
        shards = [(0, dim), (0, dim // 2), (dim // 2, dim - dim // 2), (dim // 4, 32), (3, 2), (dim - 7, 7)]
        shards = shards if dim > 1 else shards[:1]  # a warmup leaves out shards of one column, unless that is all
        for i, (m, (stride, offset), (start, columns)) in enumerate(itertools.product(sizes, strides, shards)):
            mask = [None, torch.ones(m, dtype=torch.bool), torch.ones(m + 5, dtype=torch.bool)[3:-2]][i % 3]
            x = memory.as_strided((m, dim), (stride, 1), offset)
            request = definition.Request(i, 0.5 + i, bits, columns, i % 2 == 0, start, mask)
            kernels.project(x, seeds[i % 3 :][:1], request)
        assert len(compiled) == before, (dim, bits, len(compiled) - before)
print(len(compiled))
"""


def test_nothing_is_compiled_after_warmup(tmp_path):
    assert int(run_python(COMPILED + NO_COMPILATION_AFTER_WARMUP, tmp_path, TRITON_INTERPRET="0")) > 0


FIRST_USE = """
for arithmetic in ("int8", "fp16"):
    kernels.hardware = lambda device: ((9, 0), 132)
    kernels.choose_arithmetic = lambda *_: arithmetic
    compiled.clear()
    self_test.wrong_answers(Backend("triton", kernels.project, kernels.entries, None), torch.device("cpu"))
    answers = len(compiled)
    kernels.wrong_tiles(torch.device("cpu"))
    print(answers, len(compiled) - answers)
"""


def test_what_a_first_use_compiles(tmp_path):
    """As docs/operating.md and bench/gpu_check/run.py say it."""
    assert run_python(COMPILED + FIRST_USE, tmp_path, TRITON_INTERPRET="0").splitlines() == ["28 26", "28 22"]


def test_the_cpu_is_served_by_the_interpreter_only_when_it_is_asked_for(fresh_choice, monkeypatch):
    triton_backend = next(backend for backend in backends.backends() if backend.name == "triton")
    assert backends.unavailable(triton_backend, CPU) == "serves a cpu only where it is asked for by name"
    monkeypatch.setenv("POC_KERNELS_BACKEND", "triton")
    assert backends.unavailable(triton_backend, CPU) is None
    x = rows_of_every_kind(3, 40, torch.float32, 2)
    assert_same_bits(project(triton_backend, x), expected(x))
    assert triton_backend.entries(definition.seed_tensor(1), 0, 0, 2, 0, 2).shape == (2, 2)
    assert triton_backend.unavailable(torch.device("meta")) == "runs on GPUs only"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_backend.unavailable(CPU) == "runs on GPUs only"
