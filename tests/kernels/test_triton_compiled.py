"""The projection's Triton kernels compiled for GPUs that need not be there: what their machine code holds."""

import concurrent.futures
import functools
import inspect
import itertools
import re

import numpy as np
import pytest

from poc_kernels import definition

triton = pytest.importorskip("triton")
from triton_compiled import CAPABILITIES, Code, Instruction, compile_for, shared_bytes_on_amd
from wgmma_hazards import overwritten_operands, products_without_proxy_fence

from poc_kernels.kernels.triton import device as triton_device
from poc_kernels.kernels.triton import plan
from poc_kernels.kernels.triton import product as kernels
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile

# Types of the kernels' arguments; int32 unless said.
_TYPES = {
    **dict.fromkeys(("x", "y", "out"), "*i16"),
    **dict.fromkeys(("limbs", "row_mask"), "*i8"),
    **dict.fromkeys(("exponents", "sums", "sums_of_q", "totals", "cleared", "arrived"), "*i32"),
    "seed": "*i64",
}
_MULTIPLES_OF_16 = ("columns", "k")

# The kernels' number of a dtype of x, the type of its bits, and the load of four of its elements.
_DTYPES = {
    "float32": (0, "*i32", r"LDG\.E\.128"),
    "bfloat16": (1, "*i16", r"LDG\.E\.64"),
    "float16": (2, "*i16", r"LDG\.E\.64"),
}

_MATRIX = "IGMMA|IMMA|HGMMA|HMMA"

# Which code generator this Triton has; figures are of 3.6.0 and 3.9.0.
_TRITON = "before 3.7" if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else "since 3.7"

# Of the product's loop: instructions of a warp for its 16 columns, 128 k and all rows of the tile, by those rows.
# The most of it cut up along K or not, in steps of 5: ceilings that only go down.
_CEILINGS = {
    "before 3.7": {
        (80, 16, "int8"): {16: 400, 32: 480, 64: 585},
        (80, 8, "int8"): {16: 365, 32: 475, 64: 580, 128: 765},
        (80, 16, "fp16"): {16: 775, 32: 900, 64: 1125},
        (80, 8, "fp16"): {16: 710, 32: 925, 64: 1010},
        (89, 16, "int8"): {16: 390, 32: 460, 64: 580},
        (89, 8, "int8"): {16: 355, 32: 450, 64: 570, 128: 755},
        (89, 16, "fp16"): {16: 775, 32: 900, 64: 1130},
        (89, 8, "fp16"): {16: 710, 32: 925, 64: 1010},
        (90, 16, "int8"): {16: 390, 32: 380, 64: 390, 128: 415},
        (90, 8, "int8"): {16: 360, 32: 355, 64: 360, 256: 395},
        (90, 16, "fp16"): {16: 770, 32: 780, 64: 785},
        (90, 8, "fp16"): {16: 690, 32: 710, 64: 720},
        (100, 16, "int8"): {16: 390, 32: 455, 64: 575, 128: 820},
        (100, 8, "int8"): {16: 360, 32: 455, 64: 580, 256: 1145},
        (100, 16, "fp16"): {16: 720, 32: 710, 64: 705},
        (100, 8, "fp16"): {16: 630, 32: 640, 64: 640},
    },
    "since 3.7": {
        (80, 16, "int8"): {16: 340, 32: 375, 64: 415},
        (80, 8, "int8"): {16: 320, 32: 410, 64: 495, 128: 665},
        (80, 16, "fp16"): {16: 780, 32: 840, 64: 935},
        (80, 8, "fp16"): {16: 745, 32: 1035, 64: 1045},
        (89, 16, "int8"): {16: 325, 32: 355, 64: 415},
        (89, 8, "int8"): {16: 310, 32: 400, 64: 490, 128: 660},
        (89, 16, "fp16"): {16: 755, 32: 815, 64: 900},
        (89, 8, "fp16"): {16: 725, 32: 975, 64: 985},
        (90, 16, "int8"): {16: 330, 32: 335, 64: 345, 128: 375},
        (90, 8, "int8"): {16: 325, 32: 330, 64: 340, 256: 380},
        (90, 16, "fp16"): {16: 770, 32: 785, 64: 800},
        (90, 8, "fp16"): {16: 695, 32: 705, 64: 695},
        (100, 16, "int8"): {16: 365, 32: 370, 64: 380, 128: 385},
        (100, 8, "int8"): {16: 365, 32: 365, 64: 370, 256: 385},
        (100, 16, "fp16"): {16: 595, 32: 610, 64: 610},
        (100, 8, "fp16"): {16: 530, 32: 630, 64: 630},
    },
}[_TRITON]

