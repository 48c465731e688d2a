"""Every tile of a device's table against the reference: the known answers of a first use take few of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import definition, reference
from ...definition import Request
from .. import self_test
from . import plan
from .tiles import Tile

Project = Callable[[Tensor, Tensor, Request, Tile, int], Tensor]
"""project(x, seed, request, tile, parts): by a tile, with K in parts."""
SIZES = (300, 1152, 512)
"""Rows, k and columns of a product with several tiles of each."""


def wrong_tiles(
    device: torch.device,
    project: Project,
    tiles_of: Callable[[int], Sequence[Tile]],
    parts: Sequence[int],
    arithmetic: str,
    *,
    sizes: tuple[int, int, int] = SIZES,
    beyond: int = 128,
) -> list[str]:
    """Return which tiles give other bits on a device than `poc_kernels.reference` on the CPU; empty if none does.

    It tries the tiles of ``tiles_of`` (activation_bits), with K in each of the ``parts`` (whole or cut); on bfloat16
    activations of several tiles of rows, two of these rows with the largest sums, and, in float16, more than one flush
    of sums. Then the largest tile with rows so long that they are read twice, in every dtype; of float32 and float16
    one takes K whole and the other in parts, the other way round for the other activation_bits.

    Args:
        device: with its index.
        project: what is tried.
        tiles_of: the tiles, by activation_bits.
        parts: numbers of parts of K, fewest first.
        arithmetic: in which tiles multiply, for what is returned.
        sizes: rows, k and columns of a product.
        beyond: k of long rows beyond the longest that are read once.
    """
    rows, k, columns = sizes
    few_columns = min(columns, 128 + columns % 16)
    long_k = plan.LONGEST_BLOCK + beyond
    wrong = []
    for bits, (of_float32, of_float16) in ((16, (parts[0], parts[-1])), (8, (parts[-1], parts[0]))):
        tiles = tiles_of(bits)
        forms = list(itertools.product(tiles, parts))
        wrong += wrong_forms(device, project, "bfloat16", (rows, k, columns), bits, arithmetic, forms)
        for dtype, cut in (("bfloat16", parts[0]), ("float32", of_float32), ("float16", of_float16)):
            wrong += wrong_forms(
                device, project, dtype, (rows, long_k, few_columns), bits, arithmetic, [(tiles[-1], cut)]
            )
    return wrong


def wrong_forms(
    device: torch.device,
    project: Project,
    dtype: str,
    sizes: tuple[int, int, int],
    bits: int,
    arithmetic: str,
    forms: Sequence[tuple[Tile, int]],
) -> list[str]:
    """Return which forms of a product (tile, parts of K) of ``sizes`` (rows, k, columns) are wrong on a device."""
    rows, k, columns = sizes
    x = self_test.activations({"dtype": dtype, "M": rows, "K": k, "x_amp": 4.0, "x_salt": rows})
    seed = definition.seed_tensor(-rows, "cpu")
    request = Request(
        domain=2**32 - 1,
        coefficient=definition.coefficient(definition.DEFAULT_STD),
        activation_bits=bits,
        columns=columns,
        residual=True,
        row_mask=torch.arange(rows, device="cpu") % 7 != 3,
    )
    # The largest sums, which ordinary rows do not come near: all products of column 0 have one sign.
    signs = reference.entries(seed, request.domain, 0, k, 0, 1)[:, 0].sign().to(x.dtype)
    x[0], x[1] = signs * 1.75, signs * -2.0
    expected = self_test.digest(reference.project(x, seed, request))
    assert request.row_mask is not None
    on_device = (x.to(device), seed.to(device), request._replace(row_mask=request.row_mask.to(device)))
    wrong = []
    for tile, splits in forms:
        y = project(*on_device, tile, splits)
        if self_test.digest(y) != expected:
            cut = "whole" if splits == 1 else f"in {splits} parts"
            wrong.append(f"{dtype}, {bits} bits in {arithmetic} by {tile}, K = {k} {cut}")
    return wrong
