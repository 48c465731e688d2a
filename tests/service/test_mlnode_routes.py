"""The routes of an MLNode in front of this engine, as the chain's node calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from current_wire import INIT, MLNODE, PARAMS, POW, artifacts, asked, claims
from tiny_service import ArtifactProver, TinyNode, tiny_node
from web import CHAT, client, eventually, serving

OF_THE_CHAIN: dict[str, Any] = {
    "block_hash": "B10C",
    "block_height": 7,
    "public_key": "02a1b2c3",
    "node_id": 1,
    "node_count": 2,
    "params": {"model": "tiny", "seq_len": 16},
}
"""All that the chain's node sends to /init/generate, except for the url."""
TOKEN = "secret"


@pytest.fixture(scope="module")
def node() -> Iterator[TinyNode]:
    with tiny_node(ArtifactProver(), shutdown_seconds=1.0, max_queued_nonces=100, models=("tiny",)) as node:
        yield node


@pytest.fixture
def port(server: httpx2.Client) -> int:
    assert server.base_url.port is not None
    return server.base_url.port


def ok(answer: httpx2.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_round_and_its_validation(http: httpx2.Client, port: int) -> None:
    receiver = Receiver()
    url = f"{receiver.url}/v2/poc-batches/tiny"
    assert ok(http.get(f"{MLNODE}/status"))["status"] == "IDLE"
    # As Go's client sends it: JSON that does not say so.
    begun = ok(http.post(f"{MLNODE}/init/generate", content=json.dumps({**OF_THE_CHAIN, "url": url})))
    started = {"status": "OK", "backends": 1, "n_groups": 1, "results": [{"port": port, "status": "OK"}]}
    assert begun == {**started, "errors": None}
    receiver.wait(1)
    assert receiver.posts[0][0] == "/v2/poc-batches/tiny/generated"
    told = receiver.contents()[0]["artifacts"][:20]
    assert told == artifacts([1 + 2 * index for index in range(len(told))])
    status = ok(http.get(f"{MLNODE}/status"))
    assert (status["status"], status["backends"][0]["port"]) == ("GENERATING", port)
    assert status["backends"][0]["config"]["public_key"] == OF_THE_CHAIN["public_key"]
    stopped = {"status": "OK", "results": [{"port": port, "status": "stopped"}], "errors": None}
    assert ok(http.post(f"{MLNODE}/stop", json={})) == stopped
    assert ok(http.get(f"{MLNODE}/status"))["backends"][0]["status"] == "IDLE"

    stat_test = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}
    nonces = [each["nonce"] for each in told]
    body = {**OF_THE_CHAIN, "nonces": nonces, "url": url, "stat_test": stat_test}
    queued = ok(http.post(f"{MLNODE}/generate", json={**body, "validation": {"artifacts": told}}))
    assert queued["request_id"].startswith(f"{port}:")
    receiver.wait(len(receiver.posts) + 1)
    eventually(lambda: receiver.contents("/v2/poc-batches/tiny/validated"))
    (validated,) = receiver.contents("/v2/poc-batches/tiny/validated")
    assert (validated["public_key"], validated["n_total"]) == (OF_THE_CHAIN["public_key"], len(nonces))
    assert not validated["fraud_detected"]
    result = ok(http.get(f"{MLNODE}/generate/{queued['request_id']}"))
    assert (result["status"], result["request_id"], result["n_mismatch"]) == ("completed", queued["request_id"], 0)
    assert validated["request_id"] == queued["request_id"].partition(":")[2]
    receiver.stop()


