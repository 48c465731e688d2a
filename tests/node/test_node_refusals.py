"""Bodies, tokens, paths and methods that a node refuses."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nodes import (
    JSON,
    MAX_BODY,
    MAX_POW_BODY,
    NAME,
    POW,
    ROUND,
    begin,
    claim,
    posted,
    running,
)
from web import TIMEOUT, error_of

from poc_kernels.node.node import Node
from poc_kernels.protocol.limits import SERVER_BOUNDS, Bounds

pytest_plugins = ["round_fixtures"]


@pytest.mark.parametrize(("host", "code"), [("0.0.0.0", 400), ("::1", 200), ("localhost", 200)])
def test_callbacks_to_loopback_are_taken_by_a_node_that_listens_there(model_dir: Path, host: str, code: int) -> None:
    with running(model_dir, host=host) as (_, http):
        answer = http.post(f"{POW}/init", json={**ROUND, "callback_url": "http://127.0.0.1:9/cb"})
        assert answer.status_code == code, answer.text


def test_batches_that_would_take_too_much_memory(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = node.service.manager.prover.work  # type: ignore[attr-defined]
    assert work.bounds == SERVER_BOUNDS
    monkeypatch.setattr(work, "bounds", Bounds(logits=3 * 512, signs=3 * 2 * 64))
    of_artifacts = {name: ROUND[name] for name in ("block_hash", "block_height", "public_key", "node_id", "node_count")}
    params = {"model": NAME, "seq_len": 16, "proof": "fingerprint"}
    body = {**of_artifacts, "batch_size": 4, "params": params, "nonces": [1], "wait": True}
    for path, sent, what in (
        ("/init", ROUND, "with this vocabulary"),
        ("/init/generate", body, "in a round of fingerprints with 2 x 64 signs per row"),
        ("/generate", body, "in a round of fingerprints with 2 x 64 signs per row"),
    ):
        answer = http.post(POW + path, json=sent)
        expected = (400, {"detail": f"batch_size must be at most 3 {what}, got 4"})
        assert (answer.status_code, answer.json()) == expected
    assert http.post(f"{POW}/generate", json={**body, "batch_size": 3}).status_code == 200


def test_bodies_that_are_too_large(http: httpx2.Client, metrics: Any) -> None:
    before = metrics("poc_gate_refusals_total")
    large = b" " * (MAX_POW_BODY + 1)
    for content in (large, iter([large[:100], large])):  # with a declared length, and in chunks
        answer = http.post(f"{POW}/validate", content=content)
        assert (answer.status_code, str(MAX_POW_BODY) in answer.json()["detail"]) == (413, True)
    for content in (large[: MAX_BODY + 1], iter([large[:MAX_BODY], b" "])):
        answer = http.post("/v1/chat/completions", content=content)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert metrics("poc_gate_refusals_total") == before + 4
    exact = json.dumps(claim([1])).encode()
    begin(http, "validate")
    answer = http.post(f"{POW}/validate", content=exact + b" " * (MAX_POW_BODY - len(exact)), headers=JSON)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", [f"{POW}/init", "/v1/chat/completions"])
def test_bodies_that_do_not_come(http: httpx2.Client, node: Node, path: str) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), TIMEOUT) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read()  # to its end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body must come within 1 s" in answer
    assert node.app.in_flight == 0


def test_the_token(model_dir: Path) -> None:
    with running(model_dir, token="s3cret") as (_, http):
        for given in ({}, {"authorization": "s3cret"}, {"authorization": "Bearer s3cre"}, {"authorization": b"\xff"}):
            for method, path in (("GET", "/status"), ("POST", "/init"), ("POST", "/stop"), ("GET", "/nothing")):
                answer = http.request(method, POW + path, headers=given)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        http.headers["authorization"] = "Bearer s3cret"
        assert begin(http)["state"] == "GENERATING"
        posted(http, "/stop")
        del http.headers["authorization"]
        for path in ("/health", "/metrics", "/v1/models"):
            assert http.get(path).status_code == 200
        assert 'reason="token"' in http.get("/metrics").text
