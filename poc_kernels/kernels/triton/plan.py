"""How a product on a GPU is cut up, and the numbers that its kernels are given, whoever launches them.

Nothing here needs Triton.
"""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import torch

from ...definition import Request
from . import tiles as tile_table
from .tiles import Tile

PANEL = 128
"""k that are multiplied at a time (`device.PANEL`)."""
CLEAR = 2048
"""Words that a program of quantise_kernel clears."""
ENTRIES_CALLS, ENTRIES_COLUMNS = 4, 128
"""Calls of Philox, each of 16 k, and columns that a program of entries_kernel draws."""
LONGEST_BLOCK = 8192
"""Largest K whose rows are quantised in one block; longer rows are read twice."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The kernels' numbers of the dtypes of x."""


@functools.cache
def hardware(device: torch.device) -> tuple[tuple[int, int], int]:
    """Return compute capability (`tile_table.HIP` for AMD's) and number of SMs; a small GPU's if it is no GPU."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    capability = tile_table.HIP if torch.version.hip is not None else (properties.major, properties.minor)
    return capability, properties.multi_processor_count


def choose_arithmetic(capability: tuple[int, int], asked_for: str | None = None) -> str:
    """Return ``int8`` or ``fp16``: what is asked for, here or in the environment, or else the table's choice.

    Raises:
        ValueError: another one is asked for.
    """
    arithmetic = asked_for or os.environ.get("POC_KERNELS_TRITON_ARITHMETIC") or tile_table.arithmetic(capability)
    if arithmetic not in ("int8", "fp16"):
        raise ValueError(f"POC_KERNELS_TRITON_ARITHMETIC must be int8 or fp16, got {arithmetic}")
    return arithmetic


def signed_word(word: int) -> int:
    """Return the int32 value of the 32 bits of ``word``."""
    return word - 2**32 if word >= 2**31 else word


def float32_bits(value: float) -> int:
    """Return the bits of a positive float32, computed in integers: a subnormal is kept where the CPU flushes them."""
    unit = max(math.frexp(value)[1] - 24, -149)
    return ((unit + 149) << 23) + int(math.ldexp(value, -unit))


class Plan(NamedTuple):
    """How a product of activations [m, k] is cut up. Sizes of workspace are in elements."""

    tile: Tile
    panels: int
    """Of PANEL k."""
    planes: int
    """Limbs of an activation."""
    padded_rows: int
    """m, rounded up to whole tiles."""
    column_tiles: int
    tiles: int
    parts: int
    """Of K."""
    panels_per_part: int
    totals: int
    """Words of sums of the parts of K; 0 if K is whole."""
    cleared: int
    """The words of totals and of the counters behind them, one for each tile."""
    clearing: int
    """Programs of quantise_kernel that clear these words."""


@functools.lru_cache(maxsize=4096)
def plan(
    m: int, k: int, columns: int, activation_bits: int, tile: Tile, sms: int, capability: tuple[int, int], parts: int
) -> Plan:
    """Cut up a product of ``m`` rows by ``tile``; K into ``parts`` at most, or by the table if that is 0."""
    panels, planes = -(-k // PANEL), 2 if activation_bits == 16 else 1
    column_tiles, row_tiles = -(-columns // tile.columns), -(-m // tile.rows)
    tiles = column_tiles * row_tiles
    wanted = min(parts, panels) if parts else tile_table.splits(capability, tile, tiles, panels, sms)
    panels_per_part = -(-panels // wanted)
    parts = -(-panels // panels_per_part)
    totals = planes * column_tiles * m * tile.columns if parts > 1 else 0
    cleared = totals + tiles if parts > 1 else 0
    return Plan(
        tile=tile,
        panels=panels,
        planes=planes,
        padded_rows=row_tiles * tile.rows,
        column_tiles=column_tiles,
        tiles=tiles,
        parts=parts,
        panels_per_part=panels_per_part,
        totals=totals,
        cleared=cleared,
        clearing=-(-cleared // CLEAR),
    )


def block_of(k: int) -> tuple[int, int]:
    """Return how many k of a row quantise_kernel reads at a time, and with how many warps."""
    block = min(LONGEST_BLOCK, 1 << (max(k, PANEL) - 1).bit_length())
    return block, 8 if block >= 4096 else 4


QUANTISE_NUMBERS = ("rows", "k", "padded_rows", "tile_rows", "cleared_count", "row_stride", "masked_rows")
PRODUCT_NUMBERS = (
    *("coefficient", "rows", "padded_rows", "panels", "panels_per_split", "row_stride", "columns", "column_start"),
    *("domain", "residual_columns", "masked_rows"),
)
"""The parameters of the kernels after their pointers."""


def quantise_numbers(plan: Plan, m: int, k: int, row_stride: int, masked_rows: int) -> tuple[int, ...]:
    """Return what quantise_kernel is given after its pointers."""
    return m, k, plan.padded_rows, plan.tile.rows, plan.cleared, row_stride, masked_rows


def product_numbers(plan: Plan, m: int, row_stride: int, masked_rows: int, request: Request) -> tuple[int, ...]:
    """Return what product_kernel is given after its pointers."""
    return (
        float32_bits(request.coefficient),
        m,
        plan.padded_rows,
        plan.panels,
        plan.panels_per_part,
        row_stride,
        request.columns,
        signed_word(request.column_start),
        signed_word(request.domain),
        request.columns if request.residual else 0,
        masked_rows,
    )


def quantise_constants(dtype: int, bits: int, run: int, fp16: bool, k: int, aligned: bool) -> dict[str, int | bool]:
    """Return what is compiled into quantise_kernel for rows of k numbers, whose stride is a multiple of 16 or not."""
    block, _ = block_of(k)
    return {
        "DTYPE": dtype,
        "BITS": bits,
        "RUN": run,
        "BLOCK": block,
        "ONE_BLOCK": k <= block,
        "CLEAR": CLEAR,
        "FP16": fp16,
        "ALIGNED_ROWS": aligned,
    }


def product_constants(dtype: int, bits: int, tile: Tile, fp16: bool, parts: int) -> dict[str, int | bool]:
    """Return what is compiled into product_kernel, except how it looks entries up."""
    return {
        "DTYPE": dtype,
        "BITS": bits,
        "RUN": tile.run,
        "COLUMNS": tile.columns,
        "ROWS": tile.rows,
        "WARPS": tile.warps,
        "TURN": tile.turn,
        "JOINED": tile.joined,
        "SPLIT": parts > 1,
        "FP16": fp16,
    }


def entries_grid(k_start: int, k: int, n: int) -> tuple[int, int]:
    """Return the grid of entries_kernel."""
    return -(-n // ENTRIES_COLUMNS), -(-(k_start % 16 + k) // (16 * ENTRIES_CALLS))
