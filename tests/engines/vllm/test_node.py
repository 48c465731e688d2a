"""A node inside an app like vLLM's: what the gate shuts, what it leaves alone, and the order in which things end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import httpx2
import pytest
from callback_receivers import Receiver
from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from tiny_service import ROUND, TinyDevice, TinyProver
from vllm_apps import STREAM, BlockedProver, Client, app, arguments
from web import CHAT, TIMEOUT, client, error_of, eventually, serving

from poc_kernels.engines.vllm import compat, plugin
from poc_kernels.engines.vllm.arrivals import Arrivals
from poc_kernels.engines.vllm.node import VllmNode
from poc_kernels.engines.vllm.plugin import PoCEndpoints
from poc_kernels.engines.vllm.settings import VllmSettings
from poc_kernels.service.gate import POC_PREFIXES

POW = "/api/v1/pow"
CLAIM = {"public_key": "key", "block_hash": "block", "block_height": 7, "nonces": [1, 2], "dist": []}


class Rig(NamedTuple):
    """A plugin in an app, as vLLM puts it there, and a client of it."""

    http: httpx2.Client
    app: FastAPI
    engine: Client
    device: TinyDevice
    node: VllmNode
    arrivals: Arrivals

    def begin(self, phase: str = "generate", **changes: Any) -> None:
        answer = self.http.post(f"{POW}/init/{phase}", json={**ROUND, **changes})
        assert answer.status_code == 200, answer.text

    def status(self) -> Any:
        return self.http.get(f"{POW}/status").json()


Rigs = Callable[..., AbstractContextManager[Rig]]


@pytest.fixture
def rigs(monkeypatch: pytest.MonkeyPatch) -> Rigs:
    """Make a `Rig`, with settings by their names and as text."""
    monkeypatch.setattr(compat, "metrics_text", lambda: b"vllm:steps 1.0\n")
    monkeypatch.setattr(plugin, "_check", lambda config: None)
    monkeypatch.setenv("NO_PROXY", "*")

    @contextlib.contextmanager
    def rig(prover: TinyProver | None = None, **settings: str) -> Iterator[Rig]:
        engine, device, served, endpoints = Client(), TinyDevice(), app(), PoCEndpoints()
        environ = {f"POC_KERNELS_{name.upper()}": text for name, text in settings.items()}
        arrivals = Arrivals()
        arrivals.opened()
        node = VllmNode(
            engine,
            prover or TinyProver(),
            device,
            engine.count_steps,
            VllmSettings.from_environment(environ),
            arrivals=arrivals,
            loopback=True,
        )

        async def opened(*_: object) -> VllmNode:
            return node

        monkeypatch.setattr(VllmNode, "open", opened)
        endpoints.attach_router(served)
        served.middleware_stack = served.build_middleware_stack()  # as vLLM does, before there is a node
        asyncio.run(endpoints.init_state(engine, served.state, arguments()))
        with serving(served, lifespan="on") as url, client(url) as http:
            yield Rig(http, served, engine, device, node, arrivals)
            node.begin_shutdown()

    return rig


def computing(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Methods and paths of all routes that do not just read, those of mounted apps too."""
    for route in routes:
        if isinstance(route, Mount):
            yield from computing(route.routes, prefix + route.path)
        elif isinstance(route, WebSocketRoute):
            yield "WEBSOCKET", prefix + route.path
        elif isinstance(route, Route):
            for method in sorted((route.methods or set()) - {"GET", "HEAD", "OPTIONS"}):
                yield method, prefix + route.path


