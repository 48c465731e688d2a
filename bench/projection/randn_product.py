"""A peer of the op: P drawn inside a product in the common way, by tl.randn, one Philox call for each entry.

Entries are rounded to x's dtype. They depend only on the seed and their position, as the op's do, but the sums are
floating point.
"""
# ruff: noqa: N803  (constants of a kernel are in capitals)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _entries(seed, k, n, n_total, std, dtype: tl.constexpr):
    return (tl.randn(seed, k[:, None] * n_total + n[None, :]) * std).to(dtype)


# `size` is specialised, on being a multiple of 16 as every D here is: so Triton knows that rows are aligned.
@triton.jit(do_not_specialize=["m_total", "seed"])
def randn_product_kernel(
    x, y, m_total, size, seed, std, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):
    """Compute y [m, k] = x + x @ P for x [m, k]; each tile of rows draws its own tiles of P [INNER, COLUMNS]."""
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, INNER):
        k = start + inner
        rows = tl.load(x + m[:, None] * size + k[None, :], mask=(m[:, None] < m_total) & (k[None, :] < size), other=0.0)
        sums = tl.dot(rows, _entries(seed, k, n, size, std, x.dtype.element_ty), sums)
    at = m[:, None] * size + n[None, :]
    inside = (m[:, None] < m_total) & (n[None, :] < size)
    tl.store(
        y + at, (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["seed"])
def randn_matrix_kernel(p, size, seed, std, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Write P itself, which the product is checked with."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(1) * INNER + tl.arange(0, INNER)
    inside = (k[:, None] < size) & (n[None, :] < size)
    tl.store(p + k[:, None] * size + n[None, :], _entries(seed, k, n, size, std, p.dtype.element_ty), mask=inside)


def _tile(rows: int) -> dict[str, Any]:
    tile_rows = min(max(16, triton.next_power_of_2(rows)), 128)
    return {"ROWS": tile_rows, "COLUMNS": 128 if tile_rows >= 64 else 64, "INNER": 64}


def randn_product(x: Tensor, seed: int, std: float = 0.01) -> Tensor:
    """Return x + x @ P for a contiguous x [M, D] with D * D < 2**31."""
    rows, size = x.shape
    y, tile = torch.empty_like(x), _tile(rows)
    grid = (triton.cdiv(size, tile["COLUMNS"]), triton.cdiv(rows, tile["ROWS"]))
    randn_product_kernel[grid](x, y, rows, size, seed, std, **tile, num_warps=4 if tile["ROWS"] < 64 else 8)
    return y


def randn_matrix(size: int, seed: int, dtype: torch.dtype, device: torch.device, std: float = 0.01) -> Tensor:
    """Return the P [D, D] of `randn_product`."""
    p = torch.empty(size, size, dtype=dtype, device=device)
    blocks = triton.cdiv(size, 64)
    randn_matrix_kernel[(blocks, blocks)](p, size, seed, std, INNER=64, COLUMNS=64)
    return p
