"""Proofs on any causal language model of Hugging Face transformers, on the very weights that serve users."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from ...definition import DTYPES
from ...protocol.engine import LayerTransform, check_inputs, never
from ...scheduling import RepeatedForward, Slices
from ...scheduling.slices import Pause
from ..independence import refusal
from ..layers import DecoderLayers
from .config import max_positions
from .masks import masks_as_outside_a_capture


class _GivenOutput(BaseModelOutputWithPast):
    """A decoder's output with hidden states, and None for every other field that a head may read."""

    def __getattr__(self, name: str) -> None:
        return None


def _given_states(decoder: nn.Module) -> nn.Module:
    """Copy the decoder below a language model's head, and have the copy return its input as the hidden states."""

    def forward(*_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=inputs_embeds)

    given = copy.copy(decoder)  # a head may read more of its decoder than the states
    given.forward = forward
    return given


def share_weights(model: nn.Module) -> Any:
    """Copy ``model``'s modules and configuration, on the same parameters and buffers: no weight is copied.

    What is set on either one later (configuration, hooks, an attention implementation) has no effect on the other.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class TransformersEngine:
    """The `Engine` of ``poc_kernels.protocol`` on a causal language model of transformers.

    Proofs never run the served model itself: forwards go through a twin that shares its weights and has a configuration
    of its own, so that whatever serves users may set attention, hooks or caches on the model. Make the engine before
    anything serves the model.

    The forward is computed in slices. On CUDA they are captured as graphs whenever the shape changes, and replayed; a
    model that cannot be captured, or whose replay is not bit-identical, runs without graphs, with a warning.

    Args:
        model: a ``PreTrainedModel`` with a language model head, loaded, on one device, its attention "sdpa" or "eager".
        cuda_graphs: whether to capture the forward on CUDA.
        slice_seconds: how long a slice of the forward should take at most.
        alone: entered for a capture: nothing else may draw torch's random numbers on the device meanwhile.

    Attributes:
        repeated: runs the forward.

    Raises:
        ValueError: the model has no decoder or no head, its dtype is not one that projections take, its weights lie on
            several devices or are not finite, it does not take input embeddings, or the twin's logits are not
            bit-identical to the model's.
    """

    def __init__(
        self,
        model: Any,
        *,
        cuda_graphs: bool = True,
        slice_seconds: float = 0.002,
        alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(
                "model must be a causal language model of transformers with a decoder and a head, got "
                f"{type(model).__name__}"
            )
        if model.dtype not in DTYPES:
            raise ValueError(f"model must have dtype float32, bfloat16 or float16, got {model.dtype}")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise ValueError(f"model must lie on one device, got {sorted(map(str, devices))}")
        _check_finite(model)
        text_config = model.config.get_text_config()
        self._twin = share_weights(model).eval()
        self._twin.config.use_cache = False
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]
        self.vocab_size: int = text_config.vocab_size
        self.max_positions: int = max_positions(model.config)
        self.model_type: str = text_config.model_type
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.repeated = RepeatedForward(
            lambda inputs_embeds, after_layer: self._run(inputs_embeds, after_layer),
            self.device,
            slice_seconds=slice_seconds,
            cuda_graphs=cuda_graphs,
            alone=alone,
            as_captured=masks_as_outside_a_capture,
        )
        self._divide(model)
        text_config = model.config.get_text_config(decoder=True)
        self._layers = DecoderLayers(
            self._decoder,
            self._run,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=self.device,
            count=getattr(text_config, "decoder_layers", getattr(text_config, "num_hidden_layers", None)),
        )

    @property
    def slices(self) -> Slices | None:
        """The slices of the latest forward; None until they are measured."""
        return self.repeated.slices

    @property
    def layers(self) -> int:
        """Number of decoder layers; raises a ValueError where no transform is possible after them."""
        return self._layers.count

    @torch.inference_mode()
    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the last hidden states [batch, seq_len, hidden_size] of input embeddings: see `Engine.forward`.

        Calls ``pause`` between slices; until those of the shape and the transform are measured, between all calls of
        torch.
        """
        check_inputs(self, inputs_embeds)
        return self.repeated(inputs_embeds, pause, after_layer)

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [rows, vocab_size] of hidden states [rows, hidden_size]."""
        logits: Tensor = self._head(inputs_embeds=hidden_states.unsqueeze(1), use_cache=False).logits.squeeze(1)
        return logits

    def _run(self, inputs_embeds: Tensor, after_layer: LayerTransform | None = None) -> Tensor:
        if after_layer is None:
            states: Tensor = self._decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
            return states
        with self._layers.transformed(after_layer, inputs_embeds.shape):
            return self._run(inputs_embeds)

    @torch.inference_mode()
    def _divide(self, model: Any) -> None:
        """Divide the twin into decoder and head, which together give the model's own logits, bit for bit."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 16, self.hidden_size, generator=generator, device="cpu").to(self.device, self.dtype)
        name = type(model).__name__
        try:
            with _attention_of(model, self._twin.config._attn_implementation):
                expected = model(inputs_embeds=x, use_cache=False).logits[:, -1]
            with _decoders_called(self._twin) as decoders:
                self._twin(inputs_embeds=x, use_cache=False)
        except Exception as error:
            raise ValueError(
                f"model must compute logits from input embeddings, {name} does not: {type(error).__name__}: {error}"
            ) from error
        if not bool(expected.isfinite().all()):
            raise ValueError(f"model must compute finite logits, {name} does not")
        reason = "they differ" if decoders else "no module of it gives hidden states"
        for path in sorted(decoders, key=len):  # the outermost first
            self._decoder = self._twin.get_submodule(path)
            # The head alone, with all that the model does to logits: its decoder is replaced by given hidden states.
            self._head = _with_states_given(self._twin, path.split("."))
            try:
                if torch.equal(self._head(inputs_embeds=self._run(x), use_cache=False).logits[:, -1], expected):
                    return
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model must give the same logits through its decoder and head apart, {name} does not: {reason}"
        )


