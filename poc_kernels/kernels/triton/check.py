"""Every tile of a device's table against the reference: the known answers of a first use take few of them."""

from __future__ import annotations

import itertools

import torch

from ... import definition, reference
from ...definition import Request
from .. import self_test
from . import product
from . import tiles as tile_table
from .tiles import Tile


def wrong_tiles(device: torch.device) -> list[str]:
    """Return which tiles give other bits on a device than `poc_kernels.reference` on the CPU; empty if none does.

    It tries the tiles of the device's table for both activation_bits, in the arithmetic that calls would take, with K
    whole and (except on AMD's) in two parts; on bfloat16 activations of several tiles of rows, two of these rows with
    the largest sums, and, in float16, more than one flush of sums. Then the largest tile with rows so long that they
    are read twice, in every dtype; of float32 and float16 one takes K whole and the other in parts, the other way round
    for the other activation_bits.
    """
    capability, _ = product.hardware(device)
    arithmetic = product.choose_arithmetic(capability)
    parts = tile_table.forms_of_k(capability)
    k, columns = (140, 20) if product.INTERPRETED else (1152, 512)
    long_k, few_columns = product.LONGEST_BLOCK + 128, 20 if product.INTERPRETED else 128
    wrong = []
    for bits, (of_float32, of_float16) in ((16, (parts[0], parts[-1])), (8, (parts[-1], parts[0]))):
        tiles = tile_table.tiles(capability, bits, arithmetic)
        forms = list(itertools.product(tiles, parts))
        wrong += _wrong_forms(device, "bfloat16", k, columns, bits, arithmetic, forms)
        for dtype, splits in (("bfloat16", parts[0]), ("float32", of_float32), ("float16", of_float16)):
            wrong += _wrong_forms(device, dtype, long_k, few_columns, bits, arithmetic, [(tiles[-1], splits)])
    return wrong


def _wrong_forms(
    device: torch.device, dtype: str, k: int, columns: int, bits: int, arithmetic: str, forms: list[tuple[Tile, int]]
) -> list[str]:
    """Return which forms of a product (tile, number of parts of K) give other bits than the reference on the CPU."""
    rows = 20 if product.INTERPRETED else 300
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
        y = product.project(*on_device, tile=tile, splits=splits, arithmetic=arithmetic)
        if self_test.digest(y) != expected:
            cut = "whole" if splits == 1 else f"in {splits} parts"
            wrong.append(f"{dtype}, {bits} bits in {arithmetic} by {tile}, K = {k} {cut}")
    return wrong
