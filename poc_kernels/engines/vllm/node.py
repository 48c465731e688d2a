"""A node inside a vLLM server: the rounds' service, with vLLM's engine behind RPC and vLLM's app before it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Scope

from ...protocol import PoCState, Prover
from ...service import routes
from ...service.device import Device
from ...service.gate import POC_PREFIXES, Gate, GateRules, under
from ...service.receivers import is_loopback
from ...service.round_service import MIN_CLOSE_SECONDS, RoundService
from ...service.settings import variable
from . import compat
from .arrivals import Arrivals
from .messages import METHOD, Progress, Run, pack, unpack
from .remote import open_engine
from .settings import VllmSettings
from .watch import EngineWatch

logger = logging.getLogger("poc_kernels")

_READS = ("GET", "HEAD", "OPTIONS")
_ours = under(*POC_PREFIXES, "/health", "/metrics")
_no_users = under(*POC_PREFIXES, "/metrics")  # vLLM's own /metrics answers every method, and is guarded as ours is


def computes(scope: Scope) -> bool:
    """Tell whether a request may make the engine compute: any that does not just read, whatever routes vLLM has."""
    return not _no_users(scope) and (scope["type"] == "websocket" or scope["method"] not in _READS)


_RULES = GateRules(
    is_user=computes,
    passes=lambda scope: not (computes(scope) or _ours(scope)),
    ends_streams=True,
    sees_departures=True,  # and cancelled from outside, vLLM's handlers leave the engine computing
)


class VllmNode:
    """The rounds of a vLLM server.

    Args:
        client: vLLM's EngineClient. From now on its ``shutdown``, which a server that ends calls first, ends proofs
            before the engine.
        prover, device: vLLM's engine, as the service sees it.
        steps: asks the workers for the number of steps that they have computed.
        settings: what the operator set.
        arrivals: counts users' requests, for the workers to see.
        loopback: whether the server listens to this machine alone.
        models: names of the served model.
        version: of vLLM.
    """

    def __init__(
        self,
        client: Any,
        prover: Prover,
        device: Device,
        steps: Callable[[], Awaitable[int]],
        settings: VllmSettings,
        *,
        arrivals: Arrivals | None = None,
        loopback: bool = False,
        models: Sequence[str] = (),
        version: str = "unknown",
    ) -> None:
        self.settings = settings
        self._arrivals = arrivals
        self._watch = EngineWatch(client, steps, self._users_wait, self._engine_died, settings.stall_seconds)
        self.service = RoundService(
            prover,
            device,
            settings,
            troubles=[self._watch.trouble],
            loopback=loopback,
            models=models,
            engine=version,
        )
        self._unfinished = client.get_num_unfinished_requests
        self.service.metrics.watch("poc_inference_in_flight", "Users' requests being served", self._unfinished)
        self._deadline = math.inf
        self._end_proofs_before(client)

    @classmethod
    async def open(cls, client: Any, args: Namespace) -> VllmNode:
        """Make the node of a server, on whose event loop this is called.

        Args:
            client: vLLM's EngineClient.
            args: of the server's command line.

        Raises:
            ValueError: a variable has no value of its setting, or proofs do not support the model.
        """
        settings = VllmSettings.from_environment(os.environ)
        arrivals = Arrivals()
        try:
            prover, device = await open_engine(
                client,
                share=settings.validation_share,
                slice_seconds=settings.slice_seconds,
                cuda_graphs=settings.cuda_graphs,
                answer_seconds=settings.stall_seconds,
                arrivals=arrivals,
            )
        finally:
            arrivals.opened()
        loopback = args.uds is None and is_loopback(args.host or "")
        if settings.token is None and not loopback:
            logger.warning(
                "the PoC routes are open to whoever reaches this address, vLLM's --api-key does not guard them: set %s",
                variable("token"),
            )

        async def steps() -> int:
            answers = await client.collective_rpc(
                METHOD, args=("run", pack(Run(round="")))
            )  # of no round: computes nothing
            return int(unpack(Progress, answers[0]).counters["steps"])

        models = [*(args.served_model_name or ()), args.model]
        node = cls(
            client,
            prover,
            device,
            steps,
            settings,
            arrivals=arrivals,
            loopback=loopback,
            models=models,
            version=compat.version(),
        )
        logger.info("rounds on %s, hidden size %d", prover.model.dtype, prover.model.hidden_size)
        return node

    def _users_wait(self) -> bool:
        """Tell whether users wait for a step that is to come: while GENERATING, none is."""
        return self._unfinished() > 0 and self.service.manager.state != PoCState.GENERATING

    # ---- for vLLM's app ----

    def gate(self, app: ASGIApp) -> ASGIApp:
        """Put the gate before ``app``: no users while GENERATING, no PoC routes without the token."""
        refused = self.service.metrics.refused
        gate = Gate(app, _RULES, self.settings, closed=self.service.refuses_users, refused=refused)
        return gate if self._arrivals is None else self._arrivals.counted(gate, computes)

    def add_routes(self, app: FastAPI) -> None:
        """Add the PoC routes, /health and /metrics to ``app``, before all others: its own of these two are not met."""
        before = list(app.router.routes)
        app.include_router(routes.poc_router(self.service))
        app.include_router(routes.operation_router(self.service, compat.metrics_text))
        routes.document_bodies(app)
        app.router.routes[:] = [*app.router.routes[len(before) :], *before]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run callbacks, the proof worker and the watch of the engine inside the block; end all of them after it."""
        self.service.start()
        watching = asyncio.create_task(self._watch.run())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(self.close)

    # ---- the end ----

    def _end_proofs_before(self, client: Any) -> None:
        shutdown = client.shutdown

        @functools.wraps(shutdown)
        def after_proofs(*args: Any, **options: Any) -> Any:
            self.begin_shutdown()
            return shutdown(*args, **options)

        client.shutdown = after_proofs

    def begin_shutdown(self) -> None:
        """Admit nothing more, answer who waits for a verdict, end proofs and resume users. Idempotent."""
        self._deadline = min(self._deadline, time.monotonic() + self.settings.shutdown_seconds)
        self.service.begin_shutdown()
        self._end_proofs()

    def close(self) -> None:
        """End everything, within shutdown_seconds: proofs, then callbacks, with or without an engine. Idempotent."""
        self.begin_shutdown()
        self.service.close(self._deadline)

    def _engine_died(self) -> None:
        """Answer who waits for a verdict: the server may live on without an engine."""
        if self.service.stopping:  # it ended first, as it should
            return
        logger.error("the engine is dead: the proofs that wait are answered, and no others are taken")
        self.service.manager.stop_round()
        self._end_proofs()

    def _end_proofs(self) -> None:
        left = max(min(self._deadline - time.monotonic(), self.settings.shutdown_seconds), MIN_CLOSE_SECONDS)
        self.service.worker.close(left)
