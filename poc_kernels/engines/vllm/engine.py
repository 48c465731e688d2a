"""Proofs on the model of a vLLM worker, on the very weights that serve users."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...protocol.engine import LayerTransform, check_inputs, never
from ...scheduling import PriorityLanes, RepeatedForward, Slices
from ...scheduling.slices import Pause
from ..layers import DecoderLayers
from . import compat
from .support import unsupported_config
from .twin import Layout, Twin

_MEETING_SECONDS = 5.0
"""Ranks that fail for the same reason do so at about the same time."""


class VllmEngine:
    """The `Engine` of ``poc_kernels.protocol`` on the model that a worker of vLLM has loaded.

    Forwards go through a twin of the served modules on the same weights, with attention that needs neither a KV cache
    nor a scheduler. It computes by the same kernels whether or not the server compiles its model.

    Call it from the thread that computes the worker's steps, inside `context`, with no step in between.

    Args:
        worker: vLLM's worker, its model loaded: ``model_runner`` and ``vllm_config`` of it are used.
        slice_seconds: how long a slice of the forward should take at most.
        cuda_graphs: whether to capture the forward on CUDA.
        lockstep: whether to pause before each decoder layer and nowhere else, so that all ranks of a model pause at
            the same calls. Nothing is captured then.

    Attributes:
        repeated: runs the forward, except in lockstep.
        twin: the twin of the served model.
        vllm_config: the worker's configuration.
        scores_are_logits: whether the server tells logits where log-probabilities are asked for.

    Raises:
        ValueError: the configuration or the model has something that proofs do not support.
    """

    def __init__(
        self, worker: Any, *, slice_seconds: float = 0.002, cuda_graphs: bool = True, lockstep: bool = False
    ) -> None:
        config, runner = worker.vllm_config, worker.model_runner
        if (refusal := unsupported_config(config)) is not None:
            raise ValueError(refusal)
        model_config = config.model_config
        self.hidden_size: int = model_config.get_hidden_size()
        self.vocab_size: int = model_config.get_vocab_size()
        self.max_positions: int = model_config.max_model_len
        self.model_type: str = getattr(model_config.hf_text_config, "model_type", "")
        self.dtype: torch.dtype = model_config.dtype
        self.device = torch.device(runner.device)
        self.vllm_config = config
        self.scores_are_logits: bool = "logits" in model_config.logprobs_mode
        self._runner = runner
        self._position_rows = 3 if getattr(model_config, "uses_mrope", False) else 0
        self._lockstep, self._pause = lockstep, never
        on_gpu = self.device.type == "cuda"
        # In lockstep on the stream of the steps: what ranks exchange stays in one order.
        self._lanes = PriorityLanes(self.device) if on_gpu and not lockstep else None
        self._workspace = compat.new_workspace(self.device) if on_gpu else None
        self._ops = compat.kernels_of_ops()
        self.repeated = RepeatedForward(
            self.compute_states, self.device, slice_seconds=slice_seconds, cuda_graphs=cuda_graphs
        )
        self._make_twin()
        with self.context():
            self._layers = DecoderLayers(
                self.twin.model,
                self.compute_states,
                hidden_size=self.hidden_size,
                dtype=self.dtype,
                device=self.device,
                count=getattr(model_config.hf_text_config, "num_hidden_layers", None),
            )

    @property
    def layers(self) -> int:
        """Number of decoder layers; raises a ValueError where no transform is possible after them."""
        return self._layers.count

    @property
    def windows(self) -> list[int]:
        """How many positions attention layers look back, or have in a chunk: each number once, ascending."""
        names = ("sliding_window", "attention_chunk_size")
        found = {getattr(layer, name, None) for layer in self.twin.attention_layers() for name in names}
        return sorted(window for window in found if window is not None)

    @property
    def slices(self) -> Slices | None:
        """The slices of the latest forward; None until they are measured, and in lockstep."""
        return self.repeated.slices

    def refresh(self) -> bool:
        """Make the twin anew if modules or weights of the served model were replaced; return whether they were.

        Weights that were overwritten where they lie need nothing. Call it before a round, with no forward begun.
        """
        if self.twin.is_of(self._runner.get_model()):
            return False
        self._make_twin()
        self._layers.move_to(self.twin.model)
        return True

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Have vLLM's layers find what proofs need: to be entered around each slice, by the thread that steps.

        What it sets belongs to the process, so no step may run inside the block. On a GPU, work given to the current
        stream inside the block has the lowest priority.
        """
        with contextlib.ExitStack() as stack:
            for op, providers in self._ops:
                stack.enter_context(op.set_priority(providers))
            stack.enter_context(compat.in_forward_context(self._forward_context))
            if self._workspace is not None:
                stack.enter_context(compat.in_workspace(self._workspace))
            if self._lanes is not None:
                stack.enter_context(self._lanes.validation())
            yield

    def forget(self) -> None:
        """Give back the memory of captured graphs: the next forward is measured and captured anew."""
        self.repeated.forget()

    def all_ranks_failed(self) -> bool:
        """Wait some seconds until all ranks have called this, after a failure; return whether they have."""
        return compat.all_ranks_meet(_MEETING_SECONDS)

    @torch.inference_mode()
    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the last hidden states [batch, seq_len, hidden_size] of input embeddings: see `Engine.forward`.

        Calls ``pause`` between slices; until those of the shape and the transform are measured, between all calls of
        torch.
        """
        check_inputs(self, inputs_embeds)
        if self._lockstep:
            self._pause = pause
            try:
                return self.compute_states(inputs_embeds, after_layer)
            finally:
                self._pause = never
        return self.repeated(inputs_embeds, pause, after_layer)

    @torch.inference_mode()
    def compute_states(self, inputs_embeds: Tensor, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute what `forward` does in one go, of any shape, without remembering anything of it."""
        if after_layer is not None:
            with self._layers.transformed(after_layer, inputs_embeds.shape):
                return self.compute_states(inputs_embeds)
        batch, length, _ = inputs_embeds.shape
        self.twin.layout = Layout(batch, length)
        positions = torch.arange(length, device=self.device).repeat(batch)
        if self._position_rows:
            positions = positions.repeat(self._position_rows, 1)
        # A copy: fused norms add to their residual in place, and the first residual is the input.
        states: Any = self.twin.model(
            input_ids=None,
            positions=positions,
            intermediate_tensors=None,
            inputs_embeds=inputs_embeds.reshape(batch * length, -1).clone(),
        )
        if isinstance(states, tuple):  # with states of inner layers for a drafter
            states = states[0]
        hidden: Tensor = states.view(batch, length, -1)
        return hidden

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [rows, vocab_size] of hidden states [rows, hidden_size]; ones where a rank gets none."""
        logits = self.gather_logits(hidden_states)
        if logits is None:  # another rank has them, and its outcomes count
            return torch.ones(len(hidden_states), self.vocab_size, device=self.device)
        return logits

    @torch.inference_mode()
    def gather_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute the logits [rows, vocab_size] of hidden states [rows, hidden_size]; None where a rank gets none."""
        logits: Tensor | None = self.twin.model.compute_logits(hidden_states)
        return None if logits is None else logits[:, : self.vocab_size]

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the input embeddings [count, hidden_size] of token ids [count], as the served model does."""
        embeddings: Tensor = self.twin.model.embed_input_ids(tokens)
        return embeddings.to(self.dtype)

    def _make_twin(self) -> None:
        self.repeated.forget()
        self.twin = Twin(self._runner.get_model())
        if self._lanes is not None:
            self._lanes.wait_for_current_stream()
        self._forward_context = compat.forward_context(self.vllm_config, self.twin.clones)
        if self._lockstep:
            for layer in self.twin.decoder_layers():
                layer.forward = self._pausing(layer.forward)

    def _pausing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused_before(*arguments: Any, **named: Any) -> Any:
            self._pause()
            return forward(*arguments, **named)

        return paused_before
