"""What a round needs of a served model. Another serving stack implements this in a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..scheduling.slices import Pause, Slices

LayerTransform = Callable[[int, Tensor], Tensor]
"""Gets the number of a decoder layer, from 0 on, and hidden states that it returned, [batch, seq_len, hidden_size];
returns what the model goes on with, of that shape and dtype, perhaps the same tensor, changed in place. Where layers
return a residual apart, which the next norm adds, it is called for both. Other tensors that it reads have to lie at
the same place in every call: a captured forward reads them anew without calling it. It is hashable."""


def never() -> None:
    """Do nothing: the `Pause` of a batch that nobody interrupts."""


class Engine(Protocol):
    """A causal language model that computes proofs on the very weights that serve users.

    The manager calls `forward` with one fixed shape for a whole round, from one thread at a time, on the current
    stream. Nothing that it calls may change what the model answers to users.
    """

    hidden_size: int
    """Features of an input embedding, and of a hidden state."""
    vocab_size: int
    """Columns of the logits."""
    max_positions: int
    """Longest sequence that the model takes."""
    dtype: torch.dtype
    """dtype of input embeddings and hidden states: float32, bfloat16 or float16."""
    model_type: str
    """The kind of model, as transformers' configurations name it; empty where none does."""
    device: torch.device
    """Where input embeddings are taken, and hidden states given."""

    @property
    def slices(self) -> Slices | None:
        """The slices of the forward; None until they are measured, or where it is not cut."""

    @property
    def layers(self) -> int:
        """Number of decoder layers.

        Raises:
            ValueError: a transform after each layer is not possible with this model; it says why.
        """

    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the last hidden states [batch, seq_len, hidden_size], after the final norm, of input embeddings.

        Causal, positions 0 .. seq_len - 1, no KV cache. The result may be overwritten by the next call. Calls ``pause``
        as often as it likes between its kernels, on the same thread and stream, so that validation can make room for
        users (`poc_kernels.scheduling.SlicedForward`); bits must not depend on it. What each decoder layer returns goes
        through ``after_layer``, where there is one: hand in the same object for every forward of its kind, since a
        forward is measured and captured with it.

        Raises:
            ValueError, TypeError: inputs_embeds is not [batch, seq_len, hidden_size] in the engine's dtype; there is a
                transform, and `layers` raises.
        """

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [rows, vocab_size] of hidden states [rows, hidden_size], just as the model does."""


def check_inputs(engine: Engine, inputs_embeds: Tensor) -> None:
    """Raise a ValueError or TypeError if these are not [batch, seq_len, hidden_size] in the engine's dtype."""
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != engine.hidden_size:
        raise ValueError(
            f"inputs_embeds must have shape [batch, seq_len, {engine.hidden_size}], got {list(inputs_embeds.shape)}"
        )
    if inputs_embeds.dtype != engine.dtype:
        raise TypeError(f"inputs_embeds must be {engine.dtype}, got {inputs_embeds.dtype}")
