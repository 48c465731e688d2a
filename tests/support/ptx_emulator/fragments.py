"""Matrix units: which element of a matrix lies in which register of which lane. Each layout is written once, here.

A lane has the group g = lane / 4 and the place t = lane % 4 in it: an axis of 32 lanes is one of [8 g, 4 t].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .findings import EmulationError
from .shared_memory import SHARED_BASE

if TYPE_CHECKING:
    from .warp import Warp


def matrix_a(registers: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Return [16, 32 bytes of k] from four registers: A of mma and of a warp's 16 rows in wgmma.

    Of mma.m16n8k32 .s8 (9.7.14.5.10), m16n8k16 .f16 (9.7.14.5.8) and wgmma (9.7.15.5.1.1): register 2 * h + r has row
    g + 8 * r and the bytes 16 * h + 4 * t + 0..3.
    """
    words = np.stack(registers).view(np.uint8).reshape(2, 2, 8, 4, 4)  # h, r, g, t, byte
    return np.ascontiguousarray(words.transpose(1, 2, 0, 3, 4)).reshape(16, 32).view(dtype)


def matrix_b(registers: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Return [8 columns, 32 bytes of k] from two registers: B of the same mma.

    Register h has column g and the bytes 16 * h + 4 * t + 0..3.
    """
    words = np.stack(registers).view(np.uint8).reshape(2, 8, 4, 4)  # h, g, t, byte
    return np.ascontiguousarray(words.transpose(1, 0, 2, 3)).reshape(8, 32).view(dtype)


def from_accumulator(registers: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Return [16, n] from n / 2 registers: C and D of mma and of a warp's 16 rows in wgmma (9.7.15.5.1.1).

    Register 4 * j + 2 * r + c has row g + 8 * r and column 8 * j + 2 * t + c.
    """
    n = len(registers) * 2
    words = np.stack(registers).view(dtype).reshape(n // 8, 2, 2, 8, 4)  # j, r, c, g, t
    return words.transpose(1, 3, 0, 4, 2).reshape(16, n)


def to_accumulator(matrix: np.ndarray) -> list[np.ndarray]:
    """Return the registers of a matrix [16, n]: `from_accumulator` turned round."""
    n = matrix.shape[1]
    words = matrix.reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3)  # r, g, j, t, c -> j, r, c, g, t
    return list(np.ascontiguousarray(words).reshape(n // 2, 32).view(np.uint32))


def multiply(c: np.ndarray, a: np.ndarray, b: np.ndarray, warp: Warp, line: int, saturate: bool = False) -> np.ndarray:
    """Return c + a @ b.T for a [16, k] and b [n, k], of int8 to int32 or of float16 to float32.

    A float16 sum is exact in any order while all terms are integers and their magnitudes add up to 2**24 at most; one
    that is not may depend on the unit's own order and width, and is noted.
    """
    if a.dtype == np.int8:
        product = np.rint(a.astype(np.float32) @ b.astype(np.float32).T)  # below 2**24: exact
        total = c.astype(np.int64) + product.astype(np.int64)
        if saturate:
            total = np.clip(total, -(2**31), 2**31 - 1)
        elif total.min() < -(2**31) or total.max() >= 2**31:
            warp.findings.fault("an int32 sum of products overflows", line)
        return total.astype(np.int32)
    exact = c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64).T
    magnitude = np.abs(c.astype(np.float64)) + np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).T
    whole = (a == np.rint(a)).all() and (b == np.rint(b)).all()
    if not whole or not magnitude.max() <= 2**24:
        warp.findings.note("float16 product whose sum need not be exact", line)
    return exact.astype(np.float32)


def load_matrices(warp: Warp, address: np.ndarray, count: int, transposed: bool, line: int) -> list[np.ndarray]:
    """ldmatrix .m8n8 .b16 (9.7.14.5.15).

    Lane 8 * j + r has the address of row r of matrix j; register j of lane 4 * r + t gets the elements 2 * t and
    2 * t + 1 of row r, or, transposed, of column r.
    """
    shared = warp.block.shared
    at = shared.offsets(address[: 8 * count], 16, line)
    rows = shared.load(warp, at, None, line).view(np.uint16).reshape(count, 8, 8)
    if transposed:
        rows = rows.transpose(0, 2, 1)
    return list(np.ascontiguousarray(rows).reshape(count, 64).view(np.uint32))


def store_matrices(
    warp: Warp, address: np.ndarray, registers: Sequence[np.ndarray], transposed: bool, line: int
) -> None:
    """stmatrix (9.7.14.5.16): `load_matrices` turned round."""
    shared, count = warp.block.shared, len(registers)
    rows = np.stack(registers).view(np.uint16).reshape(count, 8, 8)
    if transposed:
        rows = rows.transpose(0, 2, 1)
    at = shared.offsets(address[: 8 * count], 16, line)
    shared.store(warp, at, np.ascontiguousarray(rows).reshape(count * 8, 8).view(np.uint8), None, line)


def described_bytes(descriptor: int, rows: int, line: int) -> np.ndarray:
    """Return the offsets in shared memory [rows, 32] of 32 bytes of k of a K-major operand of wgmma (9.7.15.5.1.2).

    The descriptor has address / 16 in bits 0-13, the stride of 8 rows / 16 in bits 32-45, the base offset in 49-51 and
    the swizzle in 62-63: 1, 2, 3 for rows of 128, 64, 32 bytes, whose chunks of 16 bytes are xored with the bits of the
    address from bit 7 on.
    """
    swizzle, base = descriptor >> 62, descriptor >> 49 & 7
    reserved = 3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52
    if not swizzle or base or descriptor & reserved:
        raise EmulationError(f"line {line}: matrix descriptor {descriptor:#x}")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = {1: 128, 2: 64, 3: 32}[swizzle]
    row = np.arange(rows)[:, None]
    linear = start + row // 8 * stride + row % 8 * width + np.arange(32)
    if (start & (width * 8 - 1)) + 32 > width:
        pattern = width * 8
        raise EmulationError(f"line {line}: operand starts at {start:#x}, inside a swizzled pattern of {pattern} bytes")
    chunk = linear >> 7 & (width // 16 - 1)
    return (linear ^ chunk << 4) - SHARED_BASE
