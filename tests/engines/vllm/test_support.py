"""Each thing of vLLM that proofs do not support is refused in a sentence that says what to do."""

import types

import pytest
import torch
from torch import nn
from vllm_stand_ins import Attention, AttentionLayerBase, MLAAttention, Model, vllm_config

from poc_kernels.engines.vllm.support import unsupported_config, unsupported_model, unsupported_version


def test_what_is_supported_is_not_refused():
    assert unsupported_version("0.32.0") is None
    assert unsupported_version("0.32.1+cpu") is None
    assert unsupported_config(vllm_config()) is None
    assert unsupported_model(Model(), AttentionLayerBase) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.32.0", "0.3.2", "0.320.0", "dev"])
def test_an_unknown_version(version):
    expected = f"proofs were tried with vLLM 0.32.* only, this is {version}: install one of those"
    assert unsupported_version(version) == expected


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"_api_process_count": 2}, "one API server, which keeps the round: start vLLM with --api-server-count 1"),
        ({"data_parallel_size": 2}, "no data parallelism: start one vLLM server per replica"),
        ({"pipeline_parallel_size": 2}, "no pipeline parallelism: start vLLM with --tensor-parallel-size instead"),
        ({"enable_sleep_mode": True}, "the weights at all times: start vLLM without --enable-sleep-mode"),
        ({"runner_type": "pooling"}, "a model that generates text: start vLLM with --runner generate"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16, the model has torch.float64: start vLLM with --dt"),
        ({"index_topk": 2048}, "no sparse attention that an indexer chooses keys for: serve a model with dense"),
        ({"num_kv_shared_layers": 2}, "no layers that share the keys and values of others: serve a model whose"),
    ],
)
def test_a_configuration(changes, refusal):
    assert refusal in unsupported_config(vllm_config(**changes))


@pytest.mark.parametrize(
    ("part", "name", "value", "refusal"),
    [
        ("parallel_config", "enable_eplb", True, "experts that stay where they are: start vLLM without --enable-eplb"),
        ("parallel_config", "distributed_executor_backend", "ray", "processes of vLLM's own: start vLLM with --distri"),
        ("parallel_config", "distributed_executor_backend", "external_launcher", "processes of vLLM's own: start vLLM"),
        ("parallel_config", "distributed_executor_backend", object, "processes of vLLM's own: start vLLM with --dis"),
        ("parallel_config", "decode_context_parallel_size", 2, "no context parallelism: start vLLM without --decode"),
        ("parallel_config", "prefill_context_parallel_size", 2, "no context parallelism: start vLLM without --decode"),
        ("model_config", "is_encoder_decoder", True, "no encoder-decoder model: serve a decoder-only one"),
        ("model_config", "is_diffusion", True, "no diffusion model: serve one that generates from left to right"),
        ("model_config", "is_attention_free", True, "no model with Mamba or linear attention"),
        ("model_config", "is_hybrid", True, "no model with Mamba or linear attention"),
        ("model_config", "has_inner_state", True, "no model with Mamba or linear attention"),
        ("model_config", "uses_alibi", True, "no ALiBi: serve a model with rotary or learned positions"),
        ("model_config", "requires_raw_input_tokens", True, "this one reads token ids: serve another"),
    ],
)
def test_an_attribute_of_a_configuration(part, name, value, refusal):
    config = vllm_config()
    setattr(getattr(config, part), name, value)
    assert refusal in unsupported_config(config)


class MambaMixer(AttentionLayerBase):
    pass


class RSWAAttention(Attention):
    pass


class FusedMoEWithLoRA(nn.Module):
    pass


class Drafted(Model):
    """What the served model has beside the layers of the stand-in."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra


def attention(**changes):
    layer = Attention(4, 2, 8)
    for name, value in changes.items():
        setattr(layer if hasattr(layer, name) else layer.impl, name, value)
    return layer


def with_attribute(name, value):
    module = nn.Module()
    setattr(module, name, value)
    return module


def sparse():
    layer = MLAAttention(2, 8, 4, 8, 16)
    layer.indexer = object()
    return layer


@pytest.mark.parametrize(
    ("extra", "refusal"),
    [
        (MambaMixer(), "layer of class MambaMixer, which extra has: serve a model whose layers all have causal"),
        (RSWAAttention(4, 2, 8), "layer of class RSWAAttention, which extra has: serve a model whose layers all"),
        (attention(attn_type="encoder_only"), "attention of type encoder_only, which extra has: serve a model whose"),
        (attention(alibi_slopes=[0.5]), "ALiBi, which extra has: serve a model with rotary or learned positions"),
        (attention(kv_sharing_target_layer_name="layers.0"), "layer with the keys and values of another one, which"),
        (attention(chunk_lookback=1), "attention in chunks that look back, which extra has: serve a model"),
        (attention(is_sparse=True), "sparse attention that an indexer chooses keys for, which extra has: serve"),
        (sparse(), "sparse attention that an indexer chooses keys for, which extra has: serve a model with dense"),
        (FusedMoEWithLoRA(), "adapters of experts, which extra has: start vLLM without --enable-lora"),
        (
            with_attribute("forward", lambda x: x),
            "layer whose forward is replaced, which extra has: start vLLM",
        ),
        (with_attribute("deepstack_input_embeds", [torch.zeros(1)]), "buffers of users' images between layers, which"),
    ],
)
def test_a_layer(extra, refusal):
    assert refusal in unsupported_model(Drafted(extra), AttentionLayerBase)


@pytest.mark.parametrize("name", ["compute_logits", "embed_input_ids"])
def test_a_model_that_is_no_language_model(name):
    model = Model()
    setattr(model, name, None)
    expected = f"proofs need a language model, Model has no {name}: serve another model"
    assert unsupported_model(model, AttentionLayerBase) == expected


def test_a_method_bound_to_its_own_layer_is_no_replaced_forward():
    model = Model()
    layer = model.layers[0]
    layer.forward = types.MethodType(type(layer).forward, layer)
    assert unsupported_model(model, AttentionLayerBase) is None
