"""What P is and what a product with it is: the constants of definition 1, seeds, coefficients, and `Request`.

``docs/definition.md`` is the text; ``csrc/definition.h`` holds the same constants for native code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import numbers
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFINITION = 1

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
ENTRIES_PER_CALL = 16
"""Consecutive k of one column that one Philox call draws."""

TABLE_A = (0, 2, 4, 11, 23, 28, 39, 51)
TABLE_B = (0, 1, 5, 8, 11, 15, 21, 72)
SIGMA = math.sqrt(549872 / 64)
"""Standard deviation of the integers e[k, n]."""

MAX_FEATURES = 65536
"""Largest K: sums of int8 products over more features would not fit in 32 bits."""
MAX_COLUMNS = 2**32 - 1
"""Largest N: a column is a 32-bit word of the Philox counter."""
MAX_DOMAIN = 2**32 - 1
MIN_EXPONENT = -100
"""E of a row of zeros, and the smallest E."""
ACTIVATION_SHIFT = {16: 13, 8: 6}
"""Fraction bits of q below E, by activation_bits: q = rint(x * 2**(shift - E))."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DEFAULT_STD = 0.01
DOMAIN_PRE = 0
DOMAIN_POST = 1


class Request(NamedTuple):
    """Which product of x [M, K] and P a backend is to compute: x @ P, or x + x @ P, at some columns.

    Every field has been checked (``ops.py``). A NamedTuple: a frozen dataclass takes three times as long to make, at
    each call.
    """

    domain: int
    """Which P of the seed: 0 before the model, 1 after it."""
    coefficient: float
    """`coefficient` of the std of the entries of P, a float32 value."""
    activation_bits: int
    """16 or 8."""
    columns: int
    """Columns of y."""
    residual: bool
    """Whether x is added."""
    column_start: int = 0
    """First column of P, and of x where it is added."""
    row_mask: Tensor | None = None
    """[M] bool on the device of x, any stride; where it is false, y is x at its columns."""


def check_activation_bits(activation_bits: int) -> None:
    """Raise a TypeError or ValueError unless activation_bits is the int 16 or 8."""
    if check_int("activation_bits", activation_bits) not in ACTIVATION_SHIFT:
        raise ValueError(f"activation_bits must be 16 or 8, got {activation_bits}")


def as_int(name: str, value: Any, takes: str = "an int") -> int:
    """Return the argument ``name``, an integer such as an int or one of numpy's, as an int (or symbolic).

    Raises:
        TypeError: it is something else, a truth value, or a tensor, which would have to be waited for.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if type(value).__name__ not in ("bool", "bool_") and not isinstance(value, torch.Tensor):  # numpy's as well
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")


def check_int(name: str, value: object) -> int:
    """Return `as_int` of the argument ``name``; raise a ValueError unless it fits 64 bits."""
    integer = as_int(name, value)
    if not isinstance(integer, torch.SymInt) and not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {integer}")
    return integer


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one")


def signed_seed(seed: int) -> int:
    """Return the 64 bits of ``seed`` as an int64 value.

    Args:
        seed: an int, or an integer of numpy, in [-2**63, 2**64): unsigned values above the int64 range keep their
            bits.

    Raises:
        TypeError: seed is not an int.
        ValueError: seed does not fit 64 bits.
    """
    seed = as_int("seed", seed, "an int of 64 bits")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an int of 64 bits, in [-2**63, 2**64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def seed_from_block_hash(block_hash: str) -> int:
    """Return the seed of a round, as an int64 value: the first 8 bytes of SHA-256 of the block hash, little endian.

    The block hash is hashed as UTF-8.

    Raises:
        TypeError: block_hash is not a str.
        ValueError: it is text that UTF-8 cannot encode.
    """
    if not isinstance(block_hash, str):
        raise TypeError(f"block_hash must be a str, got {type(block_hash).__name__}")
    return int.from_bytes(hashlib.sha256(encoded("block_hash", block_hash)).digest()[:8], "little", signed=True)


def encoded(name: str, text: str) -> bytes:
    """Return the argument ``name`` in UTF-8; raise a ValueError if it cannot be encoded."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can encode, got {error.reason}") from error


def _refused_std(std: object) -> ValueError:
    return ValueError(f"std must be positive with float32(std / {SIGMA:.4f}) finite and not zero, got {std}")


def as_std(std: Any) -> float:
    """Return a real number, such as a float or one of numpy's, as a float (or symbolic).

    Raises:
        TypeError: std is something else.
        ValueError: it is too large for any coefficient.
    """
    if type(std) is float or isinstance(std, torch.SymFloat):
        return std  # type: ignore[return-value]
    if isinstance(std, bool) or not isinstance(std, numbers.Real):
        raise TypeError(f"std must be a float, got {type(std).__name__}")
    try:
        return float(std)
    except OverflowError:
        raise _refused_std(std) from None


def coefficient(std: float) -> float:
    """Return float32(std / sigma), the constant that turns an integer e into an entry of P.

    Raises:
        TypeError: std is not a number.
        ValueError: std is not positive, or the result is zero or infinite in float32.
    """
    return _coefficient(as_std(std))


# Rounded in integers: a conversion to float32 by the CPU drops a subnormal where the caller has them flushed.
@functools.lru_cache(maxsize=64)
def _coefficient(std: float) -> float:
    ratio = std / SIGMA
    if 0 < ratio < math.inf:
        unit = max(math.frexp(ratio)[1] - 24, -149)
        value = math.ldexp(round(math.ldexp(ratio, -unit)), unit)
        if 0 < value < 2.0**128:
            return value
    raise _refused_std(std)


def seed_tensor(seed: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Make a seed as the ops take it: an int64 tensor of shape [] with the 64 bits of ``seed``, on ``device``.

    A tensor, not an int: compiled code is the same for every seed, and a captured CUDA graph replays with a new one.

    Raises:
        TypeError, ValueError: as `signed_seed`.
    """
    return torch.tensor(signed_seed(seed), dtype=torch.int64, device=device)
