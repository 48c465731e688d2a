"""Every instruction set of this CPU against the reference, bit for bit, however the work is cut up."""

import concurrent.futures
import functools
import itertools
import threading
from dataclasses import dataclass

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    LAYOUTS,
    NEAR_ROUNDINGS,
    assert_same_bits,
    backend_named,
    dirty_memory,
    expected,
    laid_out,
    project,
    rows_of_every_kind,
    rows_of_sums,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from poc_kernels import definition, reference
from poc_kernels.kernels import Backend, cpu, native
from poc_kernels.kernels.cpu import Tiling

if native.load() is None:
    pytest.skip("this installation has no native core", allow_module_level=True)

NAMES = [name for name, supported in cpu.instruction_sets() if supported]
FORMS = [(name, form) for name in NAMES for form in range(1, 1 + len(cpu.forms(name)))]
MISSING = [name for name, supported in cpu.instruction_sets() if not supported]
THREADS = (1, 2, 3, 7)

each_instruction_set = pytest.mark.parametrize("name", NAMES)
each_form = pytest.mark.parametrize(
    ("name", "form"),
    FORMS,
    ids=[f"{name}-{cpu.forms(name)[form - 1].replace(',', '').replace(' ', '-')}" for name, form in FORMS],
)


def native_project(x, name, *, threads=0, tiling=Tiling(), **options):  # noqa: B008 (immutable)
    """`helpers.project` with the choices that only native kernels have."""
    cut = functools.partial(cpu.project, instruction_set=name, threads=threads, tiling=tiling)
    backend = backend_named(f"native-{name}")
    return project(Backend(backend.name, cut, backend.entries, backend.unavailable), x, **options)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([0] * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([0xFFFFFFFF] * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(words, answer):
    assert native.load().philox4x32_10(*words) == answer


def test_the_native_core_computes_this_definition():
    assert native.load().DEFINITION == definition.DEFINITION


def test_plain_code_is_always_there():
    assert cpu.instruction_sets()[-1] == ("portable", True)


@pytest.mark.parametrize("name", [*MISSING, "portable"])
def test_a_backend_says_whether_this_cpu_runs_it(name):
    reason = backend_named(f"native-{name}").unavailable(CPU)
    assert reason == ("this CPU lacks the instructions" if name in MISSING else None)


@each_form
@pytest.mark.parametrize("only", ["any", "many rows", "several panels"])
def test_a_form_that_is_wrong_is_found_by_the_self_test(monkeypatch, name, form, only):
    """One bit of the last row, with few rows or only with many, or with K in several panels, and in one form alone."""
    right = cpu.project

    def wrong(x, seed, request, *, tiling=Tiling(), **options):  # noqa: B008 (immutable)
        y = right(x, seed, request, tiling=tiling, **options)
        hit = {"any": True, "many rows": len(x) > 9, "several panels": 0 < tiling.panel_k < x.shape[1]}[only]
        if tiling.form == form and hit:
            bits = y.view(torch.int32 if y.dtype == torch.float32 else torch.int16)
            bits[-1, -1] ^= 1
        return y

    backend = backend_named(f"native-{name}")
    assert backend.wrong(CPU) == []
    monkeypatch.setattr(cpu, "project", wrong)
    found = backend.wrong(CPU)
    assert found
    assert all(answer.endswith(f"by {cpu.forms(name)[form - 1]}") for answer in found)


def test_which_instruction_sets_are_tested(record_property):
    assert {*NAMES, *MISSING} == {name for name, _ in cpu.instruction_sets()}
    untested = f"; this CPU lacks {', '.join(MISSING)}" if MISSING else ""
    record_property("summary", f"native kernels tested: {', '.join(NAMES)}{untested}")


def test_torchs_own_threads_are_borrowed():
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    assert native.load().team_runtime().startswith("OpenMP (")


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction_set must be one of this build's, got sse9"):
        cpu.entries(definition.seed_tensor(1), 0, 0, 1, 0, 1, instruction_set="sse9")


@pytest.mark.skipif(not MISSING, reason="this CPU has every instruction set of this build")
def test_an_instruction_set_that_the_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match=f"this CPU lacks the instructions of {MISSING[0]}"):
        cpu.entries(definition.seed_tensor(1), 0, 0, 1, 0, 1, instruction_set=MISSING[0])


# ---- any product, cut up in any way --------------------------------------------------------------------------------


@dataclass
class Case:
    """One product, and how to cut it up."""

    x: torch.Tensor
    options: dict
    threads: int
    tiling: Tiling
    forced: bool
    """Each form in turn, or the one that the driver takes for the number of rows."""
    fill: int


@st.composite
def cases(draw):
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 7, 12, 13, 70]) | st.integers(1, 70))
    k = draw(st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 255, 1000, 1024, 1030, 2064]) | st.integers(1, 300))
    residual = draw(st.booleans())
    if residual:
        column_start = draw(st.integers(0, k - 1))
        columns = draw(st.integers(1, k - column_start))
    else:
        columns = draw(st.sampled_from([1, 8, 15, 16, 17, 63, 64, 65]) | st.integers(1, 260))
        last = definition.MAX_COLUMNS - columns
        column_start = draw(st.just(0) | st.integers(0, last) | st.integers(last - 70, last))
    x = rows_of_every_kind(rows, k, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    mask = draw(st.sampled_from(["none", "none", "all", "nothing", "some"])) if residual else "none"
    generator = torch.Generator().manual_seed(rows)
    masks = {
        "none": None,
        "all": torch.ones(rows, dtype=torch.bool),
        "nothing": torch.zeros(rows, dtype=torch.bool),
        "some": torch.rand(rows, generator=generator) < 0.5,
    }
    options = {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "domain": draw(st.sampled_from([0, 1, 2**32 - 1]) | st.integers(0, 2**32 - 1)),
        "std": draw(st.sampled_from([0.01, 0.01, 1.0, 1e-38, 2e-43, 1e36, 3e40])),
        "activation_bits": draw(st.sampled_from([16, 8])),
        "row_mask": masks[mask],
        "column_start": column_start,
        "columns": columns,
        "residual": residual,
    }
    tile = st.just(0) | st.integers(1, 80)
    return Case(
        x=laid_out(x, draw(st.sampled_from(LAYOUTS))),
        options=options,
        threads=draw(st.sampled_from(THREADS)),
        tiling=Tiling(draw(tile), draw(tile), draw(tile | st.integers(1, k + 16))),
        forced=draw(st.integers(0, 3)) > 0,
        fill=draw(st.sampled_from([0xA5, 0xFF, 0])),
    )


@settings(max_examples=150)
@given(case=cases())
def test_any_product_has_the_bits_of_the_reference(case):
    y = expected(case.x, **case.options)
    before = case.x.clone()
    for name, form in FORMS:
        tiling = case.tiling._replace(form=form * case.forced)
        with dirty_memory(case.fill):
            result = native_project(case.x, name, threads=case.threads, tiling=tiling, **case.options)
        assert_same_bits(result, y, f"{name}, form {tiling.form}")
        assert result.is_contiguous()
    assert_same_bits(case.x, before, "x afterwards")


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    domain=st.integers(0, 2**32 - 1),
    k_start=st.integers(0, 40) | st.integers(0, definition.MAX_FEATURES - 1200),
    k=st.sampled_from([1, 15, 16, 17, 511, 512, 513, 1100]) | st.integers(1, 100),
    n_start=st.integers(0, 40) | st.integers(definition.MAX_COLUMNS - 200, definition.MAX_COLUMNS - 70),
    n=st.integers(1, 70),
    threads=st.sampled_from(THREADS),
)
def test_any_entries_have_the_bits_of_the_reference(seed, domain, k_start, k, n_start, n, threads):
    window = (definition.seed_tensor(seed), domain, k_start, k, n_start, n)
    e = reference.entries(*window)
    for name in NAMES:
        with dirty_memory(0xA5):
            result = cpu.entries(*window, instruction_set=name, threads=threads)
        assert_same_bits(result, e, name)


