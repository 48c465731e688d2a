"""A round as a service, on an engine of a few lines: no model, no transformers, another app."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from helpers import run_python
from prometheus_client.parser import text_string_to_metric_families
from tiny_service import TinyNode, distance, tiny_node
from web import CHAT, client, eventually, serving

from poc_kernels.protocol import PoCState, ProofBatch
from poc_kernels.protocol.distances import wire
from poc_kernels.service import round_service, routes

POW = "/api/v1/pow"
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


@pytest.fixture
def node() -> Iterator[TinyNode]:
    with tiny_node(shutdown_seconds=1.0, max_queued_nonces=100) as node:
        yield node


@pytest.fixture
def http(node: TinyNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(node.app) as url, client(url) as http:
        yield http


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


def posted(http: httpx2.Client, path: str, body: object = None) -> Any:
    answer = http.post(POW + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def claim(nonces: list[int], dist: list[float]) -> dict[str, Any]:
    common = {key: ROUND[key] for key in ("block_hash", "block_height", "public_key", "node_id")}
    return {**common, "nonces": nonces, "dist": dist}


def of(node: TinyNode, nonce: int) -> float:
    config = node.service.manager.config
    assert config is not None
    return distance(config, "key", nonce)


def test_a_round_from_generating_to_the_verdict(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    answer = posted(http, "/init/generate", {**ROUND, "callback_url": receiver.url})
    assert answer["pow_status"]["state"] == "GENERATING"
    eventually(lambda: receiver.posts)
    for path in (CHAT, "/invocations"):
        refused = http.post(path, json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "generating")
        assert refused.headers["retry-after"] == "10"
    assert posted(http, "/phase/validate")["pow_status"]["state"] == "VALIDATING"
    status = http.get(f"{POW}/status").json()
    valid = dict(zip(status["valid_nonces"], status["valid_distances"], strict=True))
    assert valid == {n: of(node, n) for n in range(status["total_checked"]) if of(node, n) < 1.0}
    told = lambda: [nonce for _, _, body, *_ in receiver.posts for nonce in json.loads(body)["nonces"]]  # noqa: E731
    eventually(lambda: told() == status["valid_nonces"])

    nonces = [n for n in range(40) if of(node, n) < 1.0]
    honest = posted(http, "/validate", claim(nonces, [of(node, n) for n in nonces]))
    assert honest["distances"] == honest["computed_distances"] == [of(node, n) for n in nonces]
    assert (honest["fraud_detected"], honest["n_invalid"]) == (False, 0)
    forged = posted(http, "/validate", claim(list(range(40)), [0.5] * 40))
    assert forged["fraud_detected"]
    assert forged["valid"] == [of(node, n) < 1.0 for n in range(40)]
    assert posted(http, "/stop")["pow_status"]["state"] == "STOPPED"
    assert node.prover.forwards
    assert max(node.prover.forwards) <= 4


def test_users_are_served_while_proofs_are_validated(node: TinyNode, http: httpx2.Client) -> None:
    posted(http, "/init/validate", ROUND)
    job = http.post(f"{POW}/validate?wait=false", json=claim(list(range(20)), []))
    assert job.status_code == 202
    stream = http.post(CHAT, json={})
    assert stream.text.endswith("data: [DONE]\n\n")
    assert stream.text.count("[DONE]") == 1
    assert http.post("/invocations").json() == "computed"
    eventually(lambda: http.get(job.headers["location"]).status_code == 200)


def test_what_the_prover_refuses(http: httpx2.Client) -> None:
    answer = http.post(f"{POW}/init", json={**ROUND, "seq_len": 9})
    assert (answer.status_code, answer.json()) == (400, {"detail": "seq_len must be at most 8, got 9"})


def test_metrics_and_health(node: TinyNode, http: httpx2.Client) -> None:
    posted(http, "/init/validate", ROUND)
    posted(http, "/validate", claim([1, 2, 3], []))
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert samples["poc_nonces_checked_total", "validate"] == 3
    assert samples["poc_state", "VALIDATING"] == 1
    assert samples["poc_distance_count",] == 3
    assert http.get("/health").json() == {"status": "ok", "state": "VALIDATING", "reasons": []}
    node.service.begin_shutdown()
    assert http.get("/health").json()["reasons"] == ["the server is shutting down"]
    assert http.post(f"{POW}/init", json=ROUND).status_code == 503


def test_a_watch_of_the_app_s_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles = ["it hangs"]
    with tiny_node() as node:
        service = round_service.RoundService(
            node.prover, node.service._device, node.service.settings, [lambda: troubles[0]]
        )
        assert service.troubles() == ["it hangs", "the proof thread is not running"]


# ---- nothing long on the event loop ----


@pytest.fixture
def loop_thread(node: TinyNode, http: httpx2.Client) -> int:
    """The thread of the server's event loop."""
    seen: list[int] = []

    async def look() -> None:
        seen.append(threading.get_ident())

    node.api.get("/loop")(look)
    assert http.get("/loop").status_code == 200
    return seen[0]


