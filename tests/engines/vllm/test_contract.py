"""Each name of vLLM that engines/vllm uses beyond the public API: a new minor of vLLM fails here first."""

import dataclasses
import dis
import importlib.util
import inspect
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import vllm_in_process  # noqa: F401 (the environment of vLLM)
from torch import nn
from vllm import SamplingParams, envs
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.protocol import EngineClient
from vllm.forward_context import ForwardContext, create_forward_context, override_forward_context
from vllm.ir.op import IrOp
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.interfaces_base import VllmModel
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.worker import workspace
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from poc_kernels.engines.vllm import compat
from poc_kernels.engines.vllm.plugin import PoCEndpoints
from poc_kernels.engines.vllm.support import unsupported_version


def takes(function):
    return list(inspect.signature(function).parameters)


def sets(function):
    """The attributes that a method sets."""
    return {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_ATTR"}


def fields(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_the_version_is_one_that_is_supported():
    assert unsupported_version(compat.version()) is None


def test_names_of_layers_are_where_they_were():
    assert compat.custom_op() is CustomOp
    assert compat.attention_layer() is AttentionLayerBase
    assert compat.lora_layer() is BaseLayerWithLoRA
    for layer in (Attention, ChunkedLocalAttention, MLAAttention):
        assert issubclass(layer, AttentionLayerBase)
        assert issubclass(layer, nn.Module)
    assert FusedMoEWithLoRA.__name__ == "FusedMoEWithLoRA"


def test_attributes_of_attention():
    used = {"num_heads", "num_kv_heads", "head_size", "head_size_v", "sliding_window", "impl", "attn_type", "kv_cache"}
    assert used | {"kv_sharing_target_layer_name"} <= sets(Attention.__init__)
    assert "attention_chunk_size" in sets(ChunkedLocalAttention.__init__)
    assert takes(Attention.forward) == ["self", "query", "key", "value", "output_shape", "output_dtype"]


def test_attributes_of_the_implementation_of_attention():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    assert {"scale", "logits_soft_cap", "alibi_slopes", "sinks"} <= sets(CPUAttentionBackendImpl.__init__)


def test_attributes_of_latent_attention():
    used = {"num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_b_proj", "scale", "sliding_window"}
    assert used | {"indexer", "impl"} <= sets(MLAAttention.__init__)
    assert takes(MLAAttention.forward)[1:5] == ["q", "kv_c_normed", "k_pe", "output_shape"]
    from vllm.v1.attention.backends.mla import amx_mla

    for name in ("W_UK_T", "W_UV"):
        assert name in inspect.getsource(MLAAttention.process_weights_after_loading)
    assert "kv_b_proj" in inspect.getsource(amx_mla)


def test_custom_ops_choose_a_method():
    assert "_forward_method" in sets(CustomOp.__init__)
    assert "_forward_method" in inspect.getsource(CustomOp.forward)
    for name in ("forward_native", "forward_cuda", "forward_cpu", "forward_hip", "forward_xpu", "forward_oot"):
        assert callable(getattr(CustomOp, name))
    for name in ("is_rocm", "is_cpu", "is_xpu", "is_out_of_tree"):
        assert isinstance(getattr(current_platform, name)(), bool)
    assert compat.platform_forward() == "forward_cpu"


def test_compiled_classes_can_be_told_not_to_compile():
    from vllm.compilation import decorators

    assert "self.do_not_compile" in inspect.getsource(decorators._support_torch_compile)


def test_the_forward_context():
    assert {"attn_metadata", "vllm_config", "skip_compiled"} <= set(takes(create_forward_context))
    assert {"no_compile_layers", "all_moe_layers", "skip_compiled"} <= fields(ForwardContext)
    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})
    from vllm.forward_context import get_forward_context, is_forward_context_available

    with override_forward_context(context):
        assert get_forward_context() is context
    assert not is_forward_context_available()


def test_ops_take_a_priority_for_a_while():
    pinned = compat.kernels_of_ops()
    assert {op.name for op, _ in pinned} >= {"rms_norm", "fused_add_rms_norm"}
    assert {op.name for op, _ in pinned} == set(IrOp.registry)
    for op, providers in pinned:
        before = op.get_priority()
        assert providers[-1] == "native"
        with op.set_priority(providers):
            assert op.get_priority() == [name for name in providers if op.impls[name].supported]
        assert op.get_priority() == before


def test_the_workspace_of_the_process():
    before = workspace._manager
    own = compat.new_workspace("cpu")
    with compat.in_workspace(own):
        assert workspace.current_workspace_manager() is own
    assert workspace._manager is before


