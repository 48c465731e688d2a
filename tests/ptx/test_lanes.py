"""Single instructions on 32 lanes, and where fragments lie, against plain integers and the formulas of the PTX ISA."""

import struct

import numpy as np
import pytest
from ptx_emulator import fragments, lanes
from ptx_emulator.findings import EmulationError, Findings

RANDOM = np.random.default_rng(1)
WORDS = [RANDOM.integers(0, 2**32, 32, np.uint32) for _ in range(30)]
TRIPLES = list(zip(WORDS[::3], WORDS[1::3], WORDS[2::3], strict=True))


def signed(word):
    return int(np.uint32(word).view(np.int32))


@pytest.mark.parametrize(("a", "b", "selector"), TRIPLES)
def test_prmt_picks_bytes_and_spreads_signs(a, b, selector):
    for lane, got in enumerate(lanes.permute_bytes(a, b, selector)):
        pool, out = struct.pack("<II", a[lane], b[lane]), 0
        for i in range(4):
            nibble = int(selector[lane]) >> 4 * i & 15
            byte = pool[nibble & 7]
            out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        assert got == out


@pytest.mark.parametrize("a", WORDS[:5])
def test_shifts_by_the_width_or_more_leave_zeros_or_the_sign(a):
    n = RANDOM.integers(0, 70, 32).astype(np.uint32)
    n[:3] = 31, 32, 63
    shifted = lanes.shift_left(a, n), lanes.shift_right(a, n), lanes.shift_right(a.view(np.int32), n)
    for lane, (left, right, arithmetic) in enumerate(zip(*shifted, strict=True)):
        by = int(n[lane])
        assert left == int(a[lane]) << by & 0xFFFFFFFF if by < 32 else left == 0
        assert right == int(a[lane]) >> by
        assert arithmetic == signed(a[lane]) >> min(by, 31)


def pseudocode_of_bfe(a, position, length, is_signed):
    """9.7.1.19, literally."""
    msb = 31
    sign = a >> min(position + length - 1, msb) & 1 if is_signed and length else 0
    bits = (a >> position + i & 1 if i < length and position + i <= msb else sign for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("a", WORDS)
def test_bfe(a):
    position, length = (RANDOM.integers(0, 40, 32).astype(np.uint32) for _ in range(2))
    for is_signed, values in ((False, a), (True, a.view(np.int32))):
        for lane, got in enumerate(lanes.bit_field(values, position, length).view(np.uint32)):
            assert got == pseudocode_of_bfe(int(a[lane]), int(position[lane]), int(length[lane]), is_signed)


@pytest.mark.parametrize(("a", "b"), [(a.view(np.int32), b.view(np.int32) >> 20 | 1) for a, b, _ in TRIPLES])
def test_division_goes_towards_zero(a, b):
    quotient, rest = lanes.divide(a, b, 0), lanes.divide(a, b, 0, remainder=True)
    for x, y, q, r in zip(a.tolist(), b.tolist(), quotient.tolist(), rest.tolist(), strict=True):
        assert q == abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert r == x - q * y


def test_division_by_zero_is_an_error():
    with pytest.raises(EmulationError, match="line 7: division by zero"):
        lanes.divide(WORDS[0], np.zeros(32, np.uint32), 7)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x01, 0x80, 0x3C])
def test_lop3(table):
    a, b, c = TRIPLES[0]
    for lane, got in enumerate(lanes.lop3(a, b, c, table)):
        x, y, z = (int(word[lane]) for word in (a, b, c))
        index = ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1) for i in range(32))
        assert got == sum((table >> at & 1) << i for i, at in enumerate(index))


def test_funnel_shifts():
    low, high, n = TRIPLES[1]
    left, right = lanes.funnel(low, high, n, True), lanes.funnel(low, high, n, False)
    for lane in range(32):
        wide, by = int(high[lane]) << 32 | int(low[lane]), int(n[lane]) & 31
        assert left[lane] == wide << by >> 32 & 0xFFFFFFFF
        assert right[lane] == wide >> by & 0xFFFFFFFF


def test_fma_is_rounded_once():
    one = np.full(32, 1.0)
    tiny = np.full(32, 2.0**-52)
    assert (lanes.fma64(one + tiny, one - tiny, -one) == -(2.0**-104)).all()


def test_floats_become_integers_within_their_range():
    values = np.resize(np.array([np.nan, np.inf, -np.inf, 2.5, -2.5, 3.5, 1e20, -0.1], np.float32), 32)
    got = {how: lanes.to_integer(values, np.int32, how)[:8].tolist() for how in ("rzi", "rni")}
    most, least = 2**31 - 1, -(2**31)
    assert got["rzi"] == [0, most, least, 2, -2, 3, most, 0]
    assert got["rni"] == [0, most, least, 2, -2, 4, most, 0]


