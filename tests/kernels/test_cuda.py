"""The package's machine code on a stand-in for the driver: from torch ops to bits, and what may go wrong on the way."""

import pytest
import torch
from helpers import CPU, assert_same_bits, expected, project, requested, rows_of_every_kind

pytest.importorskip("triton")
import cuda_stand_in
from cuda_stand_in import BACKEND, BY_BOTH_LAUNCHERS, STREAM, StandIn
from hypothesis import given
from hypothesis import strategies as st

import poc_kernels
from poc_kernels import backends, machine_code, reference
from poc_kernels.kernels import self_test
from poc_kernels.kernels.cuda import forms, package, product
from poc_kernels.kernels.triton import plan, tiles
from poc_kernels.protocol import cuda_inputs, inputs

LARGEST = forms.product_name(1, 16, forms.tiles((9, 0), 16, True)[-1], 2, True)
NAMES = (
    "quantise-bfloat16-16-run4-1024",
    "quantise-bfloat16-16-run4-1024-any",
    "product-bfloat16-16-64x16-parts",
    "product-bfloat16-16-64x16-any",
    LARGEST,
    "entries",
    "normal-bfloat16",
    "hash",
)
SEED = poc_kernels.seed_tensor(7)

pytestmark = pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))


@pytest.fixture
def gpu(driver_library, code_folder, compiled_code, classes):
    """A GPU on which nothing has run."""
    stand_in = StandIn(driver_library, *compiled_code)
    with cuda_stand_in.in_use(stand_in, code_folder, classes):
        yield stand_in


# ---- from ops to bits ------------------------------------------------------------------------------------------------


@BY_BOTH_LAUNCHERS
def test_ops_reach_the_bits_of_the_reference_through_backend_launcher_and_driver(gpu, fresh_choice, monkeypatch):
    """The choice with its trial too, of a known answer that these forms can give."""
    edges = self_test._known_answers()["edge"]
    edge = next(case for case in edges if (case["dtype"], case["bits"]) == ("bfloat16", 16))
    few = {"entries": [], "residual": [], "projection": [], "edge": [edge]}
    monkeypatch.setattr(self_test, "_known_answers", lambda: few)
    monkeypatch.setattr(product, "wrong_tiles", lambda device: [])
    x, mask = rows_of_every_kind(3, 160, torch.bfloat16, 1), torch.tensor([True, False, True])
    with poc_kernels.use_backend("cuda"):
        assert backends.select(CPU).name == "cuda"
        assert len(gpu.launched) == 2 * 3
        y = poc_kernels.residual_projection(x, SEED, row_mask=mask)
    assert_same_bits(y, expected(x, row_mask=mask))
    cut = plan.plan(3, 160, 160, 16, forms.choose((9, 0), 3, 16, True), 4, (9, 0), 0)
    assert cut.parts == 2
    assert gpu.launched[-2:] == [
        ("quantise-bfloat16-16-run4-1024", 0, (3 + cut.clearing, 1, 1), STREAM),
        ("product-bfloat16-16-64x16-parts", 0, (cut.tiles, cut.parts, 1), STREAM),
    ]


@BY_BOTH_LAUNCHERS
def test_what_is_aligned_to_nothing(gpu):
    memory = torch.full((1 + 5 * 103,), torch.nan, dtype=torch.bfloat16)
    x = memory[1:].view(5, 103)[:, :100]
    x.copy_(rows_of_every_kind(5, 100, torch.bfloat16, 3))
    options = {"column_start": 2**32 - 70, "columns": 70, "residual": False, "domain": 2**32 - 1}
    assert_same_bits(project(BACKEND, x, **options), expected(x, **options))
    assert [name for name, *_ in gpu.launched] == [
        "quantise-bfloat16-16-run4-1024-any",
        "product-bfloat16-16-64x16-any",
    ]


@BY_BOTH_LAUNCHERS
def test_a_tile_with_more_shared_memory_than_is_usual(gpu, compiled_code):
    assert compiled_code[0].objects[LARGEST].shared_bytes > 49152
    x = rows_of_every_kind(65, 160, torch.bfloat16, 4)
    options = {"column_start": 32, "columns": 64}
    assert_same_bits(project(BACKEND, x, **options), expected(x, **options))
    assert gpu.launched[-1][0] == LARGEST
    assert gpu.count("cuKernelSetAttribute") == 1


