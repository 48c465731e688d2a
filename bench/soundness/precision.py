"""Copies of a model in lower precision: weights and activations are rounded to what fewer bits can hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64
"""Weights that share a scale in 4 bits."""
_FP8_MAX = 448.0


def _scaled(x: Tensor, largest: float) -> Tensor:
    """Return the scale of each row of float32 x with which its largest number becomes ``largest``."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / largest


def integers(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Round x [..., n] to signed integers of some bits times a scale per row, or per group of its numbers."""
    rows = x.float() if group is None else x.float().unflatten(-1, (-1, group))
    largest = 2 ** (bits - 1) - 1
    scale = _scaled(rows, largest)
    return ((rows / scale).round().clamp(-largest, largest) * scale).view(x.shape).to(x.dtype)


def fp8(x: Tensor) -> Tensor:
    """Round x [..., n] to float8_e4m3fn times a scale per row."""
    scale = _scaled(x.float(), _FP8_MAX)
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def _int4(x: Tensor) -> Tensor:
    return integers(x, 4, GROUP if x.shape[-1] % GROUP == 0 else None)


def _int8(x: Tensor) -> Tensor:
    return integers(x, 8)


PRECISIONS = {
    "int8 weights and activations": (_int8, _int8),
    "4-bit weights, groups of 64": (_int4, None),
    "fp8 weights": (fp8, None),
    "fp8 weights and activations": (fp8, fp8),
}
"""How weights are rounded, and activations before each linear layer."""


def rounded_copy(model: Any, name: str) -> Any:
    """Copy a model, with the matrices of its layers, not its embeddings and head, in one of `PRECISIONS`."""
    of_weights, of_activations = PRECISIONS[name]
    copied = copy.deepcopy(model)
    ends = [copied.get_input_embeddings(), copied.get_output_embeddings()]
    kept = {id(module.weight) for module in ends}
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.dim() >= 2 and id(parameter) not in kept:
                parameter.copy_(of_weights(parameter))
    if of_activations is not None:
        for module in copied.modules():
            if isinstance(module, nn.Linear) and module is not ends[1]:
                module.register_forward_pre_hook(lambda _, given: (of_activations(given[0]), *given[1:]))
    return copied
