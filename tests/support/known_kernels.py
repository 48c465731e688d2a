"""Kernels whose machine code is known, in a module that the process which compiles them can import."""
# ruff: noqa: N803  (constants of a kernel are written in capitals)

import triton
import triton.language as tl


@triton.jit
def int8_product(x_ptr, p_ptr, y_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros((M, N), tl.int32)
    for start in range(0, k, K):
        x = tl.load(x_ptr + rows[:, None] * k + (start + inner)[None, :])
        p = tl.load(p_ptr + (start + inner)[:, None] + columns[None, :] * k)
        sums = tl.dot(x, p, sums, out_dtype=tl.int32)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], sums)


@triton.jit
def fused(x_ptr, y_ptr, factor):
    x = tl.load(x_ptr)
    tl.store(y_ptr, x * factor + x)