def test_configurations():
    assert {"model_config", "parallel_config", "cache_config", "compilation_config"} <= fields(VllmConfig)
    parallel = {"data_parallel_size", "pipeline_parallel_size", "enable_eplb", "world_size", "_api_process_count"}
    assert parallel | {f"{kind}_context_parallel_size" for kind in ("prefill", "decode")} <= fields(ParallelConfig)
    assert "cache_dtype" in fields(CacheConfig)
    assert {"dtype", "max_model_len", "enable_sleep_mode", "logprobs_mode", "hf_text_config"} <= fields(ModelConfig)
    flags = ("is_encoder_decoder", "is_diffusion", "is_attention_free", "is_hybrid", "has_inner_state", "uses_alibi")
    for name in (*flags, "requires_raw_input_tokens", "uses_mrope", "get_hidden_size", "get_vocab_size"):
        assert hasattr(ModelConfig, name), name
    assert "runner_type" in inspect.getsource(ModelConfig.__post_init__)
    assert set(takes(EngineArgs.create_engine_config)) >= {"self", "usage_context"}


def test_models_take_embeddings_and_give_logits():
    assert takes(VllmModel.embed_input_ids) == ["self", "input_ids"]
    from vllm.model_executor.models.llama import LlamaForCausalLM

    expected = ["self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"]
    assert takes(LlamaForCausalLM.forward)[:5] == expected
    assert takes(LlamaForCausalLM.compute_logits) == ["self", "hidden_states"]
    multimodal = importlib.util.find_spec("vllm.model_executor.models.qwen3_vl").origin
    assert "self.deepstack_input_embeds = " in Path(multimodal).read_text()


def test_workers():
    from vllm.v1.worker.gpu_worker import Worker

    assert "vllm_config" in sets(WorkerBase.__init__)
    assert takes(Worker.execute_model)[:2] == ["self", "scheduler_output"]
    assert takes(GPUModelRunner.get_model) == takes(CPUModelRunner.get_model) == ["self"]
    assert "self.device = " in inspect.getsource(GPUModelRunner)
    assert "total_num_scheduled_tokens" in fields(SchedulerOutput)


def test_ranks_have_a_store():
    from torch.distributed import distributed_c10d
    from vllm.distributed import get_tp_group, parallel_state

    assert takes(distributed_c10d._get_default_store) == takes(get_tp_group) == []
    assert "world_size" in parallel_state.GroupCoordinator.__annotations__


def test_the_client_of_the_engine():
    assert {"collective_rpc", "generate", "pause_generation", "resume_generation"} <= set(dir(EngineClient))
    assert {"mode", "clear_cache"} <= set(takes(EngineClient.pause_generation))
    assert {"method", "timeout", "args"} <= set(takes(EngineClient.collective_rpc))
    assert EngineDeadError.__name__ == "EngineDeadError"
    from vllm.v1.engine import core

    assert "Server shutting down" in inspect.getsource(core)


def test_answers_tell_how_likely_their_tokens_are():
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
    assert params.logprobs == 0
    assert {"prompt_token_ids", "outputs"} <= set(takes(RequestOutput.__init__))
    assert {"token_ids", "logprobs"} <= fields(CompletionOutput)


def test_the_rust_front_end_has_a_variable():
    assert envs.VLLM_USE_RUST_FRONTEND in (False, True, 0, 1, None)


def test_the_server_and_its_plugins():
    from vllm.entrypoints.launchers import app, launcher
    from vllm.entrypoints.serve.middleware import authenticate
    from vllm.plugins import load_plugins_by_group
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    assert isinstance(PoCEndpoints(), EndpointPlugin)
    assert takes(EndpointPlugin.init_state) == takes(PoCEndpoints.init_state)
    assert takes(EndpointPlugin.attach_router) == takes(PoCEndpoints.attach_router)
    assert UsageContext.OPENAI_API_SERVER == "OPENAI_API_SERVER"
    assert "VLLM_PLUGINS" in inspect.getsource(load_plugins_by_group)
    # The node is made after the app and before it starts; vLLM's own middleware comes before the gate.
    built = inspect.getsource(app.build_app)
    assert built.index("attach_endpoint_plugins") < built.index("init_entrypoints_middleware")
    # A server that ends calls it first, of the instance.
    assert "engine_client.shutdown" in inspect.getsource(launcher.serve_http)
    assert takes(AsyncLLM.shutdown) == ["self", "timeout"]
    assert {"errored", "get_num_unfinished_requests"} <= set(dir(AsyncLLM))
    assert not any(prefix.startswith("/api") for prefix in authenticate.GUARDED_PREFIX)
    assert get_prometheus_registry() is not None
