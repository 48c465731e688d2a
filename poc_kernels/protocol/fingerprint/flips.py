"""Sign flips of the hidden states after every decoder layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine import Engine
from ..form_kernels import on
from .signs import seeds_on


class Flips:
    """Changes signs of states in place, by the row, the layer and the feature: a `LayerTransform`.

    It is exact in every dtype, as a sign is a bit.

    Args:
        engine: whose states they are.
        rows: of a forward.

    Attributes:
        masks: integers [layers, rows, 1, hidden_size] of the width of the engine's dtype, the sign bit set where a sign
            changes; its place in memory stays.
    """

    def __init__(self, engine: Engine, rows: int) -> None:
        self._integer = torch.int32 if engine.dtype == torch.float32 else torch.int16
        shape = (engine.layers, rows, 1, engine.hidden_size)
        self.masks = torch.zeros(shape, dtype=self._integer, device=engine.device)

    @property
    def rows(self) -> int:
        """Rows of a forward."""
        return self.masks.shape[1]

    def narrowed(self, rows: int) -> Flips:
        """Return flips for forwards of fewer rows, in the same memory: each of the two draws over the other."""
        flips = copy.copy(self)
        flips.masks = self.masks[:, :rows]
        return flips

    def release(self) -> None:
        """Give back the memory, whoever remembers this."""
        self.masks = self.masks.new_empty(0)

    def draw(self, some: slice, seeds: Sequence[int]) -> None:
        """Draw the signs of some rows, from the flips' seed of each."""
        device = self.masks.device
        on(device).sign_masks(seeds_on(device, seeds), self.masks[:, some].squeeze(2))

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """Flip states [rows, seq_len, hidden_size] after a layer, and return them."""
        states.view(self._integer).bitwise_xor_(self.masks[layer])
        return states
