"""The projection by the package's machine code, behind the backend signature.

The kernels, their order and what they are given are those of `poc_kernels.kernels.triton.product`; nothing of Triton is
needed to launch them. Everything runs on torch's current stream, waits for nothing, and allocates through torch, so
that it may be captured once its kernels are loaded (`warmup`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...definition import Request
from ..triton import check, plan
from ..triton import tiles as tile_table
from ..triton.plan import Plan
from ..triton.tiles import Tile
from . import forms, launcher

_MAX_COLUMNS = 2**31 - 128
"""Of one launch, which counts them in int32."""
_MAX_STRIDE = 2**31 - 1
_ALIGNMENT = 256
"""Bytes to which the parts of the workspace are aligned."""


class _Launches(NamedTuple):
    """The two launches of a product, except for its addresses and what changes from call to call."""

    quantise: Callable[..., None]
    product: Callable[..., None]
    plan: Plan
    exponents: int
    """Bytes from the start of the workspace, as in the next three."""
    sums: int
    totals: int
    arrived: int
    workspace: int
    """Bytes of it."""


@functools.lru_cache(maxsize=4096)
def _launches(
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    k: int,
    columns: int,
    bits: int,
    aligned_rows: bool,
    tile: Tile | None,
    parts: int,
) -> _Launches:
    capability, sms = plan.hardware(device)
    aligned_columns = columns % 16 == 0
    tile = tile or forms.choose(capability, m, bits, aligned_columns)
    cut = plan.plan(m, k, columns, bits, tile, sms, capability, parts)
    code = plan.DTYPE_CODES[dtype]
    limb_bytes = 2 if tile_table.arithmetic(capability) == "fp16" else 1
    exponents = _aligned(limb_bytes * cut.panels * cut.planes * cut.padded_rows * plan.PANEL)
    sums = exponents + _aligned(4 * cut.padded_rows)
    totals = sums + _aligned(4 * cut.padded_rows)
    return _Launches(
        launcher.launch_of(device, forms.quantise_name(code, bits, tile.run, k, aligned_rows)),
        launcher.launch_of(device, forms.product_name(code, bits, tile, cut.parts, aligned_columns)),
        cut,
        exponents,
        sums,
        totals,
        arrived=totals + 4 * cut.totals,
        workspace=totals + 4 * cut.cleared,
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def project(x: Tensor, seed: Tensor, request: Request, tile: Tile | None = None, parts: int = 0) -> Tensor:
    """Compute x @ P, or x + x @ P, for ``x`` [M, K] on a GPU: [M, columns] in the dtype of x.

    ``tile`` and ``parts`` of K are the table's unless given; none changes a bit. Workspace: as that of
    `poc_kernels.kernels.triton.product.project`, in one piece.
    """
    columns, row_mask = request.columns, request.row_mask
    if columns > _MAX_COLUMNS:
        return _by_shards(x, seed, request)
    m, k = x.shape
    if (k > 1 and x.stride(1) != 1) or x.stride(0) > _MAX_STRIDE:
        x = x.contiguous()
    row_stride = x.stride(0) if m > 1 else 0
    device, address = x.device, x.data_ptr()
    aligned_rows = (address | k | row_stride) % 16 == 0
    launches = _launches(device, x.dtype, m, k, columns, request.activation_bits, aligned_rows, tile, parts)
    cut = launches.plan
    y = torch.empty(m, columns, dtype=x.dtype, device=device)
    workspace = torch.empty(launches.workspace, dtype=torch.uint8, device=device)
    limbs = workspace.data_ptr()
    exponents, sums, totals = limbs + launches.exponents, limbs + launches.sums, limbs + launches.totals
    mask, masked_rows = limbs, 0
    if row_mask is not None:
        row_mask = row_mask.contiguous()
        mask, masked_rows = row_mask.data_ptr(), m
    index, stream = launcher.current_stream(device)
    numbers = plan.quantise_numbers(cut, m, k, row_stride, masked_rows)
    launches.quantise(index, stream, m + cut.clearing, 1, address, limbs, exponents, sums, totals, mask, *numbers)
    launches.product(
        index,
        stream,
        cut.tiles,
        cut.parts,
        address,
        limbs,
        exponents,
        sums,
        totals,
        limbs + launches.arrived,
        mask,
        y.data_ptr(),
        seed.data_ptr(),
        *plan.product_numbers(cut, m, row_stride, masked_rows, request),
    )
    return y


def _by_shards(x: Tensor, seed: Tensor, request: Request) -> Tensor:
    """Compute a product of more columns than a launch counts; takes twice the memory of its result."""
    starts = range(0, request.columns, _MAX_COLUMNS)
    shards = [
        request._replace(column_start=request.column_start + start, columns=min(_MAX_COLUMNS, request.columns - start))
        for start in starts
    ]
    return torch.cat([project(x, seed, shard) for shard in shards], dim=1)


def entries(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    """Draw the integers e[k_start : k_start + k, n_start : n_start + n] as int16 on a GPU."""
    if n > _MAX_COLUMNS:
        starts = range(0, n, _MAX_COLUMNS)
        windows = [(n_start + start, min(_MAX_COLUMNS, n - start)) for start in starts]
        return torch.cat([entries(seed, domain, k_start, k, *window) for window in windows], dim=1)
    out = torch.empty(k, n, dtype=torch.int16, device=seed.device)
    if out.numel() > 0:
        launcher.launch_of(seed.device, "entries")(
            *launcher.current_stream(seed.device),
            *plan.entries_grid(k_start, k, n),
            seed.data_ptr(),
            out.data_ptr(),
            plan.signed_word(domain),
            k_start,
            k,
            plan.signed_word(n_start),
            n,
        )
    return out


def warmup(
    device: torch.device | str, dim: int, *, dtype: torch.dtype = torch.bfloat16, activation_bits: int = 16
) -> None:
    """Load what ``residual_projection`` takes for activations [..., dim], whatever their number, strides and shards."""
    device = torch.empty(0, device=device).device  # with its index
    capability, _ = plan.hardware(device)
    code = plan.DTYPE_CODES[dtype]
    for aligned in (True, False):
        for tile in forms.tiles(capability, activation_bits, aligned):
            launcher.launch_of(device, forms.quantise_name(code, activation_bits, tile.run, dim, aligned))
            for parts in tile_table.forms_of_k(capability):
                launcher.launch_of(device, forms.product_name(code, activation_bits, tile, parts, aligned))


def wrong_tiles(device: torch.device) -> list[str]:
    """Return which tiles are wrong on a device (`check.wrong_tiles`), at widths that are divisible by 16 and others."""
    capability, _ = plan.hardware(device)
    arithmetic, parts = tile_table.arithmetic(capability), tile_table.forms_of_k(capability)
    wrong = []
    for aligned, sizes, beyond in ((True, check.SIZES, 128), (False, (300, 1151, 511), 127)):
        tiles_of = functools.partial(_tiles, capability, aligned)
        wrong += check.wrong_tiles(device, project, tiles_of, parts, arithmetic, sizes=sizes, beyond=beyond)
    return wrong


def _tiles(capability: tuple[int, int], aligned: bool, bits: int) -> tuple[Tile, ...]:
    return forms.tiles(capability, bits, aligned)
