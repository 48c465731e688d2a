"""Stand-ins for the parts of vLLM that an engine meets, and a small model of them: a worker without vLLM."""

from __future__ import annotations

import contextlib
import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poc_kernels.engines.vllm import compat


class AttentionLayerBase(nn.Module):
    """What vLLM's layers derive from that keep something of a request."""


class Attention(AttentionLayerBase):
    """vLLM's attention layer: its attributes, and a forward that would need what a step has."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        size: int,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size, self.head_size_v = heads, kv_heads, size, size
        self.sliding_window, self.attn_type, self.kv_sharing_target_layer_name = window, "decoder", None
        self.impl = types.SimpleNamespace(
            scale=size**-0.5, logits_soft_cap=soft_cap, alibi_slopes=None, sinks=sinks, is_sparse=False
        )
        self.kv_cache = torch.zeros(1)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("attention of the served model was computed, which needs the metadata of a step")


class MLAAttention(AttentionLayerBase):
    """vLLM's attention layer with latent vectors, with the weights that it was loaded with."""

    def __init__(self, heads: int, nope: int, rope: int, value: int, rank: int) -> None:
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.qk_rope_head_dim = heads, nope, rope
        self.v_head_dim, self.kv_lora_rank = value, rank
        self.scale, self.sliding_window, self.indexer = (nope + rope) ** -0.5, None, None
        self.impl = types.SimpleNamespace(is_sparse=False)
        self.kv_b_proj = Linear(rank, heads * (nope + value))

    def absorb(self) -> None:
        """Keep the projection's weights as vLLM does for its kernels, and give up the projection's own."""
        weight = self.kv_b_proj.weight.T.reshape(self.kv_lora_rank, self.num_heads, -1)
        keys, values = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        self.W_UK_T, self.W_UV = keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous()
        self.kv_b_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Linear(nn.Module):
    """vLLM's linear layer, which gives a tuple."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


class CustomOp(nn.Module):
    """vLLM's dispatch of a layer to a kernel or, to be compiled, to plain torch."""

    compiled = False

    def __init__(self) -> None:
        super().__init__()
        self._forward_method = self.forward_native if self.compiled else self.forward_cpu

    def forward(self, *arguments: Any) -> Any:
        return self._forward_method(*arguments)


class Norm(CustomOp):
    """A norm that adds a residual in place, whose two ways round differently."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width), requires_grad=False)

    def forward_native(self, x: Tensor, residual: Tensor) -> Tensor:
        residual += x
        return residual * residual.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight

    def forward_cpu(self, x: Tensor, residual: Tensor) -> Tensor:
        residual += x
        return residual / residual.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * self.weight


class BaseLayerWithLoRA(nn.Module):
    """vLLM's wrapper of a layer for the adapters of those who are served: here, all want one."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Any:
        output, bias = self.base_layer(x)
        return output + 1, bias


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, size: int, **rules: Any) -> None:
        super().__init__()
        self.sizes = [heads * size, kv_heads * size, kv_heads * size]
        self.norm, self.norm_after = Norm(width), Norm(width)
        self.qkv = Linear(width, sum(self.sizes))
        self.attn = Attention(heads, kv_heads, size, **rules)
        self.out, self.mlp = Linear(heads * size, width), Linear(width, width)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x, residual)
        query, key, value = self.qkv(x)[0].split(self.sizes, dim=-1)
        key = key * (1 + 0.01 * positions.view(-1, 1)).to(key.dtype)
        x = self.norm_after(self.out(self.attn(query, key, value))[0], residual)
        return torch.tanh(self.mlp(x)[0]), residual


class Model(nn.Module):
    """A language model of vLLM's form, small, with seeded weights."""

    def __init__(self, width: int = 32, vocabulary: int = 101, layers: int = 3, **rules: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.tokens = nn.Parameter(torch.randn(vocabulary, width), requires_grad=False)
            self.layers = nn.ModuleList(DecoderLayer(width, 4, 2, 8, **rules) for _ in range(layers))
            self.norm = Norm(width)
            self.head = Linear(width, vocabulary + 3)  # padded, as vocabularies are for several ranks

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.tokens[input_ids]

    def forward(self, input_ids: None, positions: Tensor, intermediate_tensors: None, inputs_embeds: Tensor) -> Tensor:
        x, residual = torch.zeros_like(inputs_embeds), inputs_embeds
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.head(hidden_states)[0]


def vllm_config(**changes: Any) -> Any:
    """A configuration of vLLM that proofs support; ``changes`` are attributes of any part of it."""
    text = types.SimpleNamespace()
    model = types.SimpleNamespace(
        dtype=torch.float32,
        max_model_len=128,
        runner_type="generate",
        logprobs_mode="raw_logprobs",
        enable_sleep_mode=False,
        hf_text_config=text,
        get_hidden_size=lambda: 32,
        get_vocab_size=lambda: 101,
    )
    parallel = types.SimpleNamespace(_api_process_count=1, data_parallel_size=1, pipeline_parallel_size=1)
    cache = types.SimpleNamespace(cache_dtype="auto")
    config = types.SimpleNamespace(model_config=model, parallel_config=parallel, cache_config=cache)
    for name, value in changes.items():
        part = next((part for part in (model, parallel, cache) if hasattr(part, name)), None)
        setattr(text if part is None else part, name, value)
    return config


def worker(model: nn.Module | None = None, **changes: Any) -> Any:
    """A worker of vLLM that serves ``model``."""
    served = [Model() if model is None else model]
    runner = types.SimpleNamespace(device=torch.device("cpu"), get_model=lambda: served[0], served=served)
    return types.SimpleNamespace(model_runner=runner, vllm_config=vllm_config(**changes))


class PinnedOp:
    """An op of vLLM's IR, and which providers it has at the moment."""

    providers = ("native",)

    @contextlib.contextmanager
    def set_priority(self, providers: Any) -> Any:
        before, self.providers = self.providers, tuple(providers)
        yield
        self.providers = before


class Process:
    """What vLLM keeps once per process."""

    def __init__(self) -> None:
        self.context: Any = None
        self.op = PinnedOp()

    @contextlib.contextmanager
    def in_context(self, context: Any) -> Any:
        before, self.context = self.context, context
        yield
        self.context = before


def install(monkeypatch: pytest.MonkeyPatch) -> Process:
    """Have `compat` give the stand-ins; return what a process of vLLM would keep."""
    process = Process()
    for name, answer in {
        "custom_op": CustomOp,
        "attention_layer": AttentionLayerBase,
        "lora_layer": BaseLayerWithLoRA,
        "platform_forward": "forward_cpu",
        "kernels_of_ops": [(process.op, ["vllm_c", "native"])],
    }.items():
        monkeypatch.setattr(compat, name, lambda answer=answer: answer)
    monkeypatch.setattr(compat, "forward_context", lambda config, replaced: replaced)
    monkeypatch.setattr(compat, "in_forward_context", process.in_context)
    return process
