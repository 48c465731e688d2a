"""A copy of the tree of modules that vLLM serves, on the same weights, whose attention takes whole sequences.

It needs nothing that belongs to requests: no KV cache, no metadata, no scheduler. What is set on one of the two trees
has no effect on the other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import compat
from .attention import Rules, causal_attention, latent_attention
from .support import unsupported_model

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_SCRATCH = ("workspace",)
"""Tensors in which kernels keep locks or partial sums while they run: a twin beside a step needs its own."""


class Layout(NamedTuple):
    """How a forward's rows of tokens divide into sequences, one after the other, all of one length."""

    batch: int
    length: int


class Twin:
    """A copy of a model's modules that shares every parameter and buffer.

    Args:
        model: what a worker of vLLM serves.

    Attributes:
        model: the copy.
        layout: sequences of the next forward; set it before each.
        clones: the copies, by the id of the module that each was made of.

    Raises:
        ValueError: the model has something that a twin does not support.
    """

    def __init__(self, model: nn.Module) -> None:
        self._custom_op: Any = compat.custom_op()
        self._lora_layer: Any = compat.lora_layer()
        self._attention_layer: Any = compat.attention_layer()
        self._platform_forward = compat.platform_forward()
        if (refusal := unsupported_model(model, self._attention_layer)) is not None:
            raise ValueError(refusal)
        self._served = model
        self._made_of = weights_of(model)
        self.layout = Layout(1, 1)
        self.clones: dict[int, Any] = {}
        self.model: Any = self._clone(model)

    def is_of(self, model: nn.Module) -> bool:
        """Return whether ``model`` consists of the very modules and weights that this was made of."""
        return weights_of(model) == self._made_of

    def attention_layers(self) -> list[nn.Module]:
        """Return the layers of attention."""
        return [clone for clone in self.clones.values() if isinstance(clone, self._attention_layer)]

    def decoder_layers(self) -> nn.ModuleList:
        """Return the decoder's layers: of all lists of modules with attention, the longest.

        Raises:
            ValueError: there is no such list.
        """
        attention = {id(layer) for layer in self.attention_layers()}
        lists = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList)
            and all(any(id(part) in attention for part in layer.modules()) for layer in module)
        ]
        if not lists:
            raise ValueError(f"model must have a list of decoder layers, {type(self._served).__name__} has none")
        return max(lists, key=len)

    def _clone(self, module: nn.Module) -> Any:
        if isinstance(module, self._lora_layer):  # it would add the adapters of whoever is served at the moment
            return self._clone(module.base_layer)
        if id(module) in self.clones:
            return self.clones[id(module)]
        clone: Any = type(module).__new__(type(module))
        self.clones[id(module)] = clone
        clone.__dict__.update(vars(module))
        for name in _HOOKS:
            clone.__dict__[name] = type(vars(module)[name])()
        for name in ("_parameters", "_buffers"):
            clone.__dict__[name] = {key: _own_scratch(key, value) for key, value in vars(module)[name].items()}
        clone.__dict__["_modules"] = {
            key: child if child is None else self._clone(child) for key, child in module._modules.items()
        }
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers", *_HOOKS):
                clone.__dict__[name] = _own_scratch(name, self._mapped(value))
        self._adapt(clone)
        return clone

    def _mapped(self, value: Any) -> Any:
        """Replace modules in the value of an attribute by their clones."""
        if isinstance(value, nn.Module):
            return self._clone(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._clone(value.__self__))
        if type(value) is functools.partial:
            return functools.partial(
                self._mapped(value.func), *self._mapped(value.args), **self._mapped(value.keywords)
            )
        if type(value) in (list, tuple):
            parts = [self._mapped(part) for part in value]
            changed = any(part is not before for part, before in zip(parts, value, strict=True))
            return type(value)(parts) if changed else value  # the same list otherwise: layers may share it
        if type(value) is dict:
            mapped = {key: self._mapped(part) for key, part in value.items()}
            return mapped if any(mapped[key] is not value[key] for key in value) else value
        return value

    def _adapt(self, clone: Any) -> None:
        """Have a clone compute whole sequences, by the same kernels whether or not the server compiles its model."""
        if isinstance(clone, self._custom_op) and "_forward_method" in vars(clone):
            clone._forward_method = getattr(clone, self._platform_forward)
        if hasattr(clone, "do_not_compile"):
            clone.do_not_compile = True
        if isinstance(clone, self._attention_layer):
            clone.kv_cache = None  # which need not live as long as the twin
            latent = type(clone).__name__ == "MLAAttention"
            clone.forward = (_latent_forward if latent else _attention_forward)(self, clone)


def weights_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Identify all that a twin takes over of a model: its modules, tensors, where these lie, and functions on them.

    Two results are equal if nothing was replaced in between and what the first one names still exists.
    """
    found: list[tuple[int, ...]] = []
    for module in model.modules():
        found.append((id(module),))
        for name, value in _attributes(module):
            if isinstance(value, Tensor):
                found.append((id(value), value.data_ptr()))
            elif isinstance(value, types.FunctionType) and name != "forward":
                found.append((id(value),))
    return found


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from ((name, value) for name, value in vars(module).items() if name != "kv_cache")


def _own_scratch(name: str, value: Any) -> Any:
    return torch.zeros_like(value) if name in _SCRATCH and isinstance(value, Tensor) else value


def _attention_forward(twin: Twin, layer: Any) -> Callable[..., Tensor]:
    """Make the forward of an ``Attention``, with its rules."""
    impl = layer.impl
    rules = Rules(
        scale=impl.scale,
        window=layer.sliding_window,
        chunk=getattr(layer, "attention_chunk_size", None),
        soft_cap=float(getattr(impl, "logits_soft_cap", None) or 0.0),
        sinks=getattr(impl, "sinks", None),
    )

    def forward(
        query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Compute attention of queries [tokens, heads * size], the sequences of the twin's layout."""
        batch, length = twin.layout
        query = query.view(batch, length, layer.num_heads, layer.head_size).transpose(1, 2)
        key = key.view(batch, length, layer.num_kv_heads, layer.head_size).transpose(1, 2)
        value = value.view(batch, length, layer.num_kv_heads, layer.head_size_v).transpose(1, 2)
        states = causal_attention(query, key, value, rules).transpose(1, 2)
        states = states.reshape(-1, layer.num_heads * layer.head_size_v if output_shape is None else output_shape[-1])
        return states if output_dtype is None else states.to(output_dtype)

    return forward


def _latent_forward(twin: Twin, layer: Any) -> Callable[..., Tensor]:
    """Make the forward of an ``MLAAttention``, with its rules."""
    rules = Rules(scale=layer.scale, window=layer.sliding_window)

    def forward(query: Tensor, latent: Tensor, rotated: Tensor, output_shape: Any = None, **_: Any) -> Tensor:
        """Compute attention of queries [tokens, heads, size], latent vectors [tokens, rank] and keys' rotated part."""
        batch, length = twin.layout
        query = query.view(batch, length, layer.num_heads, -1)
        states = latent_attention(layer, query, latent.view(batch, length, -1), rotated.view(batch, length, -1), rules)
        return states.reshape(batch * length, -1)

    return forward