# Bytes of each thread's registers that are spilled: in float16 products of 64 rows of 16 bits, sums that wait for the
# next flush, 1024 k later; outside of the loop if the width is a multiple of 16. Ceilings that only go down; no other
# tile may spill.
_SPILLED = {
    "before 3.7": {},
    "since 3.7": {
        (80, 16, "fp16"): {64: 88},
        (89, 16, "fp16"): {64: 88},
        (90, 16, "fp16"): {64: 120},
    },
}[_TRITON]
_SPILLED_UNALIGNED = {"before 3.7": {}, "since 3.7": {80: 64, 89: 104, 90: 128}}[_TRITON]
"""The same by compute capability, where the width is no multiple of 16."""


def arguments_of(kernel, constants, types, multiples=_MULTIPLES_OF_16):
    """Signature of a kernel, and what of it is aligned, as it is called for sizes that are multiples of 16."""
    types = {**_TYPES, **types}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return signature, [name for name, kind in signature.items() if kind.startswith("*") or name in multiples]


def compiled_for(kernel, constants, capability, types, multiples=_MULTIPLES_OF_16, **options):
    """`compile_for` of a kernel as it is called for sizes that are multiples of 16."""
    signature, aligned = arguments_of(kernel, constants, types, multiples)
    return compile_for(kernel, signature, constants, capability, aligned=aligned, **options)


def product_form(bits, tile, split, arithmetic, dtype="bfloat16", byte_perm=True):
    """Constants and types of a product."""
    number, pointer, _ = _DTYPES[dtype]
    compiled_in = plan.product_constants(number, bits, tile, arithmetic == "fp16", 2 if split else 1)
    constants = {**compiled_in, "BYTE_PERM": byte_perm}
    return constants, {"x": pointer, "y": pointer, "limbs": "*fp16" if arithmetic == "fp16" else "*i8"}


@functools.cache
def product(
    capability: int,
    bits: int,
    tile: Tile,
    split: bool,
    arithmetic: str,
    dtype: str = "bfloat16",
    multiples: tuple[str, ...] = _MULTIPLES_OF_16,
):
    constants, types = product_form(bits, tile, split, arithmetic, dtype)
    return compiled_for(
        kernels.product_kernel,
        constants,
        capability,
        types,
        multiples,
        num_warps=tile.warps,
        num_stages=tile.stages,
        options={"enable_fp_fusion": False},
    )


def tiles(capability, bits, arithmetic="int8"):
    return tile_table.tiles(divmod(capability, 10), bits, arithmetic)


def shared_limit(capability):
    return {80: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}[capability] * 1024


@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_of_the_table_keeps_to_its_limits(capability, bits, arithmetic, record_property):
    """No spills in the loop, few outside, the instructions it may have, and room for the warps it needs."""
    key, parts = (capability, bits, arithmetic), []
    cases = list(itertools.product(tiles(*key), (False, True)))
    with concurrent.futures.ThreadPoolExecutor() as threads:  # each waits for a process that compiles
        all_compiled = list(threads.map(lambda case: product(capability, bits, case[0], case[1], arithmetic), cases))
    for (tile, split), compiled in zip(cases, all_compiled, strict=True):
        loop = compiled.loop_with(_MATRIX)
        what = f"sm_{capability}, {bits} bits, {arithmetic}, {tile}, split {split}, {compiled.registers} registers"
        assert tile.columns == 16 * tile.warps, what
        assert not loop.count(r"\b(LDL|STL)"), what
        assert compiled.spills <= _SPILLED.get(key, {}).get(tile.rows, 0), what
        assert compiled.shared_bytes <= shared_limit(capability), what
        assert compiled.warps_per_sm() >= max(8, tile.blocks * tile.warps), what
        assert len(loop) / tile.turn <= _CEILINGS[key][tile.rows], what
        if arithmetic == "int8":
            assert compiled.count("IGMMA" if capability == 90 else "IMMA"), what
        spilled = f" ({compiled.spills} bytes spilled outside)" if compiled.spills else ""
        parts.append(f"{tile.rows}{' in parts' if split else ''}: {len(loop) / tile.turn:g}{spilled}")
    of_what = "instructions of a warp for 128 k by rows of the tile"
    record_property("summary", f"sm_{capability}, {bits} bits, {arithmetic}, {of_what}: {', '.join(parts)}")


@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
def test_every_tile_of_amd_s_table_fits_the_shared_memory_of_gfx942(bits, arithmetic):
    for tile in tile_table.tiles(tile_table.HIP, bits, arithmetic):
        constants, types = product_form(bits, tile, False, arithmetic, byte_perm=False)
        signature, aligned = arguments_of(kernels.product_kernel, constants, types)
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        shared = shared_bytes_on_amd(kernels.product_kernel, signature, constants, "gfx942", aligned=aligned, **options)
        assert 0 < shared <= 65536, tile


