"""What a node tells: callbacks, metrics, health, and the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from callback_receivers import Receiver
from nodes import (
    CALLBACK_KEY,
    POW,
    ROUND,
    Alone,
    begin,
    checked,
    claim,
    posted,
    running,
    status,
)
from web import TIMEOUT, chat, error_of, eventually, text_of

from poc_kernels.node.node import Node
from poc_kernels.protocol import ProofBatch
from poc_kernels.service.callbacks import verify

pytest_plugins = ["node_fixtures"]


def test_every_valid_nonce_is_posted_once_and_signed(http: httpx2.Client, receiver: Receiver) -> None:
    begin(http, callback_url=receiver.url, node_id=1, node_count=2)
    checked(http, 40)
    found = posted(http, "/stop")["pow_status"]
    eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
    batches = receiver.contents(path="/generated")
    pairs = [pair for batch in batches for pair in zip(batch["nonces"], batch["dist"], strict=True)]
    assert pairs == list(zip(found["valid_nonces"], found["valid_distances"], strict=True))
    common = {key: ROUND[key] for key in ("public_key", "block_hash", "block_height")}
    for batch in batches:
        told = {"node_id": 1, "r_target": ROUND["r_target"]}
        assert {**batch, "nonces": [], "dist": []} == {**common, **told, "nonces": [], "dist": []}
    assert all(verify(body, headers["X-Signature"], CALLBACK_KEY.encode()) for _, headers, body, _, _ in receiver.posts)


def test_verdicts_are_posted(http: httpx2.Client, receiver: Receiver) -> None:
    begin(http, "validate", callback_url=receiver.url)
    verdict = posted(http, "/validate", claim(range(24), [1.2] * 24))
    posted(http, "/validate", claim([1]))  # no verdict, no callback
    receiver.wait(1)
    eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
    (path, headers, body, _, _), *others = receiver.posts
    assert (path, others) == ("/validated", [])
    assert verify(body, headers["X-Signature"], CALLBACK_KEY.encode())
    result = json.loads(body)
    assert result.keys() == {*claim([]), "received_dist", "r_target", "fraud_threshold"} | {
        "n_invalid",
        "probability_honest",
        "fraud_detected",
    }
    assert result["dist"] == verdict["distances"]
    assert result["received_dist"] == [1.2] * 24
    assert result["fraud_detected"] is True


def test_metrics_count_what_happens(http: httpx2.Client, metrics: Any) -> None:
    names = ("poc_nonces_checked_total", "poc_nonces_valid_total", "poc_batch_seconds_count")
    before = {(name, phase): metrics(name, phase=phase) for name in names for phase in ("generate", "validate")}
    frauds, distances = metrics("poc_frauds_total"), metrics("poc_distance_count")
    begin(http, use_random_projection=True)
    checked(http, 12)
    assert metrics("poc_state", poc_state="GENERATING") == 1
    assert metrics("poc_nonces_per_second") > 0
    posted(http, "/phase/validate")
    done = status(http)
    verdict = posted(http, "/validate", claim(range(10), [1.0] * 10))
    assert metrics("poc_state", poc_state="VALIDATING") == 1
    moved = {key: metrics(key[0], phase=key[1]) - value for key, value in before.items()}
    # What was being computed when the phase ended is counted here, and thrown away by the round.
    thrown_away = moved["poc_nonces_checked_total", "generate"] - done["total_checked"]
    assert thrown_away in (0, ROUND["batch_size"])
    assert thrown_away or moved["poc_nonces_valid_total", "generate"] == done["total_valid"]
    assert moved["poc_nonces_checked_total", "validate"] == 10
    assert moved["poc_nonces_valid_total", "validate"] == sum(verdict["valid"])
    assert moved["poc_batch_seconds_count", "validate"] == 3
    assert metrics("poc_frauds_total") == frauds + verdict["fraud_detected"] == frauds + 1
    assert metrics("poc_distance_count") - distances == moved["poc_nonces_checked_total", "generate"] + 10
    assert all(metrics("poc_part_seconds_total", part=part) > 0 for part in ("inputs", "projection", "forward"))
    callbacks = ("poc_callback_queue_batches", "poc_callback_queue_nonces")
    for name in ("poc_inference_in_flight", "poc_validation_queue_nonces", *callbacks):
        assert metrics(name) == 0
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
        node.service.worker.close(TIMEOUT)
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["the proof thread is not running"])
        begin(http, "validate")
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
