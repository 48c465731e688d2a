"""What a node tells: callbacks, metrics, health, and the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from nodes import (
    POW,
    ROUND,
    Alone,
    begin,
    claim,
    posted,
    running,
    status,
)
from web import TIMEOUT, chat, error_of, eventually, text_of

from poc_kernels.node.node import Node
from poc_kernels.protocol import ProofBatch

pytest_plugins = ["round_fixtures"]


def test_metrics_tell_how_users_are_served(metrics: Any) -> None:
    assert (metrics("poc_inference_restarts"), metrics("poc_inference_batched")) == (0, 1)


def test_health_is_progress(
    http: httpx2.Client, node: Node, alone: Alone, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no memory left")

    failures = metrics("poc_batch_failures_total")
    begin(http)
    assert http.get("/health").json() == {"status": "ok", "state": "GENERATING", "reasons": []}
    with monkeypatch.context() as patch:
        patch.setattr(node.engine, "forward", fail)
        eventually(lambda: http.get("/health").status_code == 503)
        health = http.get("/health").json()
        assert (health["status"], health["reasons"]) == (
            "unhealthy",
            ["proof batches fail: RuntimeError"],
        )
        answer = http.post(f"{POW}/validate", json=claim([1]))
        assert answer.status_code == 503
        assert "no memory left" not in answer.text
        assert int(answer.headers["retry-after"]) > 0
    assert metrics("poc_batch_failures_total") >= failures + 2
    eventually(lambda: http.get("/health").status_code == 200)
    posted(http, "/stop")
    done = status(http)
    nonces = list(range(done["total_checked"]))
    assert done["valid_nonces"] == [  # the failed batch was tried again
        nonce for nonce, distance in zip(nonces, alone.distances(nonces), strict=True) if distance < ROUND["r_target"]
    ]
    assert text_of(http.post("/v1/chat/completions", json=chat(max_tokens=2)))


def test_a_failed_validation_does_not_stay_in_the_health(
    http: httpx2.Client, node: Node, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http, "validate")
    calls = iter([RuntimeError("once")])
    forward = node.engine.forward

    def fail_once(*arguments: Any) -> torch.Tensor:
        for error in calls:
            raise error
        return forward(*arguments)

    monkeypatch.setattr(node.engine, "forward", fail_once)
    answer = http.post(f"{POW}/validate", json=claim([1]))
    assert (answer.status_code, answer.json()["detail"]) == (503, "the batch could not be computed: RuntimeError")
    eventually(lambda: http.get("/health").status_code == 200)  # though nothing came since
    assert posted(http, "/validate", claim([1]))["distances"] == alone.distances([1])


def test_a_dead_proof_thread_is_seen(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model_dir) as (node, http):
        begin(http, "validate")
        node.service.worker.close(TIMEOUT)
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["the proof thread is not running"])
        for path in ("/init", "/init/generate", "/init/validate", "/phase/generate"):
            assert http.post(POW + path, json=ROUND).status_code == 503
        assert http.post(f"{POW}/validate", json=claim([1])).status_code == 409
        with pytest.raises(RuntimeError):
            node.service.enqueue(ProofBatch("k", ROUND["block_hash"], ROUND["block_height"], [1], []), "this process")


def test_nothing_begins_while_the_node_shuts_down(model_dir: Path) -> None:
    with running(model_dir) as (node, http):
        begin(http)
        node.begin_shutdown()
        assert status(http)["state"] == "STOPPED"
        for path in ("/init", "/init/generate", "/init/validate"):
            assert http.post(POW + path, json=ROUND).status_code == 503
        assert http.get("/health").status_code == 503
        answer = http.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "1"