# ---- fragments -----------------------------------------------------------------------------------------------------


def place_of_a(lane, i, size):
    """(row, k) of element i that a lane holds of A: m16n8k32 for bytes, m16n8k16 for float16."""
    group, place = lane >> 2, lane & 3
    if size == 1:
        return group + 8 * (i // 4 % 2), place * 4 + i % 4 + 16 * (i >= 8)
    return group + 8 * (i // 2 % 2), place * 2 + i % 2 + 8 * (i >= 4)


def place_of_b(lane, i, size):
    """(column, k) of element i of B."""
    group, place = lane >> 2, lane & 3
    if size == 1:
        return group, place * 4 + i % 4 + 16 * (i >= 4)
    return group, place * 2 + i % 2 + 8 * (i >= 2)


@pytest.mark.parametrize(("matrix", "place", "registers"), [("matrix_a", place_of_a, 4), ("matrix_b", place_of_b, 2)])
@pytest.mark.parametrize(("dtype", "size"), [(np.int8, 1), (np.float16, 2)])
def test_operands_of_mma_lie_where_the_isa_says(matrix, place, registers, dtype, size):
    held = WORDS[:registers]
    got = getattr(fragments, matrix)(held, dtype)
    per_register, seen = 4 // size, set()
    for lane in range(32):
        for i in range(registers * per_register):
            at = place(lane, i, size)
            raw = struct.pack("<I", held[i // per_register][lane])[i % per_register * size :][:size]
            assert got[at].tobytes() == raw
            seen.add(at)
    assert len(seen) == got.size


@pytest.mark.parametrize("n", [8, 16, 64, 256])
def test_accumulators_lie_where_the_isa_says(n):
    held = [RANDOM.integers(0, 2**32, 32, np.uint32) for _ in range(n // 2)]
    matrix = fragments.from_accumulator(held, np.uint32)
    for lane in range(32):
        for i in range(n // 2):
            row, column = (lane >> 2) + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane & 3) + i % 2
            assert matrix[row, column] == held[i][lane]
    assert all((x == y).all() for x, y in zip(fragments.to_accumulator(matrix), held, strict=True))


class Noting:
    """A warp as far as `fragments.multiply` knows it."""

    def __init__(self):
        self.findings = Findings()


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
def test_products_are_those_of_integers(dtype):
    a, b = RANDOM.integers(-128, 128, (16, 32)), RANDOM.integers(-128, 128, (8, 32))
    total = np.int32 if dtype == np.int8 else np.float32
    c, warp = RANDOM.integers(-(2**20), 2**20, (16, 8)), Noting()
    got = fragments.multiply(c.astype(total), a.astype(dtype), b.astype(dtype), warp, 1)
    assert got.dtype == total
    assert (got == c + a @ b.T).all()
    assert not warp.findings.faults
    assert not warp.findings.notes


def test_sums_that_overflow_are_faults_or_saturate():
    a, b, c = np.ones((16, 32), np.int8), np.ones((8, 32), np.int8), np.full((16, 8), 2**31 - 32, np.int32)
    warp = Noting()
    assert (fragments.multiply(c, a, b, warp, 1, saturate=True) == 2**31 - 1).all()
    assert not warp.findings.faults
    fragments.multiply(c, a, b, warp, 1)
    assert warp.findings.faults


def test_float16_sums_that_are_not_exact_are_noted():
    a, b, warp = np.full((16, 16), 0.5, np.float16), np.ones((8, 16), np.float16), Noting()
    fragments.multiply(np.zeros((16, 8), np.float32), a, b, warp, 1)
    fragments.multiply(np.full((16, 8), 2.0**24, np.float32), a * 2, b, warp, 2)
    assert [line for _, line, _ in warp.findings.notes] == [1, 2]


def test_a_descriptor_names_swizzled_bytes():
    """Rows of 128 bytes, 8 of them 1024 bytes apart; chunks of 16 bytes are xored with the row."""
    start = 2048
    at = fragments.described_bytes(1 << 62 | (1024 >> 4) << 32 | start >> 4, 16, 1)
    for row in range(16):
        for k in range(32):
            chunk = (k // 16) ^ row % 8
            assert at[row, k] == start - 1024 + row // 8 * 1024 + row % 8 * 128 + chunk * 16 + k % 16


@pytest.mark.parametrize("descriptor", [2048 >> 4, 1 << 62 | 1 << 49 | 2048 >> 4, 1 << 62 | 1 << 14, 1 << 62 | 7])
def test_descriptors_that_are_not_known_are_errors(descriptor):
    with pytest.raises(EmulationError, match="line 1: "):
        fragments.described_bytes(descriptor, 8, 1)