# ---- the same, one thing at a time ---------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("bits", [16, 8])
def test_every_tile_of_rows_columns_and_k_gives_the_same_bits(name, form, bits):
    x = rows_of_every_kind(29, 230, torch.float32, 11)
    y = expected(x, activation_bits=bits)
    for rows, columns, k in itertools.product([0, 1, 2, 7, 16], [0, 1, 9, 40, 64], [0, 1, 16, 65, 128]):
        tiling = Tiling(rows, columns, k, form)
        assert_same_bits(native_project(x, name, tiling=tiling, activation_bits=bits), y, f"{name} {tiling}")


@each_instruction_set
@pytest.mark.parametrize("threads", THREADS)
def test_every_number_of_threads_gives_the_same_bits(name, threads):
    x = rows_of_every_kind(300, 300, torch.bfloat16, 12)
    y = expected(x, columns=40)
    assert_same_bits(native_project(x, name, threads=threads, columns=40), y)
    torch.set_num_threads(threads)
    assert_same_bits(native_project(x, name, columns=40), y)


@each_form
@pytest.mark.parametrize("bits", [16, 8])
def test_every_number_of_rows_and_columns_near_a_tile_gives_the_same_bits(name, form, bits):
    x = rows_of_every_kind(34, 70, torch.float16, 13)
    y = expected(x, activation_bits=bits)
    near = [*range(1, 19), *range(29, 36), *range(60, 70)]
    for rows, columns in itertools.product([*range(1, 18), *range(31, 35)], near):
        tiling = Tiling(form=form)
        result = native_project(x[:rows], name, tiling=tiling, activation_bits=bits, columns=columns, threads=1)
        assert_same_bits(result, y[:rows, :columns], f"{rows} rows, {columns} columns")


