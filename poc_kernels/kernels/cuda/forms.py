"""The forms in which kernels are compiled ahead of time: one for everything that launches ask for, and no more.

Triton's own launches compile more of them: for each argument by itself, whether it is divisible by 16. Here either all
are taken to be, or none; code for none is right for all. Neither a seed, a domain, a mask nor a number of rows is in a
form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..triton import plan
from ..triton import tiles as tile_table
from ..triton.tiles import Tile

TRITON = "3.9.0"
"""The release of Triton that compiles them."""
RELEASE = tile_table.release_of(TRITON)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
"""Compute capabilities that are compiled for. Code for one of 9.0 and above runs on no other."""

SHORTEST_BLOCK = 1024
"""K that are quantised at a time at least."""
DTYPES = {0: "float32", 1: "bfloat16", 2: "float16"}
"""Names of the kernels' numbers of dtypes (`plan.DTYPE_CODES`)."""
_BITS = {0: "*i32", 1: "*i16", 2: "*i16"}
"""Triton's types of pointers to the bits of them."""

PRODUCT = "poc_kernels.kernels.triton.product"


class Form(NamedTuple):
    """One way in which a kernel is compiled."""

    name: str
    """Of the form, in a package."""
    module: str
    kernel: str
    parameters: dict[str, str]
    """The types of the parameters that are passed, by name: Triton's. Pointers are of memory that is aligned to 16."""
    constants: dict[str, int | bool]
    """The parameters that are compiled in."""
    unaligned: tuple[str, ...]
    """Pointers that need not be aligned."""
    divisible: tuple[str, ...]
    """Numbers that are divisible by 16."""
    grid: str
    """How many programs a launch has, in words."""
    warps: int = 4
    stages: int = 3


def block_of(k: int) -> tuple[int, int]:
    """Return how many k of a row are quantised at a time, and with how many warps."""
    return plan.block_of(max(k, SHORTEST_BLOCK))


def quantise_name(dtype: int, bits: int, run: int, k: int, aligned: bool) -> str:
    """Return the name of the form of quantise_kernel for rows of ``k`` numbers, all of them aligned or not."""
    block, _ = block_of(k)
    length = block if k <= block else "more"
    return f"quantise-{DTYPES[dtype]}-{bits}-run{run}-{length}{_suffix(aligned)}"


def product_name(dtype: int, bits: int, tile: Tile, parts: int, aligned: bool) -> str:
    """Return the name of the form of product_kernel by a tile, with K whole or in parts, for widths aligned or not."""
    shape = f"{tile.columns}x{tile.rows}"
    return f"product-{DTYPES[dtype]}-{bits}-{shape}{'-parts' if parts > 1 else ''}{_suffix(aligned)}"


def _suffix(aligned: bool) -> str:
    return "" if aligned else "-any"


def tiles(capability: tuple[int, int], bits: int, aligned: bool) -> tuple[Tile, ...]:
    """Return the tiles that have code, fewest rows first; of widths that are no multiples of 16 only the ends."""
    table = tile_table.tiles(capability, bits, tile_table.arithmetic(capability), RELEASE)
    return table if aligned else (table[0], table[-1])


def choose(capability: tuple[int, int], rows: int, bits: int, aligned: bool) -> Tile:
    """Return the smallest of the `tiles` that holds all rows, or else the largest."""
    return tile_table.choose_from(tiles(capability, bits, aligned), rows)


def projection_forms(capability: tuple[int, int]) -> Iterator[Form]:
    """Yield the forms of the projection's kernels for a compute capability."""
    fp16 = tile_table.arithmetic(capability) == "fp16"
    for dtype, bits, aligned in itertools.product(DTYPES, (16, 8), (True, False)):
        runs = {tile.run for tile in tiles(capability, bits, True)}
        lengths = (SHORTEST_BLOCK << i for i in range(4))
        for run, k in itertools.product(sorted(runs), (*lengths, plan.LONGEST_BLOCK + 1)):
            yield _quantise(dtype, bits, run, k, aligned, fp16)
        for tile, parts in itertools.product(tiles(capability, bits, aligned), tile_table.forms_of_k(capability)):
            yield _product(dtype, bits, tile, parts, aligned, fp16)
    yield Form(
        "entries",
        PRODUCT,
        "entries_kernel",
        {"seed": "*i64", "out": "*i16", **dict.fromkeys(("domain", "k_start", "k", "n_start", "columns"), "i32")},
        {"CALLS": plan.ENTRIES_CALLS, "COLUMNS": plan.ENTRIES_COLUMNS, "BYTE_PERM": True},
        unaligned=("seed",),
        divisible=(),
        grid=f"ceil(columns / {plan.ENTRIES_COLUMNS}) x ceil((k_start % 16 + k) / {16 * plan.ENTRIES_CALLS})",
    )


def _quantise(dtype: int, bits: int, run: int, k: int, aligned: bool, fp16: bool) -> Form:
    _, warps = block_of(k)
    return Form(
        quantise_name(dtype, bits, run, k, aligned),
        PRODUCT,
        "quantise_kernel",
        {
            "x": _BITS[dtype],
            "limbs": "*fp16" if fp16 else "*i8",
            **dict.fromkeys(("exponents", "sums", "cleared"), "*i32"),
            "row_mask": "*i8",
            **dict.fromkeys(plan.QUANTISE_NUMBERS, "i32"),
        },
        plan.quantise_constants(dtype, bits, run, fp16, max(k, SHORTEST_BLOCK), aligned),
        unaligned=("row_mask",) if aligned else ("row_mask", "x"),
        divisible=("k",) if aligned else (),
        grid=f"rows + ceil(cleared_count / {plan.CLEAR})",
        warps=warps,
    )


def _product(dtype: int, bits: int, tile: Tile, parts: int, aligned: bool, fp16: bool) -> Form:
    return Form(
        product_name(dtype, bits, tile, parts, aligned),
        PRODUCT,
        "product_kernel",
        {
            "x": _BITS[dtype],
            "limbs": "*fp16" if fp16 else "*i8",
            **dict.fromkeys(("exponents", "sums_of_q", "totals", "arrived"), "*i32"),
            "row_mask": "*i8",
            "y": _BITS[dtype],
            "seed": "*i64",
            **dict.fromkeys(plan.PRODUCT_NUMBERS, "i32"),
        },
        {**plan.product_constants(dtype, bits, tile, fp16, parts), "BYTE_PERM": True},
        unaligned=("x", "arrived", "row_mask", "seed"),
        divisible=("columns",) if aligned else (),
        grid=f"ceil(columns / {tile.columns}) * ceil(rows / {tile.rows}) x parts of K",
        warps=tile.warps,
        stages=tile.stages,
    )
