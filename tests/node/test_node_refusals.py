"""Bodies, tokens, paths and methods that a node refuses."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nodes import (
    JSON,
    MAX_BODY,
    MAX_POW_BODY,
    POW,
    ROUND,
    begin,
    claim,
    posted,
    running,
)
from web import TIMEOUT, error_of

from poc_kernels.node.node import Node

pytest_plugins = ["node_fixtures"]


@pytest.mark.parametrize(
    "changes",
    [
        {"block_hash": 5},
        {"block_hash": None},
        {"block_height": "7"},
        {"block_height": 7.5},
        {"block_height": True},
        {"r_target": "1.4"},
        {"r_target": float("nan")},
        {"r_target": float("inf")},
        {"r_target": 10**400},
        {"fraud_threshold": float("-inf")},
        {"batch_size": [4]},
        {"callback_url": 5},
        {"use_random_projection": 1},
        {"public_key": ["\ud800"]},
    ],
    ids=str,
)
def test_wrong_types_in_a_round(http: httpx2.Client, changes: dict[str, Any]) -> None:
    answer = http.post(f"{POW}/init", content=json.dumps({**ROUND, **changes}), headers=JSON)
    assert answer.status_code == 422
    assert [entry["loc"] for entry in answer.json()["detail"]] == [["body", *changes]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_hash": ""}, "block_hash must have 1 to 1024 characters"),
        ({"block_hash": "\ud800"}, "block_hash must be text that UTF-8 can encode"),
        ({"public_key": "k" * 1025}, "public_key must have 1 to 1024 characters"),
        ({"block_height": -1}, "block_height must be in"),
        ({"block_height": 10**40}, "block_height must be in"),
        ({"r_target": 0}, "r_target must be positive"),
        ({"r_target": -2.5}, "r_target must be positive"),
        ({"fraud_threshold": 1.5}, "fraud_threshold must be"),
        ({"node_id": 2**63}, "node_id must be in"),
        ({"node_count": 0}, "node_count must be positive"),
        ({"node_count": -1}, "Node ID and node count must be set together"),
        ({"node_count": 2**31, "n_groups": 2}, "node_count \\* n_groups must be at most"),
        ({"batch_size": 0}, "batch_size must be in"),
        ({"batch_size": 2**70}, "batch_size must be in"),
        ({"seq_len": 2049}, "batch_size \\* seq_len must be at most 8192"),
        ({"batch_size": 1, "seq_len": 4097}, "seq_len must be at most the 4096 positions"),
        ({"callback_url": "ftp://a"}, "callback_url must be"),
        ({"callback_url": "http://\ud800/"}, "callback_url must be"),
        ({"callback_url": "http://host/callbacks#part"}, "callback_url must be .* got one with a fragment"),
        ({"callback_url": "http://☃.com"}, "callback_url must have a host that can be connected to"),
        ({"callback_url": "http://1.2.3.999"}, "callback_url must have a host that can be connected to"),
        ({"callback_url": "http://169.254.169.254/"}, "callback_url must have a host that this node may send"),
    ],
    ids=str,
)
def test_values_that_no_round_takes(http: httpx2.Client, changes: dict[str, Any], message: str) -> None:
    answer = http.post(f"{POW}/init", content=json.dumps({**ROUND, **changes}), headers=JSON)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["detail"])


@pytest.mark.parametrize(("host", "code"), [("0.0.0.0", 400), ("::1", 200), ("localhost", 200)])
def test_callbacks_to_loopback_are_taken_by_a_node_that_listens_there(model_dir: Path, host: str, code: int) -> None:
    with running(model_dir, host=host) as (_, http):
        answer = http.post(f"{POW}/init", json={**ROUND, "callback_url": "http://127.0.0.1:9/cb"})
        assert answer.status_code == code, answer.text


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"nonces": "12"}, 422),
        ({"nonces": [1.5]}, 422),
        ({"nonces": [True]}, 422),
        ({"nonces": None}, 422),
        ({"dist": [float("nan")]}, 422),
        ({"dist": ["1"]}, 422),
        ({"public_key": None}, 422),
        ({"nonces": [-1]}, 400),
        ({"nonces": [2**63]}, 400),
        ({"nonces": [10**300]}, 400),
        ({"nonces": [1, 1]}, 400),
        ({"dist": [1.0, 1.0]}, 400),
        ({"dist": [-1.0]}, 400),
        ({"public_key": "\udfff"}, 400),
        ({"block_hash": "\udfff"}, 400),
        ({"node_id": -2}, 400),
    ],
    ids=str,
)
def test_wrong_proof_batches(http: httpx2.Client, changes: dict[str, Any], code: int) -> None:
    begin(http, "validate")
    answer = http.post(f"{POW}/validate", content=json.dumps({**claim([3]), **changes}), headers=JSON)
    assert (answer.status_code, answer.json().keys()) == (code, {"detail"})


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b'"x"', 422),
        (b"{}", 422),
        (b"\xff\xfe", 422),
        (b"[" * 8000, 400),
        (b'{"block_height": ' + b"9" * 5000 + b"}", 400),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("path", ["/init", "/validate"])
def test_bodies_that_are_no_object(http: httpx2.Client, path: str, content: bytes, code: int) -> None:
    answer = http.post(POW + path, content=content, headers=JSON)
    assert answer.status_code == code, answer.text
    assert answer.json().keys() == {"detail"}


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


def test_other_paths_and_methods(http: httpx2.Client) -> None:
    assert http.get(f"{POW}/nothing").status_code == 404
    assert http.get(f"{POW}/init").status_code == 405
    assert http.post(f"{POW}/status").status_code == 405
    paths = http.get("/openapi.json").json()["paths"]
    mine = {path.removeprefix(POW) for path in paths if path.startswith(POW)}
    phases = {"/init", "/init/generate", "/init/validate", "/phase/generate", "/phase/validate"}
    assert mine == {*phases, "/validate", "/validate/{job_id}", "/status", "/stop"}
