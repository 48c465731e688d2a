"""What a round needs of a served model. Another serving stack implements this in a page."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..scheduling.slices import Pause


def never() -> None:
    """The `Pause` of a batch that nobody interrupts."""


class Engine(Protocol):
    """A causal language model that computes proofs on the very weights that serve users.

    The manager calls `forward` with one fixed shape for a whole round, from one thread at a time, on the current
    stream. Nothing that it calls may change what the model answers to users.
    """

    @property
    def hidden_size(self) -> int:
        """Features of an input embedding, and of a hidden state."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model takes."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of input embeddings and hidden states: float32, bfloat16 or float16."""

    @property
    def device(self) -> torch.device:
        """Where input embeddings are taken, and hidden states given."""

    def forward(self, inputs_embeds: Tensor, pause: Pause = never) -> Tensor:
        """Last hidden states [batch, seq_len, hidden_size], after the final norm, of input embeddings of that shape.

        Causal, positions 0 .. seq_len - 1, no KV cache. The result may be overwritten by the next call. Calls ``pause``
        as often as it likes between its kernels, on the same thread and stream, so that validation can make room for
        users (`poc_kernels.scheduling.SlicedForward`); bits must not depend on it.
        """

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocab_size] of hidden states [rows, hidden_size], with all that the model does to logits."""
