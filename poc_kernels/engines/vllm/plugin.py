"""What vLLM loads: its entry points ``vllm.general_plugins`` and ``vllm.endpoint_plugins``, both named poc_kernels.

vLLM imports this in each of its processes and commands, so nothing more of the package is imported until there is
something to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .node import VllmNode

NAME = "poc_kernels"
"""What VLLM_PLUGINS has to name."""
_NEEDED = ("fastapi", "greenlet", "httpcore2", "httpx2", "prometheus_client", "pydantic", "scipy")
"""Modules of the extra vllm-plugin, without which this package may be installed."""


def register() -> None:
    """Give vLLM's workers the RPC method of proofs; have servers refuse what proofs do not support before they load.

    vLLM calls it in each of its processes, also where VLLM_PLUGINS is not set: then it changes nothing. Idempotent.

    Raises:
        ValueError: proofs were not tried with this version of vLLM.
    """
    if NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from . import compat, support

    logging.getLogger(NAME).parent = logging.getLogger("vllm")  # its level, its form, its places
    refusal = support.unsupported_version(compat.version())
    if refusal is not None:
        raise ValueError(f"poc_kernels: {refusal}")
    compat.add_worker_method("poc_kernels_call", _call)
    compat.check_server_configs(_check)


def _call(worker: Any, command: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer a command of the API server in a worker: the RPC method."""
    from . import session

    return session.call(worker, command, payload)


def _check(vllm_config: Any) -> None:
    """Raise a ValueError if proofs do not support a server of this configuration, or lack what they need.

    They lack a package that is not installed, or a setting's right value.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"poc_kernels: proofs need {', '.join(missing)}: install poc-kernels with its extra vllm-plugin"
        )
    from . import compat, support
    from .settings import VllmSettings

    refusal = support.unsupported_config(vllm_config)
    if compat.rust_frontend():
        refusal = "vLLM's front end in Rust has no routes of plugins: start vLLM without VLLM_USE_RUST_FRONTEND"
    if refusal is not None:
        raise ValueError(f"poc_kernels: {refusal}")
    VllmSettings.from_environment(os.environ)


class PoCEndpoints:
    """The routes of rounds, their gate and their lifetime, for vLLM's API server (its ``EndpointPlugin``)."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._node: VllmNode | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Prepare ``app``: its gate and its lifetime will look for the node that `init_state` makes."""
        self._app = app
        app.add_middleware(_Entry, node=lambda: self._node)  # vLLM's own, which check --api-key, come before it
        lifespan = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan_with_rounds(app: FastAPI) -> AsyncIterator[Any]:
            assert self._node is not None
            async with lifespan(app) as state, self._node.running():
                yield state

        app.router.lifespan_context = lifespan_with_rounds

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Make the node, and add its routes: /health and /metrics are in place of vLLM's.

        Raises:
            ValueError: proofs do not support the configuration or the model, a setting has a wrong value, or the model
                failed its trial. The server ends.
        """
        from .node import VllmNode

        assert self._app is not None
        _check(engine_client.vllm_config)
        self._node = state.poc_kernels = await VllmNode.open(engine_client, args)
        self._node.add_routes(self._app)


class _Entry:
    """Middleware where the gate will be: vLLM puts its middleware together before there is a node."""

    def __init__(self, app: Any, node: Callable[[], VllmNode | None]) -> None:
        self._app, self._node = app, node
        self._gate: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._gate is None:
            node = self._node()
            assert node is not None
            self._gate = node.gate(self._app)
        await self._gate(scope, receive, send)