def test_groups_are_an_mlnode_s_to_give(http: httpx2.Client) -> None:
    ok(http.post(f"{MLNODE}/init/generate", json={**INIT, "group_id": 3, "n_groups": 4}))
    config = ok(http.get(f"{POW}/status"))["config"]
    assert (config["group_id"], config["n_groups"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "status", "detail"),
    [
        ({}, 409, "Already generating"),
        ({"batch_size": -1}, 400, "batch_size must be in [1, 4096], got -1"),
        ({"params": {**PARAMS, "model": "other"}}, 409, None),
    ],
)
def test_a_round_that_the_engine_refuses(
    http: httpx2.Client, port: int, changes: dict[str, Any], status: int, detail: str | None
) -> None:
    ok(http.post(f"{MLNODE}/init/generate", json=INIT))
    engine = http.post(f"{POW}/init/generate", json={**INIT, **changes})
    refused = http.post(f"{MLNODE}/init/generate", json={**INIT, **changes})
    assert (engine.status_code, refused.status_code) == (status, 502)
    assert detail is None or engine.json()["detail"] == detail
    (error,) = refused.json()["detail"]["errors"]
    assert (error["port"], json.loads(error["error"])) == (port, engine.json())
    assert http.post(f"{MLNODE}/init/generate", json={**INIT, "params": {}}).status_code == 422


def test_a_request_that_the_engine_refuses(http: httpx2.Client) -> None:
    for body in (asked(list(range(101))), asked([1], validation=claims([2])), asked([1], params={"model": "other"})):
        engine, refused = (http.post(f"{prefix}/generate", json=body) for prefix in (POW, MLNODE))
        assert refused.status_code == engine.status_code >= 400
        assert json.loads(refused.json()["detail"]) == engine.json()
        assert refused.headers.get("retry-after") == engine.headers.get("retry-after")


def test_ids_have_the_port_before_them(http: httpx2.Client, port: int) -> None:
    answer = ok(http.post(f"{MLNODE}/generate", json=asked([1])))
    assert answer["artifacts"] == artifacts([1])
    assert ":" not in answer["request_id"], "only of those that are asked for later"
    for request_id, status, detail in (
        ("no-colon", 400, "Invalid request_id format (expected port:uuid)"),
        ("p:1", 400, "Invalid port in request_id"),
        (f"{port}:no-such", 404, "Request not found"),
        (f"{port + 1}:{answer['request_id']}", 404, "Request not found"),
    ):
        refused = http.get(f"{MLNODE}/generate/{request_id}")
        assert (refused.status_code, refused.json()["detail"]) == (status, detail)


def test_rounds_of_the_older_wire(http: httpx2.Client) -> None:
    """States that a round of today never has are MIXED; one that was stopped is IDLE."""
    older = {**{name: INIT[name] for name in ("block_hash", "block_height", "public_key")}, "r_target": 1.0}
    ok(http.post(f"{POW}/init/validate", json={**older, "seq_len": 8}))
    assert ok(http.get(f"{MLNODE}/status"))["status"] == "MIXED"
    ok(http.post(f"{MLNODE}/stop"))
    assert ok(http.get(f"{POW}/status"))["state"] == "STOPPED"
    assert ok(http.get(f"{MLNODE}/status"))["status"] == "IDLE"


def test_versions(http: httpx2.Client) -> None:
    assert ok(http.get(f"{MLNODE}/versions")) == ok(http.get(f"{POW}/versions"))


def test_the_token_guards_these_routes_and_users_are_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    routes = [("POST", "init/generate"), ("POST", "generate"), ("GET", "generate/1:2"), ("GET", "status")]
    routes += [("POST", "stop"), ("GET", "versions")]
    with tiny_node(ArtifactProver(), token=TOKEN) as node, serving(node.app) as url, client(url) as http:
        for prefix in (POW, MLNODE):
            for method, path in routes:
                assert http.request(method, f"{prefix}/{path}").status_code == 401
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        ok(http.post(f"{MLNODE}/init/generate", json=INIT))
        assert http.post(CHAT, json={}).status_code == 503
        assert ok(http.get(f"{MLNODE}/status"))["status"] == "GENERATING"
        large = asked(list(range(64)), validation=claims(list(range(64))))
        assert ok(http.post(f"{MLNODE}/generate", json=large))["n_mismatch"] == 0
        node.service.begin_shutdown()
        assert ok(http.get(f"{MLNODE}/status")) == {"status": "NO_BACKENDS", "backends": []}
        assert ok(http.post(f"{MLNODE}/stop")) == {"status": "OK", "message": "No backends to stop"}
        assert http.post(f"{MLNODE}/init/generate", json=INIT).status_code == 503
        assert http.post(f"{MLNODE}/generate", json=asked([1])).status_code == 503
