"""What the suites call, and the checks that results pass before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def op(x: Tensor, seed: Tensor, activation_bits: int) -> Call:
    """Return the call of the op that is measured."""
    return lambda: torch.ops.poc_kernels.residual_projection(x, seed, activation_bits=activation_bits)


def some_rows(x: Tensor) -> list[int]:
    """Return the first, a middle and the last row of ``x``, whose results are compared."""
    return sorted({0, len(x) // 2, len(x) - 1})


def assert_same_bits(what: str, y: Tensor, expected: Tensor, rows: list[int]) -> None:
    """Fail unless ``rows`` of y are, bit for bit, ``expected``."""
    integer = torch.int16 if y.dtype == torch.bfloat16 else torch.int32
    wrong = (y[rows].to(expected.device).view(integer) != expected.view(integer)).nonzero()
    assert len(wrong) == 0, (
        f"{what}: {len(wrong)} values differ, first at [row, column] of rows {rows}: {wrong[0].tolist()}"
    )


def exact_row(x: Tensor, p: Tensor) -> Tensor:
    """Return x + x @ P for one row x [D] and P [D, D], computed in float64."""
    row = x.double()
    parts = zip(row.split(1024), p.split(1024), strict=True)
    return row + sum(part @ matrix.double() for part, matrix in parts)


def assert_near(what: str, y: Tensor, exact: Tensor, limit: float) -> None:
    """Fail if the row y is farther from ``exact`` than ``limit``, as a relative error by norm."""
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= limit, f"{what}: relative error {error:.2e}, at most {limit:.2e} is right"