@pytest.mark.parametrize("bits", [16, 8])
def test_on_hopper_entries_go_from_registers_to_the_matrix_unit(bits):
    """Entries of P never pass through shared memory, and nothing waits for it but the copies of x."""
    for tile in tiles(90, bits):
        loop = product(90, bits, tile, tile.rows <= 64, "int8").loop_with("IGMMA")
        multiplications = [each for each in loop if each.opcode.startswith("IGMMA")]
        assert multiplications
        for each in multiplications:
            left = each.operands.split(",")[1].strip()
            assert left.startswith("R"), each
        assert not loop.count(r"\b(STS|STL)")


@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
def test_on_hopper_products_are_fenced_and_nothing_writes_what_they_read(bits, arithmetic):
    if tile_table.unsafe((9, 0)):
        pytest.skip(tile_table.unsafe((9, 0)))
    for tile, split in itertools.product(tiles(90, bits, arithmetic), (False, True)):
        code = product(90, bits, tile, split, arithmetic).code
        assert code.count("GMMA")
        assert overwritten_operands(code) == (code.count("GMMA"), []), tile
        assert products_without_proxy_fence(code) == [], tile


def without(code, pattern):
    """``code`` with instructions that do nothing in place of those that match: branches may lead there."""
    return Code(tuple(Instruction(each.address, "NOP", "") if re.search(pattern, str(each)) else each for each in code))


def test_missing_fences_and_waits_are_found_in_machine_code():
    """In a float16 product several wgmma are under way while registers of the next ones are filled."""
    if tile_table.unsafe((9, 0)):
        pytest.skip(tile_table.unsafe((9, 0)))
    for bits, arithmetic in ((16, "int8"), (16, "fp16")):
        code = product(90, bits, tiles(90, bits, arithmetic)[0], False, arithmetic).code
        assert products_without_proxy_fence(without(code, "FENCE.VIEW"))
        assert overwritten_operands(without(code, "WARPGROUP.DEPBAR")).wrong


def hidden_instructions(loop):
    """Instructions between the first wgmma of a group and the wait for it, of all groups of a loop."""
    began, count = None, 0
    for at, each in enumerate(loop):
        if "GMMA" in each.opcode and began is None:
            began = at
        if each.opcode.startswith("WARPGROUP.DEPBAR") and began is not None:
            count, began = count + at - began, None
    return count


@pytest.mark.skipif(_TRITON == "before 3.7", reason="the model counts what ships")
def test_the_model_of_time_counts_this_machine_code():
    from bench.projection import model

    for (bits, columns, rows), counts in model.COUNTS.items():
        (tile,) = [tile for tile in tiles(90, bits) if (tile.columns, tile.rows) == (columns, rows)]
        loop = product(90, bits, tile, rows <= 64, "int8").loop_with("IGMMA")
        assert len(loop) / tile.turn == pytest.approx(counts.instructions, rel=0.03), tile
        assert hidden_instructions(loop) / tile.turn == pytest.approx(counts.hidden, rel=0.1, abs=5), tile


def assert_not_fused(compiled):
    """But where the product is exact: some compilers fuse the 512 * top + rest of `rounded_sum`."""
    fused = [each for each in compiled.code if each.opcode.startswith("FFMA") and ", 512," not in each.operands]
    assert not fused, [str(each) for each in fused]
    assert ".ftz" not in compiled.ptx, "subnormals are kept"


