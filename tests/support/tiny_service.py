"""A second engine, of a few lines, as a service: numbers in place of a model, and an app that echoes."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from poc_kernels.protocol import Outcomes, PoCConfig, ProofForm, Prover, Row
from poc_kernels.protocol.artifacts.encoding import encode
from poc_kernels.protocol.distances.form import DISTANCES
from poc_kernels.protocol.engine import never
from poc_kernels.protocol.fingerprint.form import FINGERPRINT
from poc_kernels.protocol.vectors.form import VECTORS
from poc_kernels.scheduling import PriorityLanes, Turns, TurnsClosed
from poc_kernels.service import routes
from poc_kernels.service.device import Device, SliceTimes, TurnsDevice
from poc_kernels.service.gate import Gate, GateRules
from poc_kernels.service.round_service import RoundService
from poc_kernels.service.settings import ServiceSettings

ARTIFACT_FORMS = {form.name: form for form in (VECTORS, FINGERPRINT)}
ROUND: dict[str, Any] = {
    "block_hash": "block",
    "block_height": 7,
    "public_key": "key",
    "r_target": 1.0,
    "node_id": 0,
    "node_count": 1,
    "batch_size": 4,
    "seq_len": 8,
}
"""Of the older wire."""
_FORWARD_SECONDS = 0.005
"""Without a forward's time, a slow test would see more nonces generated than a node lists or keeps."""


def distance(config: PoCConfig, public_key: str, nonce: int) -> float:
    """The outcome of a nonce: in [0, 2), by its hash."""
    digest = hashlib.sha256(f"{config.block_hash} {public_key} {nonce}".encode()).digest()
    return digest[0] / 128


class TinyProver:
    """Nonces in, outcomes out."""

    forms: Mapping[str, ProofForm] = {"distances": DISTANCES}
    slices = None

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.before_forward: Callable[[], object] = lambda: None

    def check(self, config: PoCConfig) -> None:
        if config.seq_len > 8:
            raise ValueError(f"seq_len must be at most 8, got {config.seq_len}")

    def prove(
        self,
        config: PoCConfig,
        rows: Sequence[Row],
        pause: Callable[[], None] = never,
        then: Sequence[Sequence[Row]] = (),
    ) -> Outcomes:
        self.before_forward()
        self.forwards.append(len(rows))
        threading.Event().wait(_FORWARD_SECONDS)
        pause()
        values = [self.outcome(config, *row) for row in rows]
        return Outcomes(values, dict.fromkeys(self.forms[config.proof].parts, 0.25))

    def outcome(self, config: PoCConfig, public_key: str, nonce: int) -> Any:
        return distance(config, public_key, nonce)


def artifact(config: PoCConfig, public_key: str, nonce: int) -> str:
    """The artifact of a nonce: a unit vector, by its hash."""
    form = ARTIFACT_FORMS[config.proof]
    options = (config.proof, config.stronger_rng, config.use_random_projection)
    seeded = f"{options} {config.block_hash} {public_key} {nonce}"
    numbers = np.random.default_rng(list(seeded.encode())).normal(size=form.k_dim_of(config))
    return encode((numbers / np.linalg.norm(numbers)).astype(np.float16))


class ArtifactProver(TinyProver):
    """Proves every form; the nonces of ``missing`` have no artifact."""

    forms: Mapping[str, ProofForm] = {**TinyProver.forms, **ARTIFACT_FORMS}

    def __init__(self) -> None:
        super().__init__()
        self.missing: set[int] = set()

    def check(self, config: PoCConfig) -> None:
        if config.seq_len > 32:
            raise ValueError(f"seq_len must be at most 32, got {config.seq_len}")

    def outcome(self, config: PoCConfig, public_key: str, nonce: int) -> Any:
        if config.proof not in ARTIFACT_FORMS:
            return super().outcome(config, public_key, nonce)
        return None if nonce in self.missing else artifact(config, public_key, nonce)


def is_user(scope: Any) -> bool:
    """Whatever the app computes: not only under /v1."""
    return scope["path"] in ("/v1/chat/completions", "/invocations")


class TinyDevice:
    """A device far away, which computes at once whatever it is given, and whose calls may fail."""

    pacing = None
    waiting = False

    def __init__(self) -> None:
        self.paused = False
        self.failures: dict[str, int] = {}
        self._cancelled = False

    def _call(self, name: str) -> None:
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise ConnectionError(f"{name} was not answered")

    def lane(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def take(self) -> float:
        self._call("take")
        if self._cancelled:
            raise TurnsClosed("cancelled")
        return 0.0

    def pause(self) -> SliceTimes:
        self._call("pause")
        return SliceTimes(self.take(), 0.0)

    def give_back(self) -> float:
        return 0.0

    def cancel(self) -> None:
        self._cancelled = True

    def drain_users(self, timeout_seconds: float) -> bool:
        self._call("drain_users")
        return True

    def pause_users(self) -> None:
        self._call("pause_users")
        self.paused = True

    def resume_users(self) -> None:
        self._call("resume_users")
        self.paused = False


class TinyNode:
    """The service behind its gate, before an app that ends its own event streams."""

    def __init__(
        self,
        prover: Prover | None = None,
        device: Device | None = None,
        *,
        loopback: bool = True,
        models: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.prover = prover or TinyProver()
        self.turns = Turns()
        device = device or TurnsDevice(self.turns, PriorityLanes("cpu"), self._drain)
        self.service = RoundService(
            self.prover, device, ServiceSettings(**settings), loopback=loopback, models=models, engine="tiny 1.0"
        )
        self.api = FastAPI()
        self.api.post("/v1/chat/completions")(self._chat)
        self.api.post("/invocations")(lambda: "computed")
        self.api.include_router(routes.poc_router(self.service))
        self.api.include_router(routes.operation_router(self.service))
        routes.document_bodies(self.api)
        self.app = Gate(
            self.api,
            GateRules(is_user=is_user, ends_streams=True),
            self.service.settings,
            closed=self.service.refuses_users,
            refused=self.service.metrics.refused,
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
def tiny_node(prover: Prover | None = None, device: Device | None = None, **settings: Any) -> Iterator[TinyNode]:
    """A `TinyNode` that has started, and ends."""
    node = TinyNode(prover, device, **settings)
    node.service.start()
    try:
        yield node
    finally:
        node.service.close(0.0, lambda seconds: node.turns.close())