@BY_BOTH_LAUNCHERS
def test_entries_and_inputs(gpu):
    window = (SEED, 2**32 - 1, 7, 40, 2**31 - 3, 130)
    assert_same_bits(product.entries(*window), reference.entries(*window))
    seeds = torch.tensor([[0], [-1]], dtype=torch.int32)
    normal = cuda_inputs.normal(seeds, 1001, torch.bfloat16)
    assert_same_bits(normal, inputs._plain_normal(seeds, 1001, torch.bfloat16))
    for start in (2**31 - 9, 2**32 - 9):
        assert_same_bits(cuda_inputs.hash32(seeds, start, 600), inputs._plain_hash32(seeds, start, 600))


def test_nothing_is_launched_for_nothing(idle):
    assert product.entries(SEED, 0, 0, 0, 0, 5).shape == (0, 5)
    assert cuda_inputs.normal(torch.zeros(0, 1, dtype=torch.int32), 5, torch.float32).shape == (0, 5)
    assert idle.calls.stand_in_launches() == 0


def test_rows_further_apart_than_32_bits_count_are_copied(idle, monkeypatch):
    monkeypatch.setattr(product, "_MAX_STRIDE", 99)
    product.project(torch.zeros(3, 100)[:, :32], SEED, requested(torch.zeros(3, 32)))
    product.project(torch.zeros(3, 99)[:, :32], SEED, requested(torch.zeros(3, 32)))
    assert [numbers["row_stride"] for numbers in idle.numbers] == [32, 32, 99, 99]


def test_more_columns_than_a_launch_counts(idle, monkeypatch):
    monkeypatch.setattr(product, "_MAX_COLUMNS", 32)
    x = torch.zeros(2, 64)
    assert product.project(x, SEED, requested(x, residual=False, columns=70)).shape == (2, 70)
    assert product.entries(SEED, 0, 0, 3, 0, 70).shape == (3, 70)
    assert idle.calls.stand_in_launches() == 3 * 2 + 3


# ---- the same as Triton's --------------------------------------------------------------------------------------------


@given(data=st.data())
def test_every_launch_has_its_code(data):
    capability = data.draw(st.sampled_from(forms.CAPABILITIES))
    names = {form.name for form in machine_code.all_forms(capability)}
    m, k = data.draw(st.integers(1, 400)), data.draw(st.sampled_from([1, 16, 1000, 1025, 4096, 8192, 8193, 65536]))
    columns, bits = data.draw(st.sampled_from([1, 16, 100, 8192, 8193])), data.draw(st.sampled_from([16, 8]))
    dtype = data.draw(st.sampled_from(sorted(forms.DTYPES)))
    aligned = columns % 16 == 0
    tile = forms.choose(capability, m, bits, aligned)
    cut = plan.plan(m, k, columns, bits, tile, data.draw(st.sampled_from([4, 132])), capability, 0)
    assert forms.product_name(dtype, bits, tile, cut.parts, aligned) in names
    assert forms.quantise_name(dtype, bits, tile.run, k, data.draw(st.booleans())) in names


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "columns"), [(1, 1024, 32), (70, 4096, 17), (300, 8320, 512)])
def test_forms_and_launches_are_those_of_tritons_launcher(idle, bits, dtype, m, k, columns):
    """Constants, options and grids by its own launcher; what is passed, by the order of the kernel's parameters."""
    x = torch.zeros(m, k, dtype=dtype)
    request = requested(x, columns=columns, column_start=16, activation_bits=bits, domain=2**32 - 1)
    tile = forms.choose((9, 0), m, bits, columns % 16 == 0)
    given = cuda_stand_in.triton_launches(x, SEED, request, tile)
    product.project(x, SEED, request)
    by_name = {form.name: form for form in machine_code.all_forms((9, 0))}
    for (name, _, grid, _), (kernel, triton_grid, arguments) in zip(idle.launched, given, strict=True):
        form = by_name[name]
        assert form.kernel == kernel
        assert grid[: len(triton_grid)] == triton_grid
        constants = {each: arguments[each] for each in form.constants}
        assert constants == form.constants
        options = arguments["num_warps"], arguments.get("num_stages", 3), arguments["enable_fp_fusion"]
        assert options == (form.warps, form.stages, False)
        numbers = {each: arguments[each] for each, kind in form.parameters.items() if kind == "i32"}
        assert idle.numbers.pop(0) == numbers