async def refused_socket(app: Any, path: str) -> list[dict[str, Any]]:
    """What an app sends to who opens a websocket."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "client": ("::1", 1)}
    await app(scope, receive, send)
    return sent


def test_every_route_that_computes_is_shut_while_generating_and_no_other(rigs: Rigs) -> None:
    with rigs() as rig:
        found = [each for each in computing(rig.app.routes) if not each[1].startswith(POC_PREFIXES)]
        assert ("POST", "/mounted/generate") in found
        assert len(found) == 9
        (accepted, *_) = asyncio.run(refused_socket(rig.app, "/v1/realtime"))
        assert accepted["type"] == "websocket.accept"
        rig.begin()
        for method, path in found:
            if method == "WEBSOCKET":
                (closed,) = asyncio.run(refused_socket(rig.app, path))
                assert (closed["type"], closed["code"]) == ("websocket.close", 1013)
                continue
            answer = rig.http.request(method, path.replace("{name}", "x"))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10"), path
            assert (error_of(answer)["type"], error_of(answer)["code"]) == ("server_error", "generating")
        ours = [f"{prefix}/status" for prefix in POC_PREFIXES]
        for path in ("/v1/models", "/version", "/v1/responses/x", "/health", "/metrics", *ours):
            assert rig.http.get(path).status_code == 200, path
        assert 'poc_gate_refusals_total{reason="generating"}' in rig.http.get("/metrics").text
        assert rig.http.post(f"{POW}/phase/validate").status_code == 200
        for method, path in found:
            if method != "WEBSOCKET" and path not in (CHAT, "/v1/slow"):
                assert rig.http.request(method, path.replace("{name}", "x")).json() == "computed"


def test_workers_see_requests_of_users_and_no_others(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    with rigs() as rig:
        changes: list[int] = []
        monkeypatch.setattr(rig.arrivals, "_add", changes.append)
        rig.begin("validate")
        assert rig.http.get("/health").status_code == 200
        assert changes == []
        assert rig.http.post(CHAT, json={}).text == STREAM
        eventually(lambda: changes == [1, -1])  # the client has its answer a little earlier


def test_streams_pass_as_they_are(rigs: Rigs) -> None:
    with rigs() as rig:
        rig.begin("validate")
        assert rig.http.post(CHAT, json={}).text == STREAM


def test_users_have_the_bounds_of_vllm_unless_the_operator_sets_others(rigs: Rigs) -> None:
    large = {"prompt": "x" * 2**21}
    with rigs() as rig:
        assert rig.http.post(CHAT, json=large).text == STREAM
    with rigs(max_body_bytes="1000") as rig:
        answer = rig.http.post(CHAT, json=large)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("settings", [{}, {"max_body_bytes": "1000", "max_in_flight": "8"}])
def test_a_client_that_leaves_before_its_answer_ends_what_is_computed_for_it(
    rigs: Rigs, settings: dict[str, str]
) -> None:
    with rigs(**settings) as rig:
        with pytest.raises(httpx2.ReadTimeout):
            rig.http.post("/v1/slow", json={}, timeout=0.5)
        eventually(lambda: rig.app.state.slow == ["begun", "ended"])


def test_health_and_metrics_are_ours(rigs: Rigs) -> None:
    with rigs() as rig:
        assert rig.http.get("/health").json() == {"status": "ok", "state": "IDLE", "reasons": []}
        lines = rig.http.get("/metrics").text.splitlines()
        assert "vllm:steps 1.0" in lines
        assert 'poc_state{poc_state="IDLE"} 1.0' in lines
        rig.engine.unfinished = 3
        assert "poc_inference_in_flight 3.0" in rig.http.get("/metrics").text
        rig.engine.errored = True
        health = rig.http.get("/health")
        assert (health.status_code, health.json()["reasons"][0]) == (503, "the engine is dead")


def test_the_token_guards_the_rounds_alone_and_metrics_where_it_is_told_to(rigs: Rigs) -> None:
    def codes(rig: Rig, *paths: str) -> list[int]:
        return [rig.http.get(path).status_code for path in paths]

    with rigs(token="s3cret") as rig:
        assert codes(rig, f"{POW}/status", "/metrics", "/health", "/v1/models", "/version") == [401, 200, 200, 200, 200]
        assert rig.http.post(CHAT, json={}).text == STREAM
    with rigs(token="s3cret", guard_metrics="true") as rig:
        assert codes(rig, f"{POW}/status", "/metrics", "/health", "/v1/models", "/version") == [401, 401, 200, 200, 200]
        for method in ("POST", "PUT", "DELETE", "TRACE", "OPTIONS"):  # vLLM's own answers them all
            assert [rig.http.request(method, path).status_code for path in ("/metrics", "/metrics/x")] == [401, 401]
        rig.http.headers["authorization"] = "Bearer s3cret"
        assert codes(rig, f"{POW}/status", "/metrics") == [200, 200]


def test_no_path_leads_around_the_token(rigs: Rigs) -> None:
    with rigs(token="s3cret") as rig:
        rig.app.root_path = "/behind"
        for path in (f"{POW}/status", f"/behind{POW}/status"):
            assert rig.http.get(path).status_code == 401
            assert rig.http.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
        rig.http.headers["authorization"] = "Bearer s3cret"
        rig.begin()
        assert rig.http.post("/behind/v1/completions").status_code == 503


def test_the_documentation_has_both_apps(rigs: Rigs) -> None:
    with rigs() as rig:
        documentation = rig.http.get("/openapi.json").json()
        assert {f"{POW}/init", "/v1/completions"} <= documentation["paths"].keys()
        assert {"RoundBody", "ProofBody"} <= documentation["components"]["schemas"].keys()


# ---- the end ----


def test_proofs_end_before_the_engine_and_who_waits_is_answered(rigs: Rigs) -> None:
    prover = BlockedProver()
    with rigs(prover) as rig, ThreadPoolExecutor(3) as pool:
        rig.begin("validate")
        waiting = [pool.submit(rig.http.post, f"{POW}/validate", json=CLAIM) for _ in range(3)]
        assert prover.entered.wait(TIMEOUT)
        eventually(lambda: rig.status()["queued_nonces"] == 6)
        rig.engine.shutdown(timeout=7)
        assert rig.engine.calls == ["shutdown 7"]
        assert not rig.node.service.worker._thread.is_alive()
        assert [answer.result(TIMEOUT).status_code for answer in waiting] == [409] * 3
        assert rig.http.post(f"{POW}/init", json=ROUND).status_code == 503
        assert error_of(rig.http.post("/v1/completions"))["code"] == "shutting_down"
        rig.engine.shutdown()
        assert rig.engine.calls == ["shutdown 7", "shutdown None"]


def test_an_engine_that_ends_before_its_clients_is_no_dead_one(rigs: Rigs, caplog: pytest.LogCaptureFixture) -> None:
    with rigs() as rig:
        rig.engine.shutdown()
        rig.node._engine_died()  # as the watch does, which sees it in its next look
    assert "dead" not in caplog.text


def test_users_are_resumed_before_the_engine_ends(rigs: Rigs) -> None:
    paused: list[bool] = []
    with rigs(drain_seconds="0") as rig:
        rig.engine.at_shutdown = lambda: paused.append(rig.device.paused)
        rig.begin()
        eventually(lambda: rig.device.paused)
        rig.engine.shutdown()
    assert paused == [False]


def test_callbacks_are_posted_after_the_engine_has_ended(rigs: Rigs) -> None:
    receiver = Receiver()
    port = receiver.port
    receiver.stop()
    with rigs() as rig:
        rig.begin(callback_url=receiver.url)
        eventually(lambda: rig.status()["callbacks"]["failed_attempts"] > 0)
        rig.node.service.callbacks._retry_seconds = (0.01, 0.05)
        rig.engine.shutdown()
        found = rig.status()["valid_nonces"]
        again = Receiver(port=port)
    # The server has ended, and the lifetime of its app with it.
    try:
        assert sorted(nonce for batch in again.contents(path="/generated") for nonce in batch["nonces"]) == found
    finally:
        again.stop()


def test_a_server_that_lives_on_without_its_engine_says_so_and_takes_no_proofs(
    rigs: Rigs, caplog: pytest.LogCaptureFixture
) -> None:
    prover = BlockedProver()
    with rigs(prover) as rig, ThreadPoolExecutor(1) as pool:
        rig.begin("validate")
        waiting = pool.submit(rig.http.post, f"{POW}/validate", json=CLAIM)
        assert prover.entered.wait(TIMEOUT)
        rig.engine.errored = True
        assert waiting.result(TIMEOUT).status_code == 409
        eventually(lambda: not rig.node.service.worker._thread.is_alive())
        reasons = rig.http.get("/health").json()["reasons"]
        assert reasons == ["the engine is dead", "the proof thread is not running"]
        assert "the engine is dead: the proofs that wait are answered" in caplog.text
        for path in ("/init", "/init/generate", "/init/validate", "/phase/generate", "/phase/validate"):
            answer = rig.http.post(POW + path, json=ROUND)
            assert (answer.status_code, answer.json()["detail"]) == (
                503,
                "the proof thread is not running, so no round can begin",
            )
        assert rig.status()["state"] == "STOPPED"
        assert rig.http.post(f"{POW}/validate", json=CLAIM).status_code == 409
        assert rig.http.post(f"{POW}/stop").status_code == 200
