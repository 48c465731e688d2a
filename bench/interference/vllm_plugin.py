"""What the suite adds to a vLLM server: an endpoint plugin with two routes, which no other server has.

It is loaded from a folder of its own by the server's Python, so it imports nothing of the suite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from poc_kernels.engines.vllm.messages import METHOD, Progress, Run, pack, unpack
from poc_kernels.protocol import Outcomes, PoCConfig, Row
from poc_kernels.protocol.engine import never
from poc_kernels.scheduling import Pacing

NAME = "poc_kernels_bench"
_ALL = 1_000_000
"""More slices than a batch of proofs has."""


class BenchEndpoints:
    """Routes that change how proofs share the engine, and tell what its first worker has counted."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's app."""
        app.add_api_route("/bench/condition", _condition, methods=["POST"])
        app.add_api_route("/bench/counters", self._counters, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep vLLM's EngineClient."""
        self._client = engine_client

    async def _counters(self) -> dict[str, float]:
        answers = await self._client.collective_rpc(METHOD, args=("run", pack(Run(round=""))))
        return dict(unpack(Progress, answers[0]).counters)


async def _condition(request: Request) -> dict[str, Any]:
    """Have validation paced by ``share``, or, with ``whole_batches``, each batch computed in one RPC, whoever waits."""
    wanted = await request.json()
    prover = request.app.state.poc_kernels.service.manager.prover
    device = prover.device
    device.__dict__.pop("budget", None)
    prover.__dict__.pop("prove", None)
    if wanted["share"] is not None:
        device.pacing = Pacing(share=wanted["share"])
    if wanted["whole_batches"]:
        # One forward is put at a time, and an RPC goes on until there is nothing more to compute.
        device.budget = lambda: {"alone": True, "slices": _ALL}
        prover.prove = functools.partial(_one_batch, prover)
    return {}


def _one_batch(
    prover: Any, config: PoCConfig, rows: Sequence[Row], pause: Any = never, then: Sequence[Sequence[Row]] = ()
) -> Outcomes:
    outcomes: Outcomes = type(prover).prove(prover, config, rows, pause)
    return outcomes
