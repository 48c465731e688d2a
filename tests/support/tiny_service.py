"""A second engine, of a few lines, as a service: numbers in place of a model, and an app that echoes."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from poc_kernels.protocol import Outcomes, PoCConfig
from poc_kernels.protocol.distances import DISTANCES
from poc_kernels.protocol.engine import never
from poc_kernels.scheduling import PriorityLanes, Turns
from poc_kernels.service import routes
from poc_kernels.service.device import TurnsDevice
from poc_kernels.service.gate import Gate, GateRules
from poc_kernels.service.round_service import RoundService
from poc_kernels.service.settings import ServiceSettings


def distance(config: PoCConfig, public_key: str, nonce: int) -> float:
    """The outcome of a nonce: in [0, 2), by its hash."""
    digest = hashlib.sha256(f"{config.block_hash} {public_key} {nonce}".encode()).digest()
    return digest[0] / 128


class TinyProver:
    """Nonces in, outcomes out."""

    form = DISTANCES
    slices = None

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.before_forward: Callable[[], object] = lambda: None

    def check(self, config: PoCConfig) -> None:
        if config.seq_len > 8:
            raise ValueError(f"seq_len must be at most 8, got {config.seq_len}")

    def prove(
        self, config: PoCConfig, public_key: str, nonces: Sequence[int], pause: Callable[[], None] = never
    ) -> Outcomes:
        self.before_forward()
        self.forwards.append(len(nonces))
        pause()
        values = [distance(config, public_key, nonce) for nonce in nonces]
        return Outcomes(values, dict.fromkeys(self.form.parts, 0.25))


def is_user(scope: Any) -> bool:
    """Whatever the app computes: not only under /v1."""
    return scope["path"] in ("/v1/chat/completions", "/invocations")


class TinyNode:
    """The service behind its gate, before an app that ends its own event streams."""

    def __init__(self, **settings: Any) -> None:
        self.prover = TinyProver()
        self.turns = Turns()
        device = TurnsDevice(self.turns, PriorityLanes("cpu"), self._drain)
        self.service = RoundService(self.prover, device, ServiceSettings(**settings))
        self.api = FastAPI()
        self.api.post("/v1/chat/completions")(self._chat)
        self.api.post("/invocations")(lambda: "computed")
        self.api.include_router(routes.poc_router(self.service))
        self.api.include_router(routes.operation_router(self.service))
        routes.handle_invalid_bodies(self.api)
        chosen = self.service.settings
        self.app = Gate(
            self.api,
            GateRules(is_user=is_user, ends_streams=True),
            closed=self.service.refuses_users,
            refused=self.service.metrics.refused,
            max_in_flight=chosen.max_in_flight,
            max_body_bytes=chosen.max_body_bytes,
            max_pow_body_bytes=chosen.max_pow_body_bytes,
            body_seconds=chosen.body_seconds,
            token=chosen.token,
        )

    def _drain(self, seconds: float) -> bool:
        return self.app.in_flight == 0 or (threading.Event().wait(min(seconds, 0.01)) or self.app.in_flight == 0)

    def _chat(self) -> StreamingResponse:
        def events() -> Iterator[str]:
            for piece in ("a", "b"):
                with self.turns.inference():
                    yield f'data: {{"choices": [{{"delta": {{"content": "{piece}"}}}}]}}\n\n'
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@contextlib.contextmanager
def tiny_node(**settings: Any) -> Iterator[TinyNode]:
    """A `TinyNode` that has started, and ends."""
    node = TinyNode(**settings)
    node.service.start()
    try:
        yield node
    finally:
        node.service.close(0.0, lambda seconds: node.turns.close())
