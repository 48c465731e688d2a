# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803  (constants of a kernel are written in capitals)
"""The Triton kernels behind the backend signature: the projection on GPUs, with the bits of every other backend.

Two launches. `quantise_kernel` reads x once or twice and writes its integers as int8 limbs in panels of 128 k, with E
and sum(q) of each row. `product_kernel` draws a tile of P in registers, 16 entries per Philox call, multiplies it with
the limbs on the matrix units (y^T = P^T x^T: the tile of P is the left operand, which may stay in registers), and
finishes: sums, residual, mask, rounding. Where there are few tiles for the SMs, K is cut up as well: parts add into
int32 totals by atomics, and the last part to arrive at a tile finishes it.

A kernel is compiled at its first call for a dtype, activation_bits, tile, with or without parts of K, and for whether
columns, and the address and row stride of x, are divisible by 16 (`warmup` has all of these compiled); never for a
seed, its address, a domain or the start of a shard. It runs on the current stream, waits for nothing, and allocates its
result and its workspace through torch, so that it may be captured.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import definition
from ...definition import Request
from . import check
from . import device as on_tile
from . import tiles as tile_table
from .device import NOT_FINITE, PANEL
from .plan import (
    DTYPE_CODES,
    ENTRIES_CALLS,
    ENTRIES_COLUMNS,
    block_of,
    choose_arithmetic,
    entries_grid,
    hardware,
    product_constants,
    product_numbers,
    quantise_constants,
    quantise_numbers,
    signed_word,
)
from .plan import plan as make_plan
from .tiles import Tile

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _magnitudes(bits, DTYPE: tl.constexpr):
    return on_tile.widen(bits, DTYPE).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _limb(byte, FP16: tl.constexpr):
    return on_tile.fp16_of(byte) if FP16 else byte.to(tl.int8)


@triton.jit(
    do_not_specialize=["row_mask", "rows", "padded_rows", "tile_rows", "cleared_count", "row_stride", "masked_rows"]
)
def quantise_kernel(
    x,  # [rows, k] bits of activations, rows row_stride apart
    limbs,  # [panels, padded_rows / tile_rows, limb, tile_rows, PANEL] int8, or float16: q in bytes, high first
    exponents,  # [rows] int32: E, or NOT_FINITE
    sums,  # [rows] int32: sum(q)
    cleared,  # [cleared_count] int32, set to zero for the product that follows
    row_mask,  # [masked_rows] int8; masked_rows is 0 without a mask
    rows,
    k,
    padded_rows,
    tile_rows,
    cleared_count,
    row_stride,
    masked_rows,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    CLEAR: tl.constexpr,
    FP16: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr,  # row_stride is a multiple of 16
):
    """Quantise a row per program, except rows that are masked off; programs after these clear CLEAR words each."""
    row = tl.program_id(0)
    if row >= rows:
        words = (row - rows).to(tl.int64) * CLEAR + tl.arange(0, CLEAR)
        tl.store(cleared + words, tl.zeros([CLEAR], tl.int32), mask=words < cleared_count)
    elif on_tile.wanted_rows(row_mask, row, masked_rows):
        first = row.to(tl.int64) * row_stride
        x += tl.multiple_of(first, 16) if ALIGNED_ROWS else first
        two_limbs: tl.constexpr = BITS == 16
        limb = tile_rows * PANEL  # from one limb of a row to the other
        tile = (row // tile_rows).to(tl.int64) * limb
        limbs += (2 * tile if two_limbs else tile) + row % tile_rows * PANEL
        panel_limbs = padded_rows.to(tl.int64) * (2 * PANEL if two_limbs else PANEL)
        quads = tl.arange(0, BLOCK // 4)
        bytes4 = tl.arange(0, 4)[None, :]
        offsets = quads[:, None] * 4 + bytes4
        positions = on_tile.position_of_quad(quads, RUN)[:, None] * 4 + bytes4

        bits = tl.load(x + offsets, mask=offsets < k, other=0)
        magnitudes = _magnitudes(bits, DTYPE)
        if not ONE_BLOCK:
            for start in range(BLOCK, k, BLOCK):
                at = start + offsets
                magnitudes = tl.maximum(magnitudes, _magnitudes(tl.load(x + at, mask=at < k, other=0), DTYPE))
        exponent = on_tile.row_exponent(tl.max(tl.max(magnitudes, axis=1), axis=0))
        finite = exponent != NOT_FINITE
        shift: tl.constexpr = 13 if BITS == 16 else 6
        scale = on_tile.power_of_two(tl.where(finite, shift - exponent, 0))

        total = tl.zeros([BLOCK // 4, 4], tl.int32)
        for start in range(0, (k + PANEL - 1) // PANEL * PANEL, BLOCK):
            at = start + offsets
            if not ONE_BLOCK:
                bits = tl.load(x + at, mask=at < k, other=0)
            value = tl.where(finite, on_tile.widen(bits, DTYPE), 0.0)
            q = on_tile.round_activation(value, scale)
            position = start + positions
            panel = (position // PANEL).to(tl.int64)
            inside = position < (k + PANEL - 1) // PANEL * PANEL
            out = limbs + panel * panel_limbs + position % PANEL
            if two_limbs:
                high = (q + 128) >> 8
                tl.store(out, _limb(high, FP16), mask=inside)
                tl.store(out + limb, _limb(q - 256 * high, FP16), mask=inside)
            else:
                q = tl.minimum(tl.maximum(q, -127), 127)
                tl.store(out, _limb(q, FP16), mask=inside)
            total += q
        tl.store(exponents + row, exponent)
        tl.store(sums + row, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def _tile(panel, where, COLUMNS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr, BYTE_PERM: tl.constexpr):
    v0, v1, v2, v3 = on_tile.entry_words(panel, where, COLUMNS, WARPS, BYTE_PERM)
    return on_tile.tile_of_words(v0, v1, v2, v3, COLUMNS, WARPS, RUN)


@triton.jit
def _accumulate(high, low, limbs, offsets, v, SECOND: tl.constexpr, OUT: tl.constexpr):
    """Add v times the limbs of one panel to sums [COLUMNS, rows of offsets].

    With SECOND, ``high`` takes the product with the limbs of offsets, and ``low`` that with those SECOND elements on;
    without it ``low`` takes the one product.
    """
    if SECOND:
        low = tl.dot(v, tl.load(limbs + (offsets + SECOND)), low, out_dtype=OUT)
        high = tl.dot(v, tl.load(limbs + offsets), high, out_dtype=OUT)
    else:
        low = tl.dot(v, tl.load(limbs + offsets), low, out_dtype=OUT)
    return high, low


@triton.jit(
    do_not_specialize=[
        *("x", "arrived", "row_mask", "seed", "coefficient", "rows", "padded_rows", "panels", "panels_per_split"),
        *("row_stride", "column_start", "domain", "residual_columns", "masked_rows"),
    ]
)
def product_kernel(
    x,  # [rows, K] bits of activations, rows row_stride apart
    limbs,  # what quantise_kernel left
    exponents,
    sums_of_q,
    totals,  # [limb, column_tiles, rows, COLUMNS] int32, zero before: sums of the parts of K
    arrived,  # [tiles] int32, zero before: parts that have been added
    row_mask,  # [masked_rows] int8; masked_rows is 0 without a mask
    y,  # [rows, columns] bits of results
    seed,  # [1] int64
    coefficient,  # a float32 as the int32 of its bits: the launcher's own conversion may drop subnormals
    rows,
    padded_rows,
    panels,
    panels_per_split,
    row_stride,
    columns,
    column_start,  # the last two as the int32 of their 32 bits
    domain,
    residual_columns,  # columns to add x to: all or 0
    masked_rows,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    TURN: tl.constexpr,
    JOINED: tl.constexpr,
    SPLIT: tl.constexpr,
    FP16: tl.constexpr,
    BYTE_PERM: tl.constexpr,
):
    """Compute a tile, or a part of K of it, per program; neighbours share the limbs."""
    two_limbs: tl.constexpr = BITS == 16
    column_tiles = on_tile.tiles_of(columns, COLUMNS)
    tile = tl.program_id(0)
    first_column = (tile % column_tiles) * COLUMNS
    first_row = (tile // column_tiles) * ROWS
    row = first_row + tl.arange(0, ROWS)
    in_rows = row < rows
    any_wanted = tl.max((in_rows & on_tile.wanted_rows(row_mask, row, masked_rows)).to(tl.int32), axis=0)

    first = tl.program_id(1) * panels_per_split
    last = tl.minimum(first + panels_per_split, panels) * any_wanted
    where = (column_start + first_column, domain, tl.load(seed), on_tile.table_lows(BYTE_PERM))
    limb_count: tl.constexpr = 2 if two_limbs else 1
    second: tl.constexpr = ROWS * PANEL if two_limbs and not JOINED else 0  # from the high limbs to the low ones
    width: tl.constexpr = ROWS if second else limb_count * ROWS
    offsets = tl.arange(0, PANEL)[:, None] + tl.arange(0, width)[None, :] * PANEL
    panel_limbs = padded_rows.to(tl.int64) * (limb_count * PANEL)
    limbs += first.to(tl.int64) * panel_limbs + (tile // column_tiles).to(tl.int64) * (limb_count * ROWS * PANEL)
    high = tl.zeros([COLUMNS, width], tl.int32)
    low = tl.zeros([COLUMNS, width], tl.int32)
    if FP16:  # sums of 1024 products of bytes stay below 2**24, so they are exact
        for flush in range(first, last, 1024 // PANEL):
            high_part = tl.zeros([COLUMNS, width], tl.float32)
            low_part = tl.zeros([COLUMNS, width], tl.float32)
            for panel in range(flush, tl.minimum(flush + 1024 // PANEL, last)):
                v = on_tile.fp16_of(_tile(panel, where, COLUMNS, WARPS, RUN, BYTE_PERM))
                high_part, low_part = _accumulate(high_part, low_part, limbs, offsets, v, second, tl.float32)
                limbs += panel_limbs
            low += low_part.to(tl.int32)
            high += high_part.to(tl.int32)
    elif TURN == 2:
        # The next panel is drawn while the matrix unit works on this one. With one panel per turn it would not: Triton
        # waits for a product at the end of a turn.
        v0, v1, v2, v3 = on_tile.entry_words(first, where, COLUMNS, WARPS, BYTE_PERM)
        turns = tl.maximum(last - first, 0) // 2
        for panel in range(first, first + 2 * turns, 2):
            v = on_tile.tile_of_words(v0, v1, v2, v3, COLUMNS, WARPS, RUN)
            v0, v1, v2, v3 = on_tile.entry_words(panel + 1, where, COLUMNS, WARPS, BYTE_PERM)
            high, low = _accumulate(high, low, limbs, offsets, v, second, tl.int32)
            limbs += panel_limbs
            v = on_tile.tile_of_words(v0, v1, v2, v3, COLUMNS, WARPS, RUN)
            v0, v1, v2, v3 = on_tile.entry_words(panel + 2, where, COLUMNS, WARPS, BYTE_PERM)
            high, low = _accumulate(high, low, limbs, offsets, v, second, tl.int32)
            limbs += panel_limbs
        if first + 2 * turns < last:
            v = on_tile.tile_of_words(v0, v1, v2, v3, COLUMNS, WARPS, RUN)
            high, low = _accumulate(high, low, limbs, offsets, v, second, tl.int32)
    else:
        for panel in range(first, last):
            v = _tile(panel, where, COLUMNS, WARPS, RUN, BYTE_PERM)
            high, low = _accumulate(high, low, limbs, offsets, v, second, tl.int32)
            limbs += panel_limbs
    if width > ROWS:
        high, low = on_tile.halves(low, COLUMNS, width)

    operands = (x, exponents, sums_of_q, row_mask, y, coefficient.to(tl.float32, bitcast=True))
    extent = (rows, row_stride, columns, column_start, residual_columns, masked_rows)
    if SPLIT:
        totals += ((tile % column_tiles).to(tl.int64) * rows + first_row) * COLUMNS
        high_totals = totals + column_tiles.to(tl.int64) * rows * COLUMNS
        rows_left = rows - first_row
        added_rows = rows_left * any_wanted  # none of a tile that is only copied
        on_tile.add_tile(totals, high_totals, high, low, added_rows, two_limbs, COLUMNS, ROWS)
        tl.debug_barrier()  # every thread has added before one counts this part as arrived
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            part: tl.constexpr = min(ROWS, 32) if FP16 or ROWS <= 32 else 16  # with which the loop compiles best
            for start in range(0, ROWS, part):
                low_sum = on_tile.added_sums(totals + start * COLUMNS, rows_left - start, COLUMNS, part)
                high_sum = low_sum
                if two_limbs:
                    high_sum = on_tile.added_sums(high_totals + start * COLUMNS, rows_left - start, COLUMNS, part)
                part_row = first_row + start
                on_tile.finish_tile(
                    operands, extent, high_sum, low_sum, part_row, first_column, DTYPE, BITS, COLUMNS, part
                )
    else:
        on_tile.finish_tile(operands, extent, high, low, first_row, first_column, DTYPE, BITS, COLUMNS, ROWS)


@triton.jit(do_not_specialize=["seed", "domain", "k_start", "k", "n_start"])
def entries_kernel(
    seed, out, domain, k_start, k, n_start, columns, CALLS: tl.constexpr, COLUMNS: tl.constexpr, BYTE_PERM: tl.constexpr
):
    """Write out [k, columns] int16: each program draws CALLS * 16 rows of COLUMNS columns."""
    calls = k_start // 16 + tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    n = (n_start + column).to(tl.uint32)
    words = on_tile.philox(calls.to(tl.uint32)[:, None], n[None, :], domain, tl.load(seed))
    first = calls * 16 - k_start
    lows = on_tile.table_lows(BYTE_PERM)
    for w in tl.static_range(4):
        v = on_tile.half_entries(words[w], lows, BYTE_PERM)
        for i in tl.static_range(4):
            row = first + 4 * w + i
            e = 2 * (v << (24 - 8 * i) >> 24) + 1
            inside = ((row >= 0) & (row < k))[:, None] & (column < columns)[None, :]
            tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], e.to(tl.int16), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------

_BITS_DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
INTERPRETED = not isinstance(product_kernel, triton.runtime.JITFunction)
_BYTE_PERM = not INTERPRETED and torch.version.cuda is not None


# ---- public functions ------------------------------------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    """Return why these kernels cannot run on a device, or None if they can.

    Raises:
        ValueError: POC_KERNELS_TRITON_ARITHMETIC names no arithmetic.
    """
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return "runs on GPUs only"
    capability, _ = hardware(device)
    if capability != tile_table.HIP and capability < (8, 0):
        return "needs compute capability 8.0"
    choose_arithmetic(capability)
    return None if INTERPRETED else tile_table.unsafe(capability)


def project(
    x: Tensor,
    seed: Tensor,
    request: Request,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    arithmetic: str | None = None,
) -> Tensor:
    """Compute x @ P, or x + x @ P, for ``x`` [M, K] on a GPU: [M, columns] in the dtype of x.

    ``tile``, ``splits`` (parts of K) and ``arithmetic`` (``int8`` or ``fp16``, also POC_KERNELS_TRITON_ARITHMETIC) are
    the table's unless given; none changes a bit. Workspace: 2 bytes per element of x at 16 activation bits and 1 at 8,
    rows and K rounded up to tiles; twice that in fp16; 8 bytes per row; and with splits, 8 or 4 bytes per element of y,
    columns rounded up to tiles, and 4 per tile.
    """
    columns, activation_bits, row_mask = request.columns, request.activation_bits, request.row_mask
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    m, k = x.shape
    capability, sms = hardware(x.device)
    arithmetic = choose_arithmetic(capability, arithmetic)
    tile = tile or tile_table.choose(capability, m, activation_bits, arithmetic)
    plan = make_plan(m, k, columns, activation_bits, tile, sms, capability, splits or 0)

    code, bits_dtype, fp16 = DTYPE_CODES[x.dtype], _BITS_DTYPES[x.dtype], arithmetic == "fp16"
    y = torch.empty(m, columns, dtype=x.dtype, device=x.device)
    limb_dtype = torch.float16 if fp16 else torch.int8
    limbs = torch.empty(plan.panels, plan.planes * plan.padded_rows, PANEL.value, dtype=limb_dtype, device=x.device)
    # Both aligned, whatever m.
    exponents, sums = torch.empty(2, plan.padded_rows, dtype=torch.int32, device=x.device)
    totals = torch.empty(plan.cleared, dtype=torch.int32, device=x.device)
    masked_rows = 0 if row_mask is None else m
    mask = limbs.view(torch.int8) if row_mask is None else row_mask.contiguous().view(torch.int8)
    row_stride = x.stride(0) if m > 1 else 0  # one row's means nothing, and must not compile a kernel
    _, quantise_warps = block_of(k)
    with torch.cuda.device_of(x):
        # In the order of the kernels' parameters: by name, a launch would take 3 us more.
        quantise_kernel[(m + plan.clearing,)](
            x.view(bits_dtype),
            limbs,
            exponents,
            sums,
            totals,
            mask,
            *quantise_numbers(plan, m, k, row_stride, masked_rows),
            **quantise_constants(code, activation_bits, tile.run, fp16, k, row_stride % 16 == 0),
            num_warps=quantise_warps,
            enable_fp_fusion=False,
        )
        product_kernel[(plan.tiles, plan.parts)](
            x.view(bits_dtype),
            limbs,
            exponents,
            sums,
            totals,
            totals[plan.totals :],
            mask,
            y.view(bits_dtype),
            seed,
            *product_numbers(plan, m, row_stride, masked_rows, request),
            **product_constants(code, activation_bits, tile, fp16, plan.parts),
            BYTE_PERM=_BYTE_PERM,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    return y


def entries(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    """Draw the integers e[k_start : k_start + k, n_start : n_start + n] as int16 on a GPU."""
    out = torch.empty(k, n, dtype=torch.int16, device=seed.device)
    with torch.cuda.device_of(seed):
        entries_kernel[entries_grid(k_start, k, n)](
            seed=seed,
            out=out,
            domain=signed_word(domain),
            k_start=k_start,
            k=k,
            n_start=signed_word(n_start),
            columns=n,
            CALLS=ENTRIES_CALLS,
            COLUMNS=ENTRIES_COLUMNS,
            BYTE_PERM=_BYTE_PERM,
        )
    return out


def warmup(
    device: torch.device | str, dim: int, *, dtype: torch.dtype = torch.bfloat16, activation_bits: int = 16
) -> None:
    """Compile what ``residual_projection`` takes for activations [..., dim], whatever their number, strides and mask.

    That includes shards, except those of one column. For each tile of the table these are four products and four
    kernels that quantise, about a second each; Triton keeps them on disk (TRITON_CACHE_DIR). This does not choose the
    device's backend; `poc_kernels.backends.warmup` does.
    """
    seed = definition.seed_tensor(0, device)
    capability, _ = hardware(seed.device)
    forms = tile_table.forms_of_k(capability)
    stride = triton.cdiv(dim, 16) * 16
    memory = torch.zeros(2 * stride + 2, dtype=dtype, device=device)
    for tile in tile_table.tiles(capability, activation_bits, choose_arithmetic(capability)):
        # Few rows and columns: what is compiled depends on no number, only on whether these are divisible by 16 and on
        # whether K is in parts.
        for unaligned, ragged in itertools.product((0, 1), (0, 1)):
            request = Request(
                domain=0,
                coefficient=definition.coefficient(definition.DEFAULT_STD),
                activation_bits=activation_bits,
                columns=min(dim, 16 - unaligned),
                residual=True,
            )
            x = memory.as_strided((2, dim), (stride + ragged, 1), unaligned)
            project(x, seed, request, tile=tile, splits=forms[-1] if ragged else 1)


def wrong_tiles(device: torch.device) -> list[str]:
    """Return which tiles of the device's table are wrong there (`check.wrong_tiles`)."""
    capability, _ = hardware(device)
    arithmetic = choose_arithmetic(capability)

    def by_tile(x: Tensor, seed: Tensor, request: Request, tile: Tile, parts: int) -> Tensor:
        return project(x, seed, request, tile=tile, splits=parts, arithmetic=arithmetic)

    def tiles_of(activation_bits: int) -> tuple[Tile, ...]:
        return tile_table.tiles(capability, activation_bits, arithmetic)

    sizes = (20, 140, 20) if INTERPRETED else check.SIZES
    return check.wrong_tiles(device, by_tile, tiles_of, tile_table.forms_of_k(capability), arithmetic, sizes=sizes)