@pytest.mark.parametrize("wait", ["true", "false"])
def test_proofs_are_checked_and_answered_in_threads(
    node: TinyNode, http: httpx2.Client, loop_thread: int, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    threads: dict[str, int] = {}

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            threads[name] = threading.get_ident()
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(routes, "_parse", noted("parse", routes._parse))
    monkeypatch.setattr(wire.ProofBody, "proof", noted("proof", wire.ProofBody.proof))
    monkeypatch.setattr(wire.ValidateAnswer, "model_dump_json", noted("answer", wire.ValidateAnswer.model_dump_json))
    posted(http, "/init/validate", ROUND)
    answer = http.post(f"{POW}/validate?wait={wait}", json=claim([1, 2], []))
    if wait == "false":
        eventually(lambda: http.get(answer.headers["location"]).status_code == 200)
    assert set(threads) == {"parse", "proof", "answer"}
    assert loop_thread not in threads.values()


def test_the_status_is_written_in_a_thread(
    node: TinyNode, http: httpx2.Client, loop_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    render = routes.JSONResponse.render

    def noted(self: Any, content: Any) -> bytes:
        threads.append(threading.get_ident())
        return render(self, content)

    monkeypatch.setattr(routes.JSONResponse, "render", noted)
    posted(http, "/init/validate", ROUND)
    http.get(f"{POW}/status")
    posted(http, "/stop")
    assert len(threads) == 3
    assert loop_thread not in threads


def test_a_large_proof_is_looked_at_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value by value only where one is wrong."""
    from poc_kernels.protocol import checks
    from poc_kernels.protocol.distances import proofs

    looked: list[str] = []
    monkeypatch.setattr(checks, "check_int", lambda name, *_: looked.append(name))
    monkeypatch.setattr(proofs, "check_float", lambda name, *_: looked.append(name))
    ProofBatch("key", "block", 7, list(range(1000)), [1.0] * 1000)
    assert looked == []
    ProofBatch("key", "block", 7, [2, True], [1.0, 1])
    assert looked == ["nonces", "nonces", "dist", "dist"]


def test_metrics_copy_no_list(node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    posted(http, "/init/validate", ROUND)
    monkeypatch.setattr(node.service.manager, "status", None)
    current = node.service.manager._round
    assert current is not None
    current.valid_nonces = current.valid_outcomes = None  # type: ignore[assignment]
    assert http.get("/metrics").status_code == 200


# ---- without an engine ----


def test_the_service_imports_no_engine(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.append({str(Path(__file__).parents[1] / "support")!r})
sys.modules["transformers"] = None  # to import it fails
from tiny_service import tiny_node
from poc_kernels.protocol import PoCState
with tiny_node() as node:
    node.service.begin({ROUND!r}, PoCState.VALIDATING)
assert not [name for name in sys.modules if name.startswith(("poc_kernels.engines", "poc_kernels.node"))]
print("done")
"""
    assert run_python(code, tmp_path) == "done"


def test_rounds_that_nobody_can_generate_are_refused(node: TinyNode) -> None:
    values = {**ROUND, "node_id": -1, "node_count": -1}
    with pytest.raises(ValueError, match="node_id and node_count must be set"):
        node.service.begin(values, PoCState.GENERATING)