@each_instruction_set
def test_rows_beyond_one_block_give_the_same_bits(name):
    k, rows = 65536, 300  # at this K the kernel holds 256 rows at a time
    x = rows_of_every_kind(rows, 64, torch.bfloat16, 14).repeat(1, k // 64)
    mask = torch.arange(rows) % 7 != 3
    options = {"columns": 3, "column_start": 50, "row_mask": mask}
    assert_same_bits(native_project(x, name, **options), expected(x, **options))


@each_form
@pytest.mark.parametrize("bits", [16, 8])
def test_rows_of_several_tasks_give_the_same_bits(name, form, bits):
    """With K in one panel, and in several, between which each task keeps the sums of its rows."""
    rows = 1700  # more than two tasks take at 8 bits
    x = rows_of_every_kind(rows, 135, torch.bfloat16, 19)
    mask = torch.arange(rows) % 11 != 3
    options = {"activation_bits": bits, "row_mask": mask, "columns": 35}
    y = expected(x, **options)
    for threads, panel_k in itertools.product((1, 2), (0, 64)):
        tiling = Tiling(block_rows=rows * (panel_k > 0), panel_k=panel_k, form=form)
        with dirty_memory(0xA5):
            result = native_project(x, name, tiling=tiling, threads=threads, **options)
        assert_same_bits(result, y, f"{threads} threads, {tiling}")


@each_form
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("k", [32768, 32784, definition.MAX_FEATURES])
def test_the_largest_sums_are_exact(name, form, bits, k):
    """Every product of a column has the same sign: sums far beyond 32 bits, near the limit of each accumulator."""
    columns = 3
    seed = definition.seed_tensor(7)
    signs = reference.entries(seed, 0, 0, k, 0, columns).sign().float().t()
    x = torch.cat([signs, -signs, torch.ones(1, k), -torch.ones(1, k)])
    x *= torch.tensor([1 - 2.0**-20, 1.0, 0.51]).repeat(3)[: len(x), None]
    options = {"residual": False, "columns": columns, "activation_bits": bits}
    y = expected(x, **options)
    assert y.abs().max() > 400 * k / definition.MAX_FEATURES
    for tile_k in (0, 4096, 65536):
        tiling = Tiling(panel_k=tile_k, form=form)
        assert_same_bits(native_project(x, name, tiling=tiling, **options), y, f"tiles of {tile_k}")


@pytest.fixture(scope="module")
def near_roundings():
    return rows_of_sums(NEAR_ROUNDINGS, 4096, seed=7)


@each_form
def test_sums_beyond_32_bits_are_rounded_once(near_roundings, name, form):
    options = {"residual": False, "columns": 2, "seed": 7}
    y = native_project(near_roundings, name, tiling=Tiling(form=form), **options)
    assert_same_bits(y, expected(near_roundings, **options))


@each_instruction_set
def test_a_form_that_the_instruction_set_lacks_is_refused(name):
    forms = len(cpu.forms(name))
    for form in (-1, forms + 1):
        with pytest.raises(ValueError, match=f"form must be in \\[0, {forms}\\], got {form}"):
            native_project(torch.ones(1, 16), name, tiling=Tiling(form=form))


@each_instruction_set
@pytest.mark.parametrize("mask", ["all", "nothing", "alternate", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_come_back_bit_for_bit(name, mask, dtype):
    x = rows_of_every_kind(67, 48, dtype, 15)
    rows = torch.arange(67)
    row_mask = {"all": rows >= 0, "nothing": rows < 0, "alternate": rows % 2 == 0, "last": rows == 66}[mask]
    for shard in ({}, {"column_start": 7, "columns": 30}):
        with dirty_memory(0xA5):
            y = native_project(x, name, row_mask=row_mask, **shard)
        columns = slice(shard.get("column_start", 0), shard.get("column_start", 0) + y.shape[1])
        assert_same_bits(y[~row_mask], x[~row_mask][:, columns])
        assert_same_bits(y[row_mask], expected(x, **shard)[row_mask])


@each_instruction_set
def test_a_mask_may_have_strides(name):
    x = rows_of_every_kind(40, 33, torch.float32, 16)
    wide = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = wide[:, 1]
    assert not mask.is_contiguous()
    assert_same_bits(native_project(x, name, row_mask=mask), expected(x, row_mask=mask))


@each_instruction_set
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_a_large_product(name, layout):
    x = laid_out(rows_of_every_kind(300, 270, torch.bfloat16, 17), layout)
    assert_same_bits(native_project(x, name, columns=64), expected(x.contiguous(), columns=64))


# ---- what surrounds a call -----------------------------------------------------------------------------------------


@each_instruction_set
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("std", [0.01, 1e-38])
def test_flushing_subnormals_changes_nothing_and_stays_as_it_was(name, threads, std):
    x = rows_of_every_kind(200, 200, torch.float32, 18)
    y = expected(x, std=std, columns=50)
    subnormal = torch.tensor([1e-40])
    definition.coefficient(std)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    result = native_project(x, name, threads=threads, std=std, columns=50)
    assert (subnormal * 1.0 == 0).all(), "the call changed the caller's setting"
    torch.set_flush_denormal(False)
    native_project(x, name, threads=threads, std=std, columns=50)
    assert (subnormal * 1.0 != 0).all(), "the call changed the caller's setting"
    assert_same_bits(result, y)


@each_instruction_set
def test_python_threads_may_call_at_once(name):
    inputs = [rows_of_every_kind(40, 400, torch.float32, seed) for seed in range(6)]
    results = [expected(x, seed=i) for i, x in enumerate(inputs)]
    together = threading.Barrier(6)

    def call(i):
        together.wait()
        return [native_project(inputs[i], name, seed=i, threads=1 + i % 3) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for i, repeats in enumerate(pool.map(call, range(6))):
            for y in repeats:
                assert_same_bits(y, results[i], f"thread {i}")
