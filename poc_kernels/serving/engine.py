"""The first engine: any causal language model of Hugging Face transformers, on the very weights that serve users."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..definition import DTYPES

logger = logging.getLogger("poc_kernels")


class _GivenOutput(BaseModelOutputWithPast):
    """A decoder's output that has hidden states, and None for whatever else a head may look for."""

    def __getattr__(self, name: str) -> None:
        return None


class _GivenStates(nn.Module):
    """Stands in for the decoder below a language model's head: its hidden states are what it is called with."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=inputs_embeds)


def share_weights(model: nn.Module) -> Any:
    """A copy of ``model``'s modules and configuration on the same parameters and buffers: no weight is copied.

    What is set on either later (configuration, hooks, an attention implementation) does not show on the other.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class TransformersEngine:
    """Proofs on a causal language model of transformers: an `Engine` of ``poc_kernels.protocol``.

    The served model itself is never run: forwards go through a twin that shares its weights and has a configuration
    of its own, so that whatever serves users may set attention, hooks or caches on the model. Make the engine before
    the model is given to what serves it.

    On CUDA the forward is captured as a graph when its shape changes, and replayed; a model that cannot be captured, or
    whose replay gives other bits, runs as it is, with a warning.

    Args:
        model: a ``PreTrainedModel`` with a language model head, loaded, on one device, its attention "sdpa" or "eager".
        cuda_graphs: whether to capture the forward on CUDA.

    Raises:
        ValueError: no decoder or no head is found in the model, its dtype is not one that projections take, its
            weights lie on several devices, or the twin does not give the model's own bits.
    """

    def __init__(self, model: Any, *, cuda_graphs: bool = True) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        if not prefix or not hasattr(model, prefix) or model.get_output_embeddings() is None:
            raise ValueError(
                "model must be a causal language model of transformers with a decoder and a head, got "
                f"{type(model).__name__}"
            )
        if model.dtype not in DTYPES:
            raise ValueError(f"model must have dtype float32, bfloat16 or float16, got {model.dtype}")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise ValueError(f"model must lie on one device, got {sorted(map(str, devices))}")
        text_config = model.config.get_text_config()
        self._twin = share_weights(model).eval()
        self._twin.config.use_cache = False
        self._decoder = getattr(self._twin, prefix)
        # The head alone, with all that the model does to logits: its decoder is replaced by given hidden states.
        self._head = copy.copy(self._twin)
        self._head._modules = {**self._twin._modules, prefix: _GivenStates()}
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]
        self.vocab_size: int = text_config.vocab_size
        self.max_positions: int = getattr(text_config, "max_position_embeddings", None) or 2**20
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self._shape: tuple[int, ...] | None = None
        self._graph: tuple[Any, Tensor, Tensor] | None = None
        self._check_against(model)

    @torch.inference_mode()
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Last hidden states [batch, seq_len, hidden_size] of input embeddings, in the model's dtype.

        Raises:
            ValueError, TypeError: inputs_embeds is not [batch, seq_len, hidden_size] in the model's dtype.
        """
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape [batch, seq_len, {self.hidden_size}], got {list(inputs_embeds.shape)}"
            )
        if inputs_embeds.dtype != self.dtype:
            raise TypeError(f"inputs_embeds must be {self.dtype}, got {inputs_embeds.dtype}")
        if self._cuda_graphs:
            return self._replay(inputs_embeds)
        return self._run(inputs_embeds)

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocab_size] of hidden states [rows, hidden_size]."""
        logits: Tensor = self._head(inputs_embeds=hidden_states.unsqueeze(1), use_cache=False).logits.squeeze(1)
        return logits

    def _run(self, inputs_embeds: Tensor) -> Tensor:
        states: Tensor = self._decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        return states

    def _replay(self, inputs_embeds: Tensor) -> Tensor:
        shape = tuple(inputs_embeds.shape)
        if shape != self._shape:
            self._graph = None  # one shape a round: the memory of the last one is given back first
            self._shape = shape
            self._graph = self._captured(inputs_embeds)
        if self._graph is None:
            return self._run(inputs_embeds)
        graph, static_input, static_output = self._graph
        static_input.copy_(inputs_embeds)
        graph.replay()
        return static_output

    def _captured(self, example: Tensor) -> tuple[Any, Tensor, Tensor] | None:
        """The forward of that shape as a graph if its replay gives the same bits; else None, with a warning."""
        try:
            captured = self._capture(example)
            captured[0].replay()
            if torch.equal(captured[2], self._run(example)):
                return captured
            reason = "its replay gives other bits"
        except torch.OutOfMemoryError as error:
            logger.warning("no memory to capture the model's forward as a CUDA graph; it runs without: %s", error)
            return None  # another round may have room
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error)
        logger.warning("the model's forward cannot be captured as a CUDA graph and runs without: %s", reason)
        self._cuda_graphs = False
        return None

    def _capture(self, example: Tensor) -> tuple[Any, Tensor, Tensor]:
        static_input = example.clone()
        before = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up outside the capture
                self._run(static_input)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile but not sample: the graph has torch's generator until its end.
            with (
                _masks_as_outside_a_capture(),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                static_output = self._run(static_input)
        except BaseException:
            # A capture that broke leaves the thread on its stream, and torch's generator in the graph's hands.
            torch.cuda.set_stream(before)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, static_input, static_output

    @torch.inference_mode()
    def _check_against(self, model: Any) -> None:
        """The twin and the head, bit for bit against the model itself, before anything else runs on it."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 16, self.hidden_size, generator=generator, device="cpu").to(self.device, self.dtype)
        with _attention_of(model, self._twin.config._attn_implementation):
            expected = model(inputs_embeds=x, use_cache=False).logits[:, -1]
        states = self._run(x)
        logits = self._head(inputs_embeds=states, use_cache=False).logits[:, -1]
        if not torch.equal(logits, expected):
            raise ValueError(
                f"model must give the same logits through its decoder and head apart, {type(model).__name__} does not"
            )


@contextlib.contextmanager
def _masks_as_outside_a_capture() -> Iterator[None]:
    """Have transformers make the masks that it makes for whole sequences, none where attention is simply causal.

    While a graph is captured it cannot look whether a batch is packed or padded, and makes masks to be sure, with which
    other attention kernels run, and give other bits.
    """
    answers: dict[str, Callable[..., Any]] = {
        "find_packed_sequence_indices": lambda *_, **__: None,
        "is_tracing": lambda *_, **__: False,
    }
    before = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    try:
        for name in before:
            setattr(masking_utils, name, answers[name])
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)


@contextlib.contextmanager
def _attention_of(model: Any, implementation: str) -> Iterator[None]:
    """The attention implementation of ``model`` set for a while."""
    before = model.config._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
