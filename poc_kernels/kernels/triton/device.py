# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803  (constants of a kernel are written in capitals; branches on them are no expressions)
"""Functions of the Triton kernels: definition 1 on tiles (``docs/definition.md``; ``csrc/definition.h`` is its twin).

Floats are read and written as their bits, so that rows which are copied keep every bit and NaN is the defined one.
Entries are looked up in tables in two ways: four at once by `prmt` on NVIDIA's GPUs; elsewhere in a 64-bit constant,
shifted by 8 * index.
"""

import triton
import triton.language as tl

# The order of k in a panel of 128, of which 16 k are one call of Philox (t: call, w: word, i: byte; g: half a panel).
# Matrix units want a thread to hold runs of 4 (or 8) consecutive k; these orders make such runs of whole words of one
# call, so that what a thread draws is what it multiplies. k is summed away: the order changes no result.
PANEL = tl.constexpr(128)

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)

NOT_FINITE = tl.constexpr(128)
"""The exponent of a row that holds a NaN or an infinity; others have at most 127."""
_MIN_EXPONENT = tl.constexpr(-100)
_NAN_BITS = tl.constexpr((0x7FC00000, 0x7FC0, 0x7E00))

# ---- entries of P ----------------------------------------------------------------------------------------------------


@triton.jit
def philox(calls, columns, domain, seed):
    """Compute Philox4x32-10 of counters (calls, columns, domain, 0), broadcast together: four tensors of uint32."""
    c0, c1 = tl.broadcast(calls, columns)
    c2 = tl.zeros_like(c0) + domain.to(tl.uint32, bitcast=True)
    c3 = tl.zeros_like(c0)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        wide0 = c0.to(tl.uint64) * 0xD2511F53
        wide2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (wide2 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = wide2.to(tl.uint32)
        c2 = (wide0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = wide0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


_TABLE_A_LOW = tl.constexpr(0x0B040200)
_TABLE_B_LOW = tl.constexpr(0x08050100)


@triton.jit
def _shifted_table(table: tl.constexpr, word, i: tl.constexpr):
    """Look up byte i: entry (word >> 4 * i) & 7 of a table of eight bytes."""
    index = ((word >> (4 * i)) & 7).to(tl.uint64)
    return ((table >> (8 * index)) & 255).to(tl.uint32)


# As PTX: the byte_perm of libdevice drops bit 3 of a selector, which fills a byte with its sign.
@triton.jit
def _prmt(asm: tl.constexpr, selectors, low):
    return tl.inline_asm_elementwise(asm, "=r,r,r", [selectors, low], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def table_lows(BYTE_PERM: tl.constexpr):
    """Return the low words of both tables, which `half_entries` takes: in registers that each thread keeps.

    ptxas would keep a constant in a uniform register and copy it before each `prmt`, 32 times in a loop of 380
    instructions. It does not know that bit 31 of a mask of lower lanes is 0, so these words are no constants to it.
    """
    low_a, low_b = 0, 0
    if BYTE_PERM:
        mask = tl.inline_asm_elementwise("mov.u32 $0, %lanemask_lt;", "=r", [], dtype=tl.uint32, is_pure=True, pack=1)
        zero = (mask >> 31).to(tl.int32, bitcast=True)
        low_a, low_b = zero + _TABLE_A_LOW, zero + _TABLE_B_LOW
    return low_a, low_b


@triton.jit
def _signs(w):
    """Spread each of the bits 3, 7, 11 and 15 over a whole byte."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x9D8C;", "=r,r,r", [w, w << 4], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def half_entries(word, lows, BYTE_PERM: tl.constexpr):
    """Return the four v of a word as the bytes of an int32, the first k in the lowest: e = 2 * v + 1, v is u or ~u.

    ``lows`` is `table_lows`.
    """
    if BYTE_PERM:
        w = word.to(tl.int32, bitcast=True)
        indices = w & 0x77777777
        a = _prmt("prmt.b32 $0, $2, 0x33271C17, $1;", indices, lows[0])
        b = _prmt("prmt.b32 $0, $2, 0x48150F0B, $1;", indices >> 16, lows[1])
        return (a + b) ^ _signs(w)
    table_a: tl.constexpr = 0x33271C170B040200
    table_b: tl.constexpr = 0x48150F0B08050100
    v = tl.zeros_like(word)
    for i in tl.static_range(4):
        u = _shifted_table(table_a, word, i) + _shifted_table(table_b, word >> 16, i)
        sign = ((word >> (4 * i + 3)) & 1) * 255
        v |= (u ^ sign) << (8 * i)
    return v.to(tl.int32, bitcast=True)


@triton.jit
def entry_words(panel, where, COLUMNS: tl.constexpr, WARPS: tl.constexpr, BYTE_PERM: tl.constexpr):
    """Draw a panel for where = (first column, domain, seed, lows): the four words of its calls as bytes v.

    Each is [half a panel, COLUMNS, 4 calls] int32. Columns are drawn in an order, 8 per warp, that gives each thread of
    a matrix unit the rows that it multiplies.
    """
    first_column, domain, seed, lows = where
    halves: tl.constexpr = PANEL // 64
    calls = panel * (PANEL // 16) + tl.arange(0, halves)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    at = tl.arange(0, COLUMNS)
    column = (at % 8) + at // (8 * WARPS) % 2 * 8 + at // 8 % WARPS * 16 + at // (16 * WARPS) * (16 * WARPS)
    columns = (first_column + column).to(tl.uint32)[None, :, None]
    w0, w1, w2, w3 = philox(calls.to(tl.uint32), columns, domain, seed)
    v0, v1 = half_entries(w0, lows, BYTE_PERM), half_entries(w1, lows, BYTE_PERM)
    v2, v3 = half_entries(w2, lows, BYTE_PERM), half_entries(w3, lows, BYTE_PERM)
    return v0, v1, v2, v3


@triton.jit
def tile_of_words(v0, v1, v2, v3, COLUMNS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """Order what `entry_words` drew as v [COLUMNS, PANEL] int8; k in the order of runs of RUN."""
    halves: tl.constexpr = PANEL // 64
    blocks: tl.constexpr = COLUMNS // (16 * WARPS)
    words = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    bytes02 = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    bytes13 = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    # [g, (block, 8s, warp, column), t, w / 2, w % 2, i]
    v = tl.reshape(tl.join(bytes02, bytes13), [halves, blocks, 2, WARPS, 8, 4, 2, 2, 4])
    v = tl.permute(v, (1, 3, 2, 4, 0, 6, 7, 5, 8)) if RUN == 4 else tl.permute(v, (1, 3, 2, 4, 0, 6, 5, 7, 8))
    return tl.reshape(v, [COLUMNS, PANEL])


@triton.jit
def fp16_of(byte):
    """Convert signed bytes, as int32 or int8, to float16, exactly: the bits of 1024 + byte end with the byte."""
    shifted = (byte.to(tl.int16) + 128) | 0x6400
    return shifted.to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def position_of_quad(quad, RUN: tl.constexpr):
    """Return where the four k of ``quad`` = k // 4 lie, in quads, in the order of `tile_of_words`."""
    call = quad // 4 % 4
    word = quad % 4
    if RUN == 4:
        return quad // 16 * 16 + word * 4 + call
    return quad // 16 * 16 + word // 2 * 8 + call * 2 + word % 2


# ---- floats and their bits -------------------------------------------------------------------------------------------


@triton.jit
def widen(bits, DTYPE: tl.constexpr):
    """Return the float32 values of the bits (int32 or int16) of a dtype."""
    # One return, at the end: code after an earlier return would be compiled too, and would not suit every dtype.
    if DTYPE == FLOAT32:
        value = bits.to(tl.float32, bitcast=True)
    elif DTYPE == BFLOAT16:
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def round_to_bits(value, DTYPE: tl.constexpr):
    """Round float32 values, none of them NaN, to the bits of a dtype: nearest, halves to even, subnormals kept."""
    if DTYPE == FLOAT32:
        bits = value.to(tl.int32, bitcast=True)
    elif DTYPE == BFLOAT16:
        wide = value.to(tl.uint32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int16)
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def power_of_two(exponent):
    """Return 2**exponent in float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


# ---- activations and result ------------------------------------------------------------------------------------------


@triton.jit
def row_exponent(largest):
    """Return E of a row whose largest magnitude has these float32 bits, or NOT_FINITE."""
    return tl.maximum((largest >> 23) - 127, _MIN_EXPONENT)


@triton.jit
def round_activation(x, scale):
    """Return rint(x * scale) as int32, halves to even, for results within 2**21: adding 1.5 * 2**23 rounds."""
    return (x * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def rounded_sum(high, low, sum_of_q, TWO_LIMBS: tl.constexpr):
    """Return float32(T), T = 2 * (256 * high + low) + sum(q), of up to 40 bits, rounded once, in 32-bit arithmetic.

    T = 512 * top + rest. Up to |top| = 2**24 the top is exact in float32, and the one rounding is that of the sum.
    Beyond, the last bits matter only by not being zero: T >> 8 has 26 bits or more of which float32 rounds off at least
    two.
    """
    if not TWO_LIMBS:
        return (2 * low + sum_of_q).to(tl.float32)  # below 2**31
    half = low + (sum_of_q >> 1)
    top = high + (half >> 8)
    rest = (half & 255) * 2 + (sum_of_q & 1)
    exact = top.to(tl.float32) * 512.0 + rest.to(tl.float32)
    sticky = (top * 2 + (rest >> 8)) | ((rest & 255) != 0).to(tl.int32)
    return tl.where(tl.abs(top) <= 1 << 24, exact, sticky.to(tl.float32) * 256.0)


@triton.jit
def tiles_of(columns, COLUMNS: tl.constexpr):
    """Return how many tiles of COLUMNS hold ``columns`` >= 1; `tl.cdiv` wraps if columns + COLUMNS exceeds 32 bits."""
    return (columns - 1) // COLUMNS + 1


@triton.jit
def wanted_rows(row_mask, row, masked_rows):
    """Tell which rows are to be projected by the mask of masked_rows int8 (0: all, there is no mask)."""
    return tl.load(row_mask + row, mask=row < masked_rows, other=1) != 0


@triton.jit
def halves(tile, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return the first and the second half of the rows of a tile [COLUMNS, ROWS]."""
    return tl.split(tl.permute(tl.reshape(tile, [COLUMNS, 2, ROWS // 2]), (0, 2, 1)))


@triton.jit
def _in_tile(COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    return tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None]


@triton.jit
def add_tile(totals, high_totals, high, low, rows, TWO_LIMBS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Add the first rows of the sums of a tile [COLUMNS, ROWS] to totals and high_totals, [ROWS, COLUMNS].

    64 rows at a time: more would not fit in the registers.
    """
    if ROWS > 64:
        high0, high1 = halves(high, COLUMNS, ROWS)
        low0, low1 = halves(low, COLUMNS, ROWS)
        half: tl.constexpr = ROWS // 2
        add_tile(totals, high_totals, high0, low0, rows, TWO_LIMBS, COLUMNS, half)
        totals += half * COLUMNS
        high_totals += half * COLUMNS
        add_tile(totals, high_totals, high1, low1, rows - half, TWO_LIMBS, COLUMNS, half)
    else:
        added = tl.broadcast_to((tl.arange(0, ROWS) < rows)[None, :], [COLUMNS, ROWS])
        tl.atomic_add(totals + _in_tile(COLUMNS, ROWS), low, mask=added, sem="relaxed")
        if TWO_LIMBS:
            tl.atomic_add(high_totals + _in_tile(COLUMNS, ROWS), high, mask=added, sem="relaxed")


@triton.jit
def added_sums(totals, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Load the first rows of the sums [COLUMNS, ROWS] that all parts of K have added to totals [ROWS, COLUMNS]."""
    added = (tl.arange(0, ROWS) < rows)[None, :]
    return tl.load(totals + _in_tile(COLUMNS, ROWS), mask=added, other=0, cache_modifier=".cg")


@triton.jit
def finish_tile(
    operands,  # (x, exponents, sums, row_mask, y, coefficient)
    extent,  # (rows, row_stride, columns, column_start, residual_columns, masked_rows)
    high,
    low,
    first_row,
    first_column,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the bits of y, those of x where a row is not wanted and NaN where it is not finite.

    From the sums of a tile [COLUMNS, ROWS], 16 rows at a time: more would not fit in the registers.
    """
    if ROWS > 16:
        high0, high1 = halves(high, COLUMNS, ROWS)
        low0, low1 = halves(low, COLUMNS, ROWS)
        half: tl.constexpr = ROWS // 2
        finish_tile(operands, extent, high0, low0, first_row, first_column, DTYPE, BITS, COLUMNS, half)
        finish_tile(operands, extent, high1, low1, first_row + half, first_column, DTYPE, BITS, COLUMNS, half)
    else:
        x, exponents, sums, row_mask, y, coefficient = operands
        rows, row_stride, columns, column_start, residual_columns, masked_rows = extent
        column = first_column + tl.arange(0, COLUMNS)
        row = first_row + tl.arange(0, ROWS)
        in_rows = row < rows
        inside = (column < columns)[:, None] & in_rows[None, :]
        is_residual = (column < residual_columns)[:, None]
        sum_of_q = tl.load(sums + row, mask=in_rows, other=0)[None, :]
        exponent = tl.load(exponents + row, mask=in_rows, other=0)[None, :]
        x_at = x + row.to(tl.int64)[None, :] * row_stride + (column_start + column)[:, None]
        x_bits = tl.load(x_at, mask=inside & is_residual, other=0)
        total = rounded_sum(high, low, sum_of_q, BITS == 16)
        shift: tl.constexpr = 13 if BITS == 16 else 6
        scale = power_of_two(tl.where(exponent == NOT_FINITE, 0, exponent) - shift)
        g = (total * coefficient) * scale
        bits = round_to_bits(tl.where(is_residual, widen(x_bits, DTYPE) + g, g), DTYPE)
        nan = tl.full([], _NAN_BITS[DTYPE], tl.int32).to(bits.dtype)
        bits = tl.where(exponent == NOT_FINITE, nan, bits)
        bits = tl.where(wanted_rows(row_mask, row, masked_rows)[None, :], bits, x_bits)
        tl.store(y + row.to(tl.int64)[None, :] * columns + column[:, None], bits, mask=inside)