def dependence(engine: TransformersEngine) -> str | None:
    """Say in a sentence on what a row's bits depend besides its input; None if on nothing: see `refusal`."""
    try:
        transforms = engine.layers > 0
    except ValueError:
        transforms = False
    said = refusal(engine, "serve another model, or this one on another device", transforms=transforms)
    if engine.device.type == "cpu":
        engine.repeated.forget()  # the shape was none of a round's
    return said


def _check_finite(model: Any) -> None:
    """Raise ValueError that names the first parameter which holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            ends = torch.stack(torch.aminmax(parameter.detach()))  # no copy of the parameter is made
            if not bool(ends.isfinite().all()):
                what = "NaN" if bool(ends.isnan().any()) else "an infinity"
                raise ValueError(f"model must have finite weights, {name} holds {what}")


@contextlib.contextmanager
def _decoders_called(model: nn.Module) -> Iterator[list[str]]:
    """List the modules below ``model`` that are called inside the block and give hidden states."""
    called: list[str] = []

    def look(name: str, _: Any, __: Any, output: Any) -> None:
        if isinstance(output, ModelOutput) and "last_hidden_state" in output:
            called.append(name)

    handles = [
        module.register_forward_hook(functools.partial(look, name)) for name, module in model.named_modules() if name
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _with_states_given(module: nn.Module, path: Sequence[str]) -> Any:
    """Copy the modules that lead to ``path``, and put given hidden states in the place of what is there."""
    name, *rest = path
    inner = module.get_submodule(name)
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: _with_states_given(inner, rest) if rest else _given_states(inner)}
    return copied


@contextlib.contextmanager
def _attention_of(model: Any, implementation: str) -> Iterator[None]:
    """Set the attention implementation of ``model`` for a while."""
    before = model.config._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