@pytest.mark.parametrize(
    ("case", "kernel", "name"),
    [
        (("Product", 90, "int8", 16, 64, 16, 3, "masked"), "product_kernel", "product-bfloat16-16-64x16-parts"),
        (("Sizes", 90, 16, 1, 1, 17, 17, "bfloat16", 1, 0), "product_kernel", "product-bfloat16-16-64x16-any"),
        (("Entries", 90, 0, 1, 0, 3), "entries_kernel", "entries"),
        (("Inputs", 90, "bfloat16", 100), "normal_kernel", "normal-bfloat16"),
        (("Inputs", 90, "int32", 100), "hash_kernel", "hash"),
    ],
)
def test_what_is_packaged_is_what_the_emulator_checks(compiled_code, case, kernel, name):
    """The same PTX comes out where tests of the emulator compile, as Triton's launches would."""
    assert cuda_stand_in.ptx_of_case(case, kernel) == compiled_code[1][name]


def test_another_compilation_makes_the_same_code(compiled_code, tmp_path):
    anew = cuda_stand_in.compiled_anew(tmp_path, ("hash", "entries"))
    assert anew.objects == {name: compiled_code[0].objects[name] for name in anew.objects}
    assert {**compiled_code[0].manifest, "kernels": anew.manifest["kernels"]} == anew.manifest


def test_two_files_of_the_same_code_are_the_same_bytes(compiled_code, tmp_path):
    made, _ = compiled_code
    for number in (1, 2):
        package.write(tmp_path / f"{number}", made.manifest, reversed(made.objects.values()))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


# ---- devices and contexts --------------------------------------------------------------------------------------------


def launched(kernel, device):
    kernel.launch(device, STREAM, 1, 1, *[0] * 20)


@BY_BOTH_LAUNCHERS
def test_a_thread_without_a_context_gets_that_of_the_device_for_as_long_as_a_launch_takes(idle, kernel):
    for device in (0, 1):
        kernel.prepare(device)
        launched(kernel, device)
    assert [device for _, device, *_ in idle.launched] == [0, 1]
    assert idle.calls.stand_in_depth() == 0
    assert idle.count("cuDevicePrimaryCtxRetain") == 2, "once for each device"
    assert idle.count("cuKernelSetAttribute") == 2


@BY_BOTH_LAUNCHERS
def test_a_context_of_the_device_is_left_as_it_is(idle, kernel):
    kernel.prepare(1)
    retained = idle.count("cuDevicePrimaryCtxRetain")
    idle.calls.stand_in_push(1)
    launched(kernel, 1)
    assert idle.calls.stand_in_depth() == 1
    assert idle.count("cuDevicePrimaryCtxRetain") == retained
    kernel.prepare(0)
    launched(kernel, 0)
    assert idle.calls.stand_in_depth() == 1
    assert [device for _, device, *_ in idle.launched] == [1, 0]


@BY_BOTH_LAUNCHERS
def test_a_device_that_is_none_is_the_drivers_error(kernel):
    with pytest.raises(RuntimeError, match=r"cuDeviceGet of device 2: unknown error \(101\)"):
        kernel.prepare(2)


# ---- warm up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8])
def test_nothing_is_loaded_after_warmup(idle, bits):
    product.warmup(CPU, 1024, dtype=torch.float16, activation_bits=bits)
    loaded = idle.count("cuLibraryLoadData")
    assert loaded == 2 + 2 * (4 + 2)
    memory = torch.zeros(300 * 1030, dtype=torch.float16)
    for m in (1, 16, 17, 64, 65, 300):
        for gap, columns in ((0, 1024), (6, 512), (0, 100), (3, 1)):
            x = memory.as_strided((m, 1024), (1024 + gap, 1))
            product.project(x, SEED, requested(x, columns=columns, activation_bits=bits))
    assert idle.count("cuLibraryLoadData") == loaded


def test_the_tiles_that_are_tried_are_all_that_have_code(idle, monkeypatch):
    tried = []
    monkeypatch.setattr(
        product.check, "wrong_tiles", lambda *arguments, **options: tried.append((arguments, options)) or ["a tile"]
    )
    assert product.wrong_tiles(CPU) == ["a tile"] * 2
    for (arguments, options), aligned in zip(tried, (True, False), strict=True):
        _, _, tiles_of, parts, arithmetic = arguments
        assert (tuple(parts), arithmetic) == (tiles.forms_of_k((9, 0)), "int8")
        assert [tiles_of(bits) for bits in (16, 8)] == [forms.tiles((9, 0), bits, aligned) for bits in (16, 8)]
        _, k, columns = options["sizes"]
        long_k = plan.LONGEST_BLOCK + options["beyond"]
        assert [number % 16 == 0 for number in (k, columns, long_k)] == [aligned] * 3
