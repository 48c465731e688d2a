"""What arithmetic instructions do on the 32 lanes of a warp.

A register is an array [32] of unsigned integers of its width, a predicate one of bool. Functions take and return such
arrays, viewed as the signed or floating type that an instruction names.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .findings import EmulationError

LANES = np.arange(32)
FULL = np.ones(32, bool)
_NIBBLES = np.array([0, 4, 8, 12], np.uint32)


class _NoValue:
    """A register that is not to be touched: any use of it raises."""

    __array_ufunc__ = None


UNDEFINED = _NoValue()


class InFlight(_NoValue):
    """Register ``index`` of the accumulator of a wgmma that has not been waited for."""

    def __init__(self, accumulator: list, index: int) -> None:
        self.accumulator, self.index = accumulator, index


def array(value: int, dtype: type) -> np.ndarray:
    """Return a constant or parameter in all lanes, cut to its width."""
    bits = np.dtype(dtype).itemsize * 8
    return np.full(32, value & ((1 << bits) - 1), dtype)


def uniform(predicate: np.ndarray, line: int) -> bool:
    """Return the predicate of a branch, on which all lanes must agree."""
    if predicate.all():
        return True
    if predicate.any():
        raise EmulationError(f"line {line}: branch on which the lanes of a warp differ")
    return False


def merged(predicate: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return new where the guard holds, else old."""
    return new if predicate.all() else np.where(predicate, new, old)


# ---- integers --------------------------------------------------------------------------------------------------------


def shift_left(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    """shl (9.7.8.8): shifts by the width or more give 0."""
    return np.where(n < a.dtype.itemsize * 8, a << np.minimum(n, 63).astype(a.dtype), a.dtype.type(0))


def shift_right(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    """shr (9.7.8.9), arithmetic for signed a: shifts by the width or more leave the sign."""
    bits = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n < bits, a >> np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def divide(a: np.ndarray, b: np.ndarray, line: int, remainder: bool = False) -> np.ndarray:
    """div and rem of integers (9.7.1.8, 9.7.1.9): towards zero."""
    if not b.all():
        raise EmulationError(f"line {line}: division by zero")
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    q = np.abs(wide_a) // np.abs(wide_b) * np.sign(wide_a) * np.sign(wide_b)
    return (wide_a - q * wide_b if remainder else q).astype(a.dtype)


def bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of 32 bits (9.7.1.19): of signed a the sign goes on beyond the top."""
    position, length = (n.astype(np.int64) & 255 for n in (position, length))
    wide = a.astype(np.int64)
    if a.dtype == np.int32:
        top = np.minimum(position + length - 1, 31)
        left = 63 - top
        return np.where(length == 0, 0, wide << left >> np.minimum(left + position, 63)).astype(a.dtype)
    mask = (np.int64(1) << np.minimum(length, 32)) - 1
    return (np.where(position < 32, wide >> np.minimum(position, 63), 0) & mask).astype(a.dtype)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt without a mode (9.7.9.7): a nibble picks one of eight bytes; its bit 3 spreads that byte's sign."""
    pool = (a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))[:, None]
    nibbles = selector[:, None] >> _NIBBLES & np.uint32(15)
    picked = (pool >> ((nibbles & np.uint32(7)) << np.uint32(3)).astype(np.uint64)).astype(np.uint8)
    if (nibbles & np.uint32(8)).any():
        picked = np.where(nibbles & np.uint32(8), (picked.view(np.int8) >> 7).view(np.uint8), picked)
    return picked.reshape(-1).view(np.uint32)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """lop3 (9.7.8.6): each bit by a table of the three bits."""
    out = np.zeros(32, np.uint32)
    for bits in range(8):
        if table >> bits & 1:
            out |= (a if bits & 4 else ~a) & (b if bits & 2 else ~b) & (c if bits & 1 else ~c)
    return out


def funnel(low: np.ndarray, high: np.ndarray, n: np.ndarray, left: bool) -> np.ndarray:
    """shf.wrap (9.7.8.7)."""
    wide, n = high.astype(np.uint64) << np.uint64(32) | low, (n & np.uint32(31)).astype(np.uint64)
    return (wide << n >> np.uint64(32) if left else wide >> n).astype(np.uint32)


_REDUCTIONS = {
    "add": lambda values: values.sum(dtype=values.dtype),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def reduce(values: np.ndarray, operation: str) -> np.ndarray:
    """redux.sync (9.7.13.8)."""
    return np.full(32, _REDUCTIONS[operation](values))


# ---- floats ----------------------------------------------------------------------------------------------------------

_NAN = {
    np.dtype(np.float16): np.uint16(0x7FFF),
    np.dtype(np.float32): np.uint32(0x7FFFFFFF),
    np.dtype(np.float64): np.uint64(0x7FF8000000000000),
}


def canonical(value: np.ndarray) -> np.ndarray:
    """Return the bits of floats; a NaN has one pattern on a GPU, unlike those of the CPU that computes here."""
    nan = _NAN[value.dtype]
    bits, is_nan = np.ascontiguousarray(value).view(nan.dtype), np.isnan(value)
    return np.where(is_nan, nan, bits) if is_nan.any() else bits


_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f64."""
    return np.fromiter(map(_libm.fma, a.tolist(), b.tolist(), c.tolist()), np.float64, 32)


def about_quotient(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """div.full.f32 (9.7.3.8): it may be up to 2 ulp off, so it is, at random."""
    quotient = (a / b).astype(np.float32)
    return (quotient.view(np.int32) + random.integers(-2, 3, 32, np.int32)).view(np.float32)


def to_integer(value: np.ndarray, dtype: type, rounding: str) -> np.ndarray:
    """cvt of floats to integers (9.7.9.21): NaN is 0, what does not fit is the nearest that does."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](value.astype(np.float64))
    limits = np.iinfo(dtype)
    return np.clip(np.where(np.isnan(rounded), 0, rounded), limits.min, limits.max).astype(dtype)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """cvt.rn.bf16.f32, as bits."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))
