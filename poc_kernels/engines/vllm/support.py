"""What proofs do not support yet of vLLM: each refusal is a sentence that says what to do.

Functions of a configuration or a model that return None where nothing is in the way. They ask for attributes by name,
so that they need no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ...definition import DTYPES
from .compat import SUPPORTED_MINORS

_ATTENTION = ("Attention", "ChunkedLocalAttention", "MLAAttention")
"""Classes of attention layers that a twin computes, to the letter: a subclass may compute something else."""


class _Refusal(NamedTuple):
    here: Callable[[Any], bool]
    sentence: str


def _count(config: Any, name: str) -> int:
    return int(getattr(config.parallel_config, name, 1))


def _text_config(config: Any, name: str) -> Any:
    return getattr(config.model_config.hf_text_config, name, None)


def _model_is(name: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config.model_config, name, False))


_REFUSALS = (
    _Refusal(
        lambda config: _count(config, "_api_process_count") > 1,
        "proofs need one API server, which keeps the round: start vLLM with --api-server-count 1",
    ),
    _Refusal(
        lambda config: _count(config, "data_parallel_size") > 1,
        "proofs take no data parallelism: start one vLLM server per replica without --data-parallel-size, and let the "
        "chain's node address each as a node of its own",
    ),
    _Refusal(
        lambda config: _count(config, "pipeline_parallel_size") > 1,
        "proofs take no pipeline parallelism: start vLLM with --tensor-parallel-size instead of "
        "--pipeline-parallel-size",
    ),
    _Refusal(
        lambda config: max(_count(config, f"{kind}_context_parallel_size") for kind in ("prefill", "decode")) > 1,
        "proofs take no context parallelism: start vLLM without --decode-context-parallel-size and "
        "--prefill-context-parallel-size",
    ),
    _Refusal(
        # Others may call a worker's model without its own method, between whose calls slices run, or in another thread.
        lambda config: getattr(config.parallel_config, "distributed_executor_backend", "mp") not in ("mp", "uni"),
        "proofs need workers that are processes of vLLM's own: start vLLM with --distributed-executor-backend mp",
    ),
    _Refusal(
        lambda config: bool(getattr(config.parallel_config, "enable_eplb", False)),
        "proofs need experts that stay where they are: start vLLM without --enable-eplb",
    ),
    _Refusal(
        _model_is("enable_sleep_mode"),
        "proofs need the weights at all times: start vLLM without --enable-sleep-mode",
    ),
    _Refusal(
        lambda config: getattr(config.model_config, "runner_type", "generate") != "generate",
        "proofs need a model that generates text: start vLLM with --runner generate and such a model",
    ),
    _Refusal(
        _model_is("is_encoder_decoder"),
        "proofs take no encoder-decoder model: serve a decoder-only one",
    ),
    _Refusal(
        _model_is("is_diffusion"),
        "proofs take no diffusion model: serve one that generates from left to right",
    ),
    _Refusal(
        lambda config: any(_model_is(name)(config) for name in ("is_attention_free", "is_hybrid", "has_inner_state")),
        "proofs take no model with Mamba or linear attention, whose state they would have to keep: serve one whose "
        "layers all have softmax attention",
    ),
    _Refusal(
        lambda config: _text_config(config, "index_topk") is not None,
        "proofs take no sparse attention that an indexer chooses keys for: serve a model with dense attention",
    ),
    _Refusal(
        _model_is("uses_alibi"),
        "proofs take no ALiBi: serve a model with rotary or learned positions",
    ),
    _Refusal(
        lambda config: bool(_text_config(config, "num_kv_shared_layers")),
        "proofs take no layers that share the keys and values of others: serve a model whose layers all have their own",
    ),
    _Refusal(
        _model_is("requires_raw_input_tokens"),
        "proofs need a model that computes from input embeddings alone, and this one reads token ids: serve another",
    ),
)


def unsupported_version(version: str) -> str | None:
    """Say what to do if proofs were not tried with this version of vLLM."""
    minor = ".".join(version.split(".")[:2])
    if minor in SUPPORTED_MINORS:
        return None
    known = " or ".join(f"{supported}.*" for supported in SUPPORTED_MINORS)
    return f"proofs were tried with vLLM {known} only, this is {version}: install one of those"


def unsupported_config(vllm_config: Any) -> str | None:
    """Say what to do if proofs do not support something that vLLM is configured with, or about its model.

    Args:
        vllm_config: a ``VllmConfig``; it is complete before the weights are loaded.
    """
    for refusal in _REFUSALS:
        if refusal.here(vllm_config):
            return refusal.sentence
    dtype = vllm_config.model_config.dtype
    if dtype not in DTYPES:
        return f"proofs take float32, bfloat16 and float16, the model has {dtype}: start vLLM with --dtype"
    return None


def unsupported_model(model: nn.Module, attention_layer: type) -> str | None:
    """Say what to do if a twin of the loaded model cannot be made.

    Args:
        model: the model that a worker of vLLM serves.
        attention_layer: vLLM's base class of layers that keep something of a request.
    """
    for name in ("compute_logits", "embed_input_ids"):
        if not callable(getattr(model, name, None)):
            return f"proofs need a language model, {type(model).__name__} has no {name}: serve another model"
    for path, module in model.named_modules():
        for what, instead in _unsupported(module, attention_layer):
            return f"proofs take no {what}, which {path or type(model).__name__} has: {instead}"
    return None


def _unsupported(module: nn.Module, attention_layer: type) -> Iterator[tuple[str, str]]:
    """Name what a twin cannot do about a module, with what to do instead."""
    if type(module).__name__ == "FusedMoEWithLoRA":
        yield "adapters of experts", "start vLLM without --enable-lora"
    if "forward" in vars(module) and getattr(module.forward, "__self__", None) is not module:
        yield "layer whose forward is replaced", "start vLLM without offloading weights to the CPU"
    if getattr(module, "deepstack_input_embeds", None):
        yield "buffers of users' images between layers", "serve the language model alone"
    if isinstance(module, attention_layer):
        yield from _unsupported_attention(module)


def _unsupported_attention(layer: Any) -> Iterator[tuple[str, str]]:
    dense = "serve a model whose layers all have causal softmax attention"
    if type(layer).__name__ not in _ATTENTION:
        yield f"layer of class {type(layer).__name__}", dense
        return
    impl = layer.impl
    if getattr(layer, "attn_type", "decoder") != "decoder":
        yield f"attention of type {layer.attn_type}", dense
    if getattr(impl, "alibi_slopes", None) is not None:
        yield "ALiBi", "serve a model with rotary or learned positions"
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        yield "layer with the keys and values of another one", "serve a model whose layers all have their own"
    if getattr(layer, "indexer", None) is not None or getattr(impl, "is_sparse", False):
        yield "sparse attention that an indexer chooses keys for", "serve a model with dense attention"
    if getattr(impl, "chunk_lookback", -1) > -1:
        yield "attention in chunks that look back", dense
