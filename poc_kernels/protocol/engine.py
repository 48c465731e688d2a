"""What a round needs of a served model. Another serving stack implements this in a page."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..scheduling.slices import Pause, Slices


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
    device: torch.device
    """Where input embeddings are taken, and hidden states given."""

    @property
    def slices(self) -> Slices | None:
        """The slices of the forward; None until they are measured, or where it is not cut."""

    def forward(self, inputs_embeds: Tensor, pause: Pause = never) -> Tensor:
        """Compute the last hidden states [batch, seq_len, hidden_size], after the final norm, of input embeddings.

        Causal, positions 0 .. seq_len - 1, no KV cache. The result may be overwritten by the next call. Calls ``pause``
        as often as it likes between its kernels, on the same thread and stream, so that validation can make room for
        users (`poc_kernels.scheduling.SlicedForward`); bits must not depend on it.
        """

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [rows, vocab_size] of hidden states [rows, hidden_size], just as the model does."""