@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_and_sums_are_not_fused(capability, bits, arithmetic):
    for tile, split in itertools.product(tiles(capability, bits, arithmetic), (False, True)):
        assert_not_fused(product(capability, bits, tile, split, arithmetic))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_of_other_dtypes_are_not_fused_and_do_not_spill(capability, dtype):
    for split in (False, True):
        compiled = product(capability, 16, tiles(capability, 16)[0], split, "int8", dtype)
        assert compiled.spills == 0
        assert_not_fused(compiled)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_largest_tile_of_every_dtype_and_of_widths_that_are_no_multiples_of_16_does_not_spill(capability, dtype):
    for bits, (split, multiples) in itertools.product((16, 8), ((False, _MULTIPLES_OF_16), (True, ()))):
        compiled = product(capability, bits, tiles(capability, bits)[-1], split, "int8", dtype, multiples)
        assert compiled.spills == 0
        assert not compiled.count(r"\b(LDL|STL)")
        assert_not_fused(compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_float16_products_spill_where_the_width_is_no_multiple_of_16(capability):
    tile = tiles(capability, 16, "fp16")[-1]
    for split in (False, True):
        compiled = product(capability, 16, tile, split, "fp16", multiples=())
        assert compiled.spills <= _SPILLED_UNALIGNED.get(capability, 0)


@pytest.mark.parametrize(("capability", "arithmetic"), [(103, "fp16"), (120, "int8")])
def test_every_tile_of_newer_cards_compiles_without_spills(capability, arithmetic):
    """B300, by the rule of the table in float16, and RTX 50."""
    if capability == 103 and _TRITON == "before 3.7":
        pytest.skip("this Triton's cuobjdump does not know sm_103")
    assert tile_table.arithmetic(divmod(capability, 10)) == arithmetic
    forms = [(bits, tile) for bits in (16, 8) for tile in tiles(capability, bits, arithmetic)]
    cases = [(capability, *form, split, arithmetic) for form, split in itertools.product(forms, (False, True))]
    with concurrent.futures.ThreadPoolExecutor() as threads:  # each waits for a process that compiles
        all_compiled = list(threads.map(lambda case: product(*case), cases))
    for case, compiled in zip(cases, all_compiled, strict=True):
        assert compiled.spills == 0, case
        assert compiled.shared_bytes <= shared_limit(capability), case
        assert compiled.count("MMA"), case
        assert_not_fused(compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("dtype", "arithmetic", "one_block"),
    [
        ("bfloat16", "int8", True),
        ("bfloat16", "int8", False),
        ("bfloat16", "fp16", False),
        ("float32", "int8", False),
        ("float16", "int8", False),
    ],
)
def test_quantise_compiles_without_spills(capability, bits, dtype, arithmetic, one_block):
    number, pointer, load = _DTYPES[dtype]
    constants = {
        "DTYPE": number,
        "BITS": bits,
        "RUN": 4,
        "BLOCK": 8192,
        "ONE_BLOCK": one_block,
        "CLEAR": 2048,
        "FP16": arithmetic == "fp16",
        "ALIGNED_ROWS": True,
    }
    compiled = compiled_for(
        kernels.quantise_kernel,
        constants,
        capability,
        {"x": pointer, "limbs": "*fp16" if arithmetic == "fp16" else "*i8"},
        num_warps=8,
        options={"enable_fp_fusion": False},
    )
    assert compiled.spills == 0
    assert compiled.count(load), "loads of four numbers"
    # x * 2**n + 1.5 * 2**23 is exact either way; the assembler of 3.6 for sm_100 fuses it all the same.
    assert capability == 100 or not compiled.count("FFMA")


def prmt(low, high, selector):
    """What PTX says of prmt.b32: bits 0 to 2 of a selector's nibble choose a byte, bit 3 takes its sign only."""
    source = (high << 32) | low
    result = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (source >> (8 * (nibble & 7))) & 255
        result |= ((255 if byte >= 128 else 0) if nibble & 8 else byte) << (8 * i)
    return result


def test_byte_permutes_give_the_entries_of_the_definition():
    """The constants of `half_entries`, as its code for NVIDIA uses them, on words of every kind."""
    source = inspect.getsource(triton_device.half_entries.fn) + inspect.getsource(triton_device._signs.fn)
    b, d = re.findall(r"prmt\.b32 \$0, \$2, (0x\w+), \$1;", source)
    low_a, low_b = triton_device._TABLE_A_LOW.value, triton_device._TABLE_B_LOW.value
    (selector,) = re.findall(r"prmt\.b32 \$0, \$1, \$2, (0x\w+);", source)
    random = np.random.default_rng(0)
    for word in [0, 2**32 - 1, 0x88888888, 0x77777777, *map(int, random.integers(0, 2**32, 3000))]:
        indices = word & 0x77777777
        u = prmt(low_a, int(b, 16), indices) + prmt(low_b, int(d, 16), indices >> 16)
        v = u ^ prmt(word, word << 4 & 0xFFFFFFFF, int(selector, 16))
        for i in range(4):
            index_a, index_b = word >> 4 * i & 7, word >> (16 + 4 * i) & 7
            magnitude = definition.TABLE_A[index_a] + definition.TABLE_B[index_b]
            expected = magnitude ^ (255 * (word >> (4 * i + 3) & 1))
            assert v >> 8 * i & 255 == expected


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sign_selector_reaches_the_code(capability):
    tile = tiles(capability, 16)[-1]
    ptx = product(capability, 16, tile, False, "int8").ptx
    signs = [line for line in ptx.splitlines() if "prmt" in line and re.search(r"0x9D8C|0x9d8c|40332", line)]
    assert signs


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_entries_compile_without_spills(capability):
    constants = {"CALLS": 4, "COLUMNS": 128, "BYTE_PERM": True}
    assert compiled_for(kernels.entries_kernel, constants, capability, {}).spills == 0
