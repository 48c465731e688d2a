"""What is used of vLLM beyond its public API, all in this file: tests/engines/vllm/test_contract.py pins each name.

vLLM is imported where a function is called, so that importing this takes no time and needs no vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

SUPPORTED_MINORS = ("0.32",)
"""Releases of vLLM that the tests run with."""

_KERNELS_OF_OPS = ("vllm_c", "triton", "native")
"""Providers of vLLM's IR ops, the preferred first: what a server without a compiler has by default."""

_meetings = itertools.count()
"""Of all ranks: see `all_ranks_meet`."""


def version() -> str:
    """Return the version of the vLLM that is installed."""
    import vllm

    found: str = vllm.__version__
    return found


def custom_op() -> type:
    """Return the class of layers that vLLM computes with a kernel of the platform or, to be compiled, in torch."""
    from vllm.model_executor.custom_op import CustomOp

    return CustomOp  # type: ignore[no-any-return]


def attention_layer() -> type:
    """Return the base class of all layers that keep something of a request: attention, Mamba."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return AttentionLayerBase  # type: ignore[no-any-return]


def lora_layer() -> type:
    """Return the class that wraps a layer with the adapters of the requests in a step."""
    from vllm.lora.layers import BaseLayerWithLoRA

    return BaseLayerWithLoRA  # type: ignore[no-any-return]


def platform_forward() -> str:
    """Return the name of the method with which this platform computes a custom op where nothing is compiled."""
    from vllm.platforms import current_platform

    for name, here in (
        ("forward_hip", current_platform.is_rocm),
        ("forward_cpu", current_platform.is_cpu),
        ("forward_xpu", current_platform.is_xpu),
        ("forward_oot", current_platform.is_out_of_tree),
    ):
        if here():
            return name
    return "forward_cuda"


def forward_context(vllm_config: Any, replaced: Mapping[int, Any]) -> Any:
    """Make the context that layers look into during a forward that has no requests.

    Args:
        vllm_config: vLLM's configuration.
        replaced: what stands in for a layer that is found by its name, by the layer's id.
    """
    from vllm.forward_context import create_forward_context

    context = create_forward_context({}, vllm_config, skip_compiled=True)
    context.no_compile_layers = {
        name: replaced.get(id(layer), layer) for name, layer in context.no_compile_layers.items()
    }
    context.all_moe_layers = None  # each is found by its own name: none is taken from a list of those to come
    return context


def in_forward_context(context: Any) -> AbstractContextManager[None]:
    """Have layers find ``context`` inside the block: it is one of the process, not of the thread."""
    from vllm.forward_context import override_forward_context

    entered: AbstractContextManager[None] = override_forward_context(context)
    return entered


def kernels_of_ops() -> Sequence[tuple[Any, list[str]]]:
    """Return each IR op with the providers that it is pinned to, whether or not the server compiles its model."""
    from vllm.ir.op import IrOp

    return [
        (op, [name for name in _KERNELS_OF_OPS if name in op.impls and op.impls[name].supported])
        for op in IrOp.registry.values()
    ]


def new_workspace(device: Any) -> Any:
    """Make scratch memory for kernels, apart from that of the server's steps."""
    from vllm.v1.worker.workspace import WorkspaceManager

    return WorkspaceManager(device)


@contextlib.contextmanager
def in_workspace(manager: Any) -> Iterator[None]:
    """Have kernels take their scratch memory from ``manager`` inside the block."""
    from vllm.v1.worker import workspace

    before = workspace._manager
    workspace._manager = manager
    try:
        yield
    finally:
        workspace._manager = before


def all_ranks_meet(seconds: float) -> bool:
    """Wait until all ranks of a model have called this as often, at most so many seconds; return whether they have."""
    from torch.distributed import distributed_c10d
    from vllm.distributed import get_tp_group

    # By the store, not by a barrier: a rank that waits in a collective could neither give up nor end its process.
    store = distributed_c10d._get_default_store()
    key, ranks = f"poc_kernels meeting {next(_meetings)}", get_tp_group().world_size
    deadline = time.monotonic() + seconds
    come = store.add(key, 1)
    while come < ranks and time.monotonic() < deadline:
        time.sleep(0.01)
        come = store.add(key, 0)
    return bool(come >= ranks)


def is_engine_dead(error: BaseException) -> bool:
    """Tell whether a call failed because there is no engine any more."""
    # By name: whoever has such an error has vLLM, and nobody else has to.
    return any(kind.__name__ == "EngineDeadError" for kind in type(error).__mro__)


def is_shutting_down(error: BaseException) -> bool:
    """Tell whether a call failed because the engine takes none any more while it shuts down."""
    return "Server shutting down" in str(error)


async def scored(client: Any, prompt: Sequence[int], count: int) -> Any:
    """Have the server give the likeliest tokens after a prompt, and how likely each is; return its ``RequestOutput``.

    Args:
        client: vLLM's EngineClient.
        prompt: token ids.
        count: tokens of the answer.
    """
    from vllm import SamplingParams

    # Not the prompt's own log-probabilities: with adapters of users enabled, vLLM 0.32 fails to compute them.
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
    request = client.generate({"prompt_token_ids": list(prompt)}, params, f"poc_kernels-{uuid.uuid4().hex}")
    return [output async for output in request][-1]


# ---- the server ----


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Let vLLM's ``collective_rpc`` call ``method`` by its name, on each worker."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, name, method)


def check_server_configs(check: Callable[[Any], None]) -> None:
    """Have each configuration of a server go through ``check``, which may raise, before an engine is started with it.

    No hook of vLLM's sees one so early: without this, a refusal would come after the model was loaded.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:  # this process makes no configuration
        return
    make = arg_utils.EngineArgs.create_engine_config
    if hasattr(make, "checked"):
        return

    @functools.wraps(make)
    def checked(self: Any, usage_context: Any = None, **options: Any) -> Any:
        config = make(self, usage_context, **options)
        if usage_context == "OPENAI_API_SERVER":
            check(config)
        return config

    checked.checked = True  # type: ignore[attr-defined]
    arg_utils.EngineArgs.create_engine_config = checked


def rust_frontend() -> bool:
    """Return whether the server's front end is vLLM's in Rust, which loads no plugins."""
    from vllm import envs

    return bool(envs.VLLM_USE_RUST_FRONTEND)


def metrics_text() -> bytes:
    """Return vLLM's metrics in Prometheus' text format."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return generate_latest(get_prometheus_registry())
