"""A reflection of the hidden states after every decoder layer, the same for all nonces and nodes of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..artifacts.tensors import norms
from ..engine import Engine
from ..form_kernels import on
from ..inputs import normal, seed32


def layer_axes(block_hash: str, layers: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the unit vectors that states are reflected along: float32 [layers, dim], one for each layer from 0 on."""
    directions = normal([seed32(f"{block_hash}_layer_{layer}_householder") for layer in range(layers)], dim, device)
    return directions / norms(directions)


class Reflections:
    """Replaces states x by x - 2 (x.v) v in place, with v that of the layer: a `LayerTransform`.

    Each step is rounded in the states' dtype, as the network's nodes do.

    Attributes:
        axes: [layers, hidden_size] in the engine's dtype; its place in memory stays.
    """

    def __init__(self, engine: Engine) -> None:
        self.axes = torch.zeros(engine.layers, engine.hidden_size, dtype=engine.dtype, device=engine.device)
        self._functions = on(engine.device)
        self._block_hash: str | None = None

    def set_block(self, block_hash: str) -> None:
        """Draw the unit vectors of another block."""
        if self._block_hash != block_hash:
            layers, dim = self.axes.shape
            self.axes.copy_(layer_axes(block_hash, layers, dim, self.axes.device))
            self._block_hash = block_hash

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """Reflect states [batch, seq_len, hidden_size] after a layer, and return them."""
        self._functions.reflect(states, self.axes[layer])
        return states
