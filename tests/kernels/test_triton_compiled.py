"""The projection's Triton kernels compiled for GPUs that need not be there: what their machine code holds."""

import functools
import inspect
import re

import numpy as np
import pytest

from poc_kernels import definition

triton = pytest.importorskip("triton")
from triton_compiled import CAPABILITIES, compile_for  # noqa: E402

from poc_kernels.kernels import triton as kernels  # noqa: E402
from poc_kernels.kernels import triton_configs, triton_device  # noqa: E402
from poc_kernels.kernels.triton_configs import Tile  # noqa: E402

_LONG = {"x": "*i16", "limbs": "*i8", "exponents": "*i32", "sums": "*i32"}
_POINTERS = {**_LONG, "totals": "*i32", "arrived": "*i32", "row_mask": "*i8", "y": "*i16", "seed": "*i64"}
_INTEGERS = ("rows", "padded_rows", "panels", "panels_per_split", "row_stride", "columns", "column_start", "domain")
_MATRIX = "IGMMA|IMMA|HGMMA|HMMA"

# Instructions of a warp for 64 columns and 128 k, all rows of the tile: a ceiling that only goes down.
_CEILING = {80: 780, 89: 780, 90: 460, 100: 900}


@functools.cache
def product(capability: int, bits: int, tile: Tile, split: bool, arithmetic: str):
    signature = {
        **_POINTERS,
        "limbs": "*fp16" if arithmetic == "fp16" else "*i8",
        "coefficient": "fp32",
        **dict.fromkeys((*_INTEGERS, "residual_columns", "masked_rows"), "i32"),
    }
    constants = {
        "DTYPE": 1,
        "BITS": bits,
        "RUN": tile.run,
        "COLUMNS": tile.columns,
        "ROWS": tile.rows,
        "WARPS": tile.warps,
        "SPLIT": split,
        "FP16": arithmetic == "fp16",
        "BYTE_PERM": True,
    }
    aligned = [name for name in _POINTERS if name not in ("arrived", "row_mask")]
    return compile_for(
        kernels.product_kernel,
        signature,
        constants,
        capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=[*aligned, "row_stride", "columns"],
        options={"enable_fp_fusion": False},
    )


def shared_limit(capability):
    return {80: 163, 89: 99, 90: 227, 100: 227}[capability] * 1024


@pytest.mark.parametrize("arithmetic", ["int8", "fp16"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_of_the_table_compiles_without_spills(capability, bits, arithmetic, record_property):
    for tile in triton_configs.tiles(divmod(capability, 10), bits, arithmetic):
        for split in (False, True) if tile.rows == 16 else (tile.rows <= 64,):
            compiled = product(capability, bits, tile, split, arithmetic)
            loop = compiled.loop_with(_MATRIX)
            line = (
                f"sm_{capability}, {bits} bits, {arithmetic}, {tile}, split {split}: {len(loop)} instructions of a warp"
                f" for {tile.columns} columns and 128 k, {compiled.registers} registers, {compiled.shared_bytes} bytes"
            )
            print(line)
            assert not loop.count("^(LDL|STL)"), line
            # Of what is finished after the loop; none on Hopper.
            assert compiled.spills <= (0 if capability in (90, 100) and arithmetic == "int8" else 192), line
            assert compiled.shared_bytes <= shared_limit(capability), line
            assert compiled.warps_per_multiprocessor() >= 8, line
            if arithmetic == "int8":
                assert compiled.count("IGMMA" if capability == 90 else "IMMA"), line
                warps_of_columns = tile.columns / (16 * tile.warps)
                assert len(loop) / warps_of_columns <= _CEILING[capability] * max(1, tile.rows / 128), line


@pytest.mark.parametrize("bits", [16, 8])
def test_on_hopper_entries_go_from_registers_to_the_matrix_unit(bits):
    """Entries of P never pass through shared memory, and nothing waits for it but the copies of x."""
    for tile in triton_configs.tiles((9, 0), bits, "int8"):
        loop = product(90, bits, tile, tile.rows <= 64, "int8").loop_with("IGMMA")
        multiplications = [each for each in loop if each.opcode.startswith("IGMMA")]
        assert multiplications
        for each in multiplications:
            left = each.operands.split(",")[1].strip()
            assert left.startswith("R"), each
        assert not loop.count("^(STS|STL)")


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_and_sums_are_not_fused(capability, bits):
    """But where the product is exact: some compilers fuse the 512 * top + rest of `rounded_sum`."""
    for tile in triton_configs.tiles(divmod(capability, 10), bits, "int8"):
        compiled = product(capability, bits, tile, tile.rows <= 64, "int8")
        fused = [each for each in compiled.code if each.opcode.startswith("FFMA") and ", 512," not in each.operands]
        assert not fused, [str(each) for each in fused]
        assert ".ftz" not in compiled.ptx, "subnormals are kept"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("one_block", [True, False])
def test_quantise_compiles_without_spills(capability, bits, one_block):
    signature = {**_LONG, "cleared": "*i32", **dict.fromkeys(("rows", "k", "padded_rows", "cleared_count"), "i32")}
    constants = {
        "DTYPE": 1,
        "BITS": bits,
        "RUN": 4,
        "BLOCK": 8192,
        "ONE_BLOCK": one_block,
        "CLEAR": 2048,
        "FP16": False,
    }
    compiled = compile_for(
        kernels.quantise_kernel,
        {**signature, "row_stride": "i32"},
        constants,
        capability,
        num_warps=8,
        aligned=[*_LONG, "cleared", "row_stride", "k"],
        options={"enable_fp_fusion": False},
    )
    assert compiled.spills == 0
    assert compiled.count(r"LDG\.E\.64"), "loads of four numbers"
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
    (a, b), (c, d) = re.findall(r"prmt\.b32 \$0, (0x\w+), (0x\w+), \$1;", source)
    (selector,) = re.findall(r"prmt\.b32 \$0, \$1, \$2, (0x\w+);", source)
    random = np.random.default_rng(0)
    for word in [0, 2**32 - 1, 0x88888888, 0x77777777, *map(int, random.integers(0, 2**32, 3000))]:
        indices = word & 0x77777777
        u = prmt(int(a, 16), int(b, 16), indices) + prmt(int(c, 16), int(d, 16), indices >> 16)
        v = u ^ prmt(word, word << 4 & 0xFFFFFFFF, int(selector, 16))
        for i in range(4):
            index_a, index_b = word >> 4 * i & 7, word >> (16 + 4 * i) & 7
            magnitude = definition.TABLE_A[index_a] + definition.TABLE_B[index_b]
            expected = magnitude ^ (255 * (word >> (4 * i + 3) & 1))
            assert v >> 8 * i & 255 == expected


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sign_selector_reaches_the_code(capability):
    tile = triton_configs.tiles(divmod(capability, 10), 16, "int8")[-1]
    ptx = product(capability, 16, tile, False, "int8").ptx
    signs = [line for line in ptx.splitlines() if "prmt" in line and re.search(r"0x9D8C|0x9d8c|40332", line)]
    assert signs


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_entries_compile_without_spills(capability):
    signature = {
        "seed": "*i64",
        "out": "*i16",
        **dict.fromkeys(("domain", "k_start", "k", "n_start", "columns"), "i32"),
    }
    constants = {"CALLS": 4, "COLUMNS": 128, "BYTE_PERM": True}
    compiled = compile_for(kernels.entries_kernel, signature, constants, capability)
    assert compiled.spills == 0
