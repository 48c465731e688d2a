# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803  (constants of a kernel are written in capitals)
"""What vectors and fingerprints compute over whole tensors, in Triton.

The functions are those of `poc_kernels.protocol.plain_forms`, with the same bits, except for the last one where the
order of a sum shows: here positions are added one after the other, and a row's products as Triton reduces a tile.

Estimated, not measured: each of them reads and writes its tensors once, and is bound by that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton import device as on_tile
from . import plain_forms

_CALLS = 8
"""Calls of Philox per program: each gives 128 signs."""
_BLOCK = 256
"""Features per program of a mix."""
_WARPS = 4
_MAX_WARPS = 16


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _store_word(at, word, first, count, BITS: tl.constexpr):
    """Store the 32 bits of words [CALLS] as sign bits, at the places ``first`` [CALLS] and those that follow."""
    place = tl.arange(0, 32)
    index = first[:, None] + place[None, :]
    bit = (word[:, None] >> place[None, :].to(tl.uint32)) & 1
    tl.store(at + index, (bit << (BITS - 1)).to(at.dtype.element_ty), mask=index < count)


@triton.jit(do_not_specialize=["layer_stride", "row_stride", "count"])
def signs_kernel(seeds, out, layer_stride, row_stride, count, CALLS: tl.constexpr, BITS: tl.constexpr):
    """Write out [layers, rows, count]: each program draws CALLS times 128 signs of a layer of a row."""
    row, layer = tl.program_id(1), tl.program_id(2)
    call = tl.program_id(0) * CALLS + tl.arange(0, CALLS)
    layers = (layer + tl.zeros_like(call)).to(tl.uint32)
    w0, w1, w2, w3 = on_tile.philox(call.to(tl.uint32), layers, layer * 0, tl.load(seeds + row))
    at = out + layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride
    _store_word(at, w0, call * 128, count, BITS)
    _store_word(at, w1, call * 128 + 32, count, BITS)
    _store_word(at, w2, call * 128 + 64, count, BITS)
    _store_word(at, w3, call * 128 + 96, count, BITS)


@triton.jit(do_not_specialize=["row_stride", "position_stride", "pairs", "width"])
def mix_kernel(states, masks, out, row_stride, position_stride, pairs, width, BLOCK: tl.constexpr):
    """Write out [rows, width]: each program adds up BLOCK features of a row."""
    row = tl.program_id(1)
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < width
    at = states + row.to(tl.int64) * row_stride + feature
    total = tl.zeros([BLOCK], tl.float64)
    for pair in range(pairs):
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + position_stride, mask=inside, other=0.0).to(tl.float32)
        flipped = (first - second).to(tl.int32, bitcast=True) ^ tl.load(masks + row * pairs + pair)
        total += flipped.to(tl.float32, bitcast=True).to(tl.float64)
        at += 2 * position_stride
    tl.store(out + row.to(tl.int64) * width + feature, total.to(tl.float32), mask=inside)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """Round float32 values to nearest even in ``dtype``, and return them as float32."""
    if dtype == tl.bfloat16:  # in integers: the interpreter's own conversion truncates
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        result = tl.where(value == value, nearest, value)  # a NaN's bits could overflow
    else:
        result = value.to(dtype).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["width"])
def reflect_kernel(states, axis, width, BLOCK: tl.constexpr):
    """Reflect states [positions, width] in place: each program a position."""
    dtype: tl.constexpr = states.dtype.element_ty
    feature = tl.arange(0, BLOCK)
    inside = feature < width
    at = states + tl.program_id(0).to(tl.int64) * width + feature
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(axis + feature, mask=inside, other=0.0).to(tl.float32)
    twice = 2.0 * _rounded(tl.sum(_rounded(x * v, dtype)), dtype)
    tl.store(at, _rounded(x - _rounded(twice * v, dtype), dtype).to(dtype), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def sign_masks(seeds: Tensor, out: Tensor) -> None:
    """Write signs of all layers and rows in one launch: see `poc_kernels.protocol.plain_forms.sign_masks`."""
    layers, rows, count = out.shape
    if out.numel() > 0:
        grid = (triton.cdiv(count, 128 * _CALLS), rows, layers)
        with torch.cuda.device_of(out):
            signs_kernel[grid](
                seeds, out, out.stride(0), out.stride(1), count, CALLS=_CALLS, BITS=8 * out.element_size(), num_warps=1
            )


def mixed(states: Tensor, masks: Tensor) -> Tensor:
    """Mix positions: see `poc_kernels.protocol.plain_forms.mixed`. The last stride of ``states`` is 1."""
    rows, positions, width = states.shape
    out = torch.empty(rows, width, dtype=torch.float32, device=states.device)
    if out.numel() > 0:
        with torch.cuda.device_of(states):
            mix_kernel[triton.cdiv(width, _BLOCK), rows](
                states,
                masks,
                out,
                states.stride(0),
                states.stride(1),
                positions // 2,
                width,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return out


def reflect(states: Tensor, axis: Tensor) -> None:
    """Reflect states in place: see `poc_kernels.protocol.plain_forms.reflect`, which does it with gaps in memory."""
    width = states.shape[-1]
    if not states.is_contiguous():
        plain_forms.reflect(states, axis)
    elif states.numel() > 0:
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(states):
            reflect_kernel[(states.numel() // width,)](
                states,
                axis,
                width,
                BLOCK=block,
                num_warps=min(_MAX_WARPS, max(1, block // 256)),
                enable_fp_fusion=False,
            )
