"""The definition in plain torch: the oracle of the tests, and the last backend that is tried on any device.

Every integer here is below 2**53, so a float64 product of ``q`` and ``e`` is the exact sum that the definition asks
for. Devices without float64 get the same sum from float32 products of bytes, added up in int64 before they reach 2**24.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import definition
from .definition import Request

_WORD = 0xFFFFFFFF
_PANEL_ENTRIES = 2**18  # entries of P that exist at a time; drawing them takes less than 40 MiB
_EXACT_FLOAT32_K = 1024  # products of bytes whose sum float32 holds exactly: 128 * 124 * 1024 < 2**24


def _multiply_word(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of the product of two 32-bit numbers, in int64 without overflow."""
    low = (word & 0xFFFF) * constant
    high = (word >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 (Salmon et al., SC 2011) of 32-bit words in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(definition.PHILOX_ROUNDS):
        high0, low0 = _multiply_word(definition.PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_word(definition.PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 = (key0 + definition.PHILOX_KEY_INCREMENTS[0]) & _WORD
        key1 = (key1 + definition.PHILOX_KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def _panels(k: int, n: int) -> Iterator[tuple[int, int]]:
    """Yield the first column and the width of panels of k rows that together have n columns."""
    width = max(16, _PANEL_ENTRIES // max(k, 1))
    return ((start, min(width, n - start)) for start in range(0, n, width))


def entries(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    """Draw the integers e[k_start : k_start + k, n_start : n_start + n] as int16, on the device of ``seed``."""
    e = torch.empty(k, n, dtype=torch.int16, device=seed.device)
    if k > 0:
        for start, width in _panels(k, n):
            e[:, start : start + width] = _draw(seed, domain, k_start, k, n_start + start, width)
    return e


def _draw(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    device = seed.device
    seed = seed.reshape(())
    per_call = definition.ENTRIES_PER_CALL
    first, last = k_start // per_call, (k_start + k - 1) // per_call
    calls = torch.arange(first, last + 1, device=device)[:, None]
    columns = torch.arange(n_start, n_start + n, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((calls, columns, zero + domain, zero), (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(words, dim=1)[:, :, None, :]  # [call, word, 1, n]
    i = torch.arange(4, device=device)[:, None]  # [i, 1]
    table_a = torch.tensor(definition.TABLE_A, device=device)
    table_b = torch.tensor(definition.TABLE_B, device=device)
    u = table_a[(word >> (4 * i)) & 7] + table_b[(word >> (16 + 4 * i)) & 7]
    sign = 1 - 2 * ((word >> (4 * i + 3)) & 1)
    e = ((2 * u + 1) * sign).reshape(-1, n).to(torch.int16)  # [(call, word, i), n]
    offset = k_start - first * per_call
    return e[offset : offset + k]


class Quantised(NamedTuple):
    """Rows of activations as integers with a power-of-two scale: x ~ q * 2**(exponent - shift)."""

    q: Tensor
    """[M, K] float32 integers, |q| <= 16384 at 16 bits and 127 at 8."""
    exponent: Tensor
    """[M, 1] int32, E."""
    finite: Tensor
    """[M, 1] bool; q of a row that is not finite is zero."""
    shift: int


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def quantise(x: Tensor, activation_bits: int) -> Quantised:
    """Round the rows of ``x`` [M, K] to integers; ``activation_bits`` is 16 or 8."""
    shift = definition.ACTIVATION_SHIFT[activation_bits]
    wide = x.to(torch.float32)
    largest = (wide.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True)
    finite = largest < 0x7F800000
    exponent = torch.where(finite, (largest >> 23) - 127, definition.MIN_EXPONENT).clamp(min=definition.MIN_EXPONENT)
    q = torch.where(finite, wide, 0.0).mul_(_power_of_two(shift - exponent)).round_()
    if activation_bits == 8:
        q.clamp_(-127, 127)
    return Quantised(q, exponent, finite, shift)


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def partial_sums(q: Tensor, e: Tensor) -> Tensor:
    """Return the exact sums over k of q[m, k] * e[k, n]: float64 for q in float64, int64 for q in float32.

    Sums over parts of K add up to the sum over the whole: that is how a product may be split.
    """
    if q.dtype == torch.float64:
        return q @ e.double() + 0.0  # an integer has no -0
    low = (q + 128).remainder(256) - 128
    high = (q - low) / 256
    v = ((e - 1) // 2).float()
    sums = torch.zeros(q.shape[0], e.shape[1], dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for k in range(0, q.shape[1], _EXACT_FLOAT32_K):
            part = slice(k, k + _EXACT_FLOAT32_K)
            sums += 256 * (high[:, part] @ v[part]).long() + (low[:, part] @ v[part]).long()
    return 2 * sums + q.long().sum(dim=1, keepdim=True)


def _round_to(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.bfloat16:
        return y.to(dtype)
    # In integers: the conversion of some devices drops subnormals.
    bits = y.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def finish(sums: Tensor, rows: Quantised, coefficient: float, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Round exact sums [M, N] to y [M, N] in ``dtype``; ``residual`` [M, N] is x at the columns of y, or None."""
    g = (sums.to(torch.float32) * coefficient) * _power_of_two(rows.exponent - rows.shift)
    if residual is not None:
        g = residual.to(torch.float32) + g
    y = _round_to(g, dtype)
    return torch.where(rows.finite, y, torch.full((), float("nan"), dtype=dtype, device=y.device))


def project(x: Tensor, seed: Tensor, request: Request) -> Tensor:
    """Compute x @ P, or x + x @ P, for ``x`` [M, K]: [M, columns] in the dtype of x, by panels of P."""
    domain, coefficient, activation_bits, columns, residual, column_start, row_mask = request
    rows = quantise(x, activation_bits)
    y = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
    q = rows.q.double() if _has_float64(x.device) else rows.q
    for n, width in _panels(x.shape[1], columns):
        e = _draw(seed, domain, 0, x.shape[1], column_start + n, width)
        at_columns = x[:, column_start + n : column_start + n + width] if residual else None
        y[:, n : n + width] = finish(partial_sums(q, e), rows, coefficient, at_columns, x.dtype)
    if row_mask is not None:
        y = torch.where(row_mask[:, None], y, x[:, column_start : column_start + columns])
    return y
