"""What vectors and fingerprints compute over whole tensors, by torch's operators: for CPUs, and GPUs without Triton.

`poc_kernels.protocol.triton_forms` has the same functions as kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import philox4x32

_BITS_PER_CALL = 128
_WORD = 0xFFFFFFFF


def sign_bits(seeds: Tensor, layers: int, count: int) -> Tensor:
    """Draw bits, 1 for a minus: int32 [rows, layers, count].

    Bit i of a layer is bit i % 128 of Philox4x32-10 with counter (i // 128, layer, 0, 0), under the row's seed.

    Args:
        seeds: int64 [rows].
        layers: how many layers.
        count: bits per layer.
    """
    device = seeds.device
    seed = seeds.view(-1, 1, 1)
    layer = torch.arange(layers, device=device).view(1, -1, 1)
    call = torch.arange((count + _BITS_PER_CALL - 1) // _BITS_PER_CALL, device=device).view(1, 1, -1)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    words = philox4x32((call, layer, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(words, dim=-1).to(torch.int32)  # [rows, layers, calls, 4]
    place = torch.arange(32, dtype=torch.int32, device=device)
    bits = (word.unsqueeze(-1) >> place).bitwise_and_(1)
    return bits.flatten(2)[..., :count]


def sign_masks(seeds: Tensor, out: Tensor) -> None:
    """Write the bits of `sign_bits` as sign bits of integers.

    Args:
        seeds: int64 [rows].
        out: int16 or int32 [layers, rows, count], with any strides except the last.
    """
    layers, _, count = out.shape
    bits = sign_bits(seeds, layers, count).transpose(0, 1).to(out.dtype)
    torch.bitwise_left_shift(bits, 8 * out.element_size() - 1, out=out)


def mixed(states: Tensor, masks: Tensor) -> Tensor:
    """Sum the differences of neighbouring positions, some with their signs changed: float32 [rows, hidden_size].

    Differences are float32; their sum is float64, and rounded once.

    Args:
        states: [rows, 2 * pairs, hidden_size], taken as float32.
        masks: int32 [rows, pairs], of `sign_masks`.
    """
    rows, _, width = states.shape
    result = torch.empty(rows, width, dtype=torch.float32, device=states.device)
    # A row at a time: the order in which torch adds depends on the shape.
    for row in range(rows):
        pairs = states[row].view(-1, 2, width)
        difference = pairs[:, 0].float() - pairs[:, 1].float()
        difference.view(torch.int32).bitwise_xor_(masks[row, :, None])
        result[row] = difference.sum(0, dtype=torch.float64)
    return result


def reflect(states: Tensor, axis: Tensor) -> None:
    """Replace states x by x - 2 (x.v) v in place, each step rounded in their dtype.

    The steps are x * v; their sum, accumulated in float32; twice the sum, times v; the difference.

    Args:
        states: [batch, seq_len, hidden_size].
        axis: [hidden_size] in the states' dtype, v.
    """
    for some in states if states.device.type == "cpu" else [states]:  # a row at a time stays in a CPU's caches
        along = some * axis
        twice = along.sum(-1, keepdim=True).mul_(2)
        some.sub_(torch.mul(axis, twice, out=along))
