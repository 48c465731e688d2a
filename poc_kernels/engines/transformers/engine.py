"""The first engine: any causal language model of Hugging Face transformers, on the very weights that serve users."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...definition import DTYPES
from ...protocol.engine import never
from ...scheduling import SlicedForward, Slices
from ...scheduling.slices import MEASURED_FORWARDS, Pause

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


class _Captured(NamedTuple):
    """A forward of one shape: its slices as CUDA graphs, and the memory that they read and write."""

    graphs: list[Any]
    static_input: Tensor
    static_output: Tensor

    def replay(self, inputs_embeds: Tensor, pause: Pause) -> Tensor:
        self.static_input.copy_(inputs_embeds)
        for place, graph in enumerate(self.graphs):
            if place > 0:
                pause()
            graph.replay()
        return self.static_output


class TransformersEngine:
    """Proofs on a causal language model of transformers: an `Engine` of ``poc_kernels.protocol``.

    The served model itself is never run: forwards go through a twin that shares its weights and has a configuration
    of its own, so that whatever serves users may set attention, hooks or caches on the model. Make the engine before
    the model is given to what serves it.

    The forward is computed in slices. On CUDA they are captured as graphs when its shape changes, and replayed; a model
    that cannot be captured, or whose replay gives other bits, runs as it is, with a warning.

    Args:
        model: a ``PreTrainedModel`` with a language model head, loaded, on one device, its attention "sdpa" or "eager".
        cuda_graphs: whether to capture the forward on CUDA.
        slice_seconds: longest that a slice of the forward should take.
        alone: entered for a capture: nothing else may draw random numbers of torch on the device meanwhile.

    Raises:
        ValueError: no decoder or no head is found in the model, its dtype is not one that projections take, its
            weights lie on several devices, or the twin does not give the model's own bits.
    """

    def __init__(
        self,
        model: Any,
        *,
        cuda_graphs: bool = True,
        slice_seconds: float = 0.002,
        alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
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
        self._alone = alone
        self._cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self._shape: tuple[int, ...] | None = None
        self._captured: _Captured | None = None
        self._sliced = SlicedForward(self.device, slice_seconds)
        self._check_against(model)

    @property
    def slices(self) -> Slices | None:
        """Of the forward in its latest shape; None until that was measured."""
        return self._sliced.slices

    @torch.inference_mode()
    def forward(self, inputs_embeds: Tensor, pause: Pause = never) -> Tensor:
        """Last hidden states [batch, seq_len, hidden_size] of input embeddings, in the model's dtype.

        Calls ``pause`` between slices: between all calls of torch until the slices of the shape are measured.

        Raises:
            ValueError, TypeError: inputs_embeds is not [batch, seq_len, hidden_size] in the model's dtype.
        """
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape [batch, seq_len, {self.hidden_size}], got {list(inputs_embeds.shape)}"
            )
        if inputs_embeds.dtype != self.dtype:
            raise TypeError(f"inputs_embeds must be {self.dtype}, got {inputs_embeds.dtype}")
        shape = tuple(inputs_embeds.shape)
        if shape != self._shape:
            self._captured = self._shape = None  # one shape a round: the memory of the last one is given back first
            self._sliced.forget()
            if self._cuda_graphs:
                self._captured = self._capture_checked(inputs_embeds, pause)
            self._shape = shape
        if self._captured is not None:
            return self._captured.replay(inputs_embeds, pause)
        states: Tensor = self._sliced.run(lambda: self._run(inputs_embeds), pause)
        return states

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocab_size] of hidden states [rows, hidden_size]."""
        logits: Tensor = self._head(inputs_embeds=hidden_states.unsqueeze(1), use_cache=False).logits.squeeze(1)
        return logits

    def _run(self, inputs_embeds: Tensor) -> Tensor:
        states: Tensor = self._decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        return states

    def _capture_checked(self, example: Tensor, pause: Pause) -> _Captured | None:
        """The forward of that shape as graphs if their replay gives the same bits; else None, with a warning."""
        expected = self._sliced.run_unmeasured(lambda: self._run(example), pause)
        with _masks_as_outside_a_capture():  # the calls that are measured are those that will be captured
            for _ in range(MEASURED_FORWARDS):
                self._sliced.run(lambda: self._run(example), pause)
        with self._alone():
            try:
                captured = self._capture(example)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory to capture the model's forward as a CUDA graph; it runs without: %s", error)
                return None  # another shape may have room
            except (RuntimeError, NotImplementedError) as error:
                self._give_up_graphs(str(error))
                return None
        if not torch.equal(captured.replay(example, pause), expected):
            self._give_up_graphs("its replay gives other bits")
            return None
        return captured

    def _give_up_graphs(self, reason: str) -> None:
        logger.warning("the model's forward cannot be captured as a CUDA graph and runs without: %s", reason)
        self._cuda_graphs = False

    def _capture(self, example: Tensor) -> _Captured:
        """One graph a slice, from one pool of memory: what a graph leaves in it is there for those that follow."""
        before = stream = torch.cuda.current_stream(self.device)
        if before == torch.cuda.default_stream(self.device):  # which cannot be captured
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        static_input = example.clone()
        stream.wait_stream(before)
        graphs: list[Any] = []
        pool = torch.cuda.graph_pool_handle()

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            # Other threads may use the device meanwhile but not sample: the graph has torch's generator until its end.
            graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

        def next_graph() -> None:
            graphs[-1].capture_end()
            begin()

        try:
            with _masks_as_outside_a_capture(), torch.cuda.stream(stream):
                begin()
                static_output = self._sliced.run(lambda: self._run(static_input), next_graph)
                graphs[-1].capture_end()
        except BaseException:
            # A capture that broke must be ended, and leaves torch's generator in the graph's hands.
            for graph in graphs[-1:]:
                with torch.cuda.stream(stream), contextlib.suppress(RuntimeError):
                    graph.capture_end()
            torch.cuda.set_stream(before)
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        before.wait_stream(stream)
        return _Captured(graphs, static_input, static_output)

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
    other attention kernels run, and give other bits. In this thread alone: others serve users meanwhile.
    """
    thread = threading.get_ident()

    def only_here(answer: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*arguments: Any, **named: Any) -> Any:
            return (answer if threading.get_ident() == thread else otherwise)(*arguments, **named)

        return choose

    answers: dict[str, Callable[..., Any]] = {
        "find_packed_sequence_indices": lambda *_, **__: None,
        "is_tracing": lambda *_, **__: False,
    }
    before = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    try:
        for name in before:
            setattr(masking_utils, name, only_here(answers[name], before[name]))
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
