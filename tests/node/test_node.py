"""Rounds over HTTP, on a real server with a real, tiny model."""

from __future__ import annotations

import contextlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from architectures import tiny
from nodes import (
    MAX_QUEUED,
    POW,
    ROUND,
    STATUS_KEYS,
    VALIDATE_KEYS,
    Alone,
    Blocked,
    begin,
    checked,
    claim,
    posted,
    running,
    settings,
    status,
)
from poc2_oracle import distance as oracle_distance
from served import load
from web import TIMEOUT, eventually

from poc_kernels.node.node import Node
from poc_kernels.protocol import nonce_inputs

pytest_plugins = ["node_fixtures"]


def test_before_any_round(model_dir: Path) -> None:
    with running(model_dir) as (_, http):
        assert status(http) == {
            **dict.fromkeys(STATUS_KEYS, 0),
            "state": "IDLE",
            "status": "IDLE",
            "is_model_initialized": True,
            "ignored": [],
            "valid_nonces": [],
            "valid_distances": [],
            "r_target": None,
            "config": None,
            "validation": {
                **dict.fromkeys(("queued_batches", "queued_nonces", "submitters", "nonces_per_second"), 0),
                "running": None,
                "share": 0.1,
                "pacing": "free" if sys.platform == "linux" else "paced",
                "slices": None,
            },
            "callbacks": {
                **dict.fromkeys(("pending_batches", "pending_nonces", "delivered_batches", "failed_attempts"), 0),
                **dict.fromkeys(("dropped_batches", "dropped_nonces"), 0),
                "last_error": None,
            },
        }
        for path, body in (("/phase/generate", None), ("/phase/validate", None), ("/validate", claim([1]))):
            answer = http.post(POW + path, json=body)
            assert (answer.status_code, "needs a round, none was begun" in answer.text) == (400, True), path
        assert posted(http, "/stop")["pow_status"]["state"] == "STOPPED"
        assert http.post(f"{POW}/phase/validate").status_code == 400
        assert http.post(f"{POW}/validate", json=claim([1])).status_code == 400
        assert begin(http, "init")["state"] == "IDLE"


def test_states_and_conflicts(http: httpx2.Client, alone: Alone) -> None:
    def refused(path: str, body: object = None) -> None:
        answer = http.post(POW + path, json=body)
        assert (answer.status_code, answer.json().keys()) == (409, {"detail"}), path

    assert begin(http, "init")["state"] == "IDLE"
    answer = posted(http, "/phase/validate")
    assert answer.keys() == {"status", "pow_status"}
    assert (answer["status"], answer["pow_status"]["state"]) == ("OK", "VALIDATING")
    assert answer["pow_status"].keys() == STATUS_KEYS
    assert answer["pow_status"]["r_target"] == ROUND["r_target"]
    for path in ("/phase/generate", "/phase/generate", "/phase/validate", "/phase/generate"):
        posted(http, path)
    assert status(http)["state"] == "GENERATING"
    for path, state in (("/init", "GENERATING"), ("/init/validate", "VALIDATING"), ("/init/generate", "GENERATING")):
        assert posted(http, path, ROUND)["pow_status"]["state"] == state
    for path, state in (("/init/validate", "VALIDATING"), ("/init", "IDLE"), ("/init/generate", "GENERATING")):
        another = {**ROUND, "r_target": ROUND["r_target"] + len(path) / 1000}
        answer = posted(http, path, another)["pow_status"]
        assert (answer["state"], answer["r_target"]) == (state, another["r_target"])
    assert [posted(http, "/stop")["pow_status"]["state"] for _ in range(2)] == ["STOPPED", "STOPPED"]
    for path in ("/phase/generate", "/phase/validate"):
        refused(path)
    assert posted(http, "/validate", claim([1]))["distances"] == alone.distances([1])
    assert status(http)["state"] == "STOPPED"
    assert begin(http, "validate")["state"] == "VALIDATING"


def test_a_node_without_a_place_validates_only(http: httpx2.Client, alone: Alone) -> None:
    body = {key: value for key, value in ROUND.items() if key not in ("node_id", "node_count")}
    posted(http, "/stop")
    answer = http.post(f"{POW}/init/generate", json=body)
    assert (answer.status_code, "Node ID and node count must be set" in answer.text) == (400, True)
    assert posted(http, "/init/validate", body)["pow_status"]["state"] == "VALIDATING"
    assert posted(http, "/validate", claim([5]))["distances"] == alone.distances([5])
    assert http.post(f"{POW}/phase/generate").status_code == 400
    assert status(http)["state"] == "VALIDATING"


@pytest.mark.parametrize("place", [(0, 1, 0, 1), (1, 3, 0, 1), (3, 3, 0, 1), (1, 2, 2, 3)])
def test_generating(http: httpx2.Client, alone: Alone, place: tuple[int, int, int, int]) -> None:
    node_id, node_count, group_id, n_groups = place
    begin(http, node_id=node_id, node_count=node_count, group_id=group_id, n_groups=n_groups)
    checked(http, 40)
    answer = posted(http, "/stop")["pow_status"]
    after = status(http)
    assert after == answer
    tried = [node_id + group_id * node_count + i * node_count * n_groups for i in range(after["total_checked"])]
    pairs = zip(tried, alone.distances(tried), strict=True)
    valid = {nonce: distance for nonce, distance in pairs if distance < ROUND["r_target"]}
    assert 0 < len(valid) < len(tried)
    assert dict(zip(after["valid_nonces"], after["valid_distances"], strict=True)) == valid
    assert after["total_checked"] % ROUND["batch_size"] == 0
    assert after["total_valid"] == len(after["valid_nonces"]) == len(valid)
    assert after["rate_per_second"] == pytest.approx(after["total_checked"] / after["elapsed_seconds"])


def test_a_new_round_counts_from_zero(http: httpx2.Client) -> None:
    begin(http)
    checked(http, 8)
    after = begin(http, "validate")
    assert (after["total_checked"], after["valid_nonces"], after["elapsed_seconds"]) == (0, [], 0)


# ---- validation ----


def test_an_honest_batch_and_its_forgeries(http: httpx2.Client, alone: Alone) -> None:
    begin(http)
    found = checked(http, 100)
    posted(http, "/phase/validate")
    nonces, dist = found["valid_nonces"], found["valid_distances"]
    verdict = posted(http, "/validate", claim(nonces, dist))
    assert verdict.keys() == VALIDATE_KEYS
    assert verdict["distances"] == verdict["computed_distances"] == dist
    assert verdict["valid"] == [True] * len(nonces)
    assert verdict["nonces"] == nonces
    assert (verdict["status"], verdict["fraud_detected"], verdict["n_invalid"]) == ("OK", False, 0)
    assert verdict["probability_honest"] == 1.0

    forged = posted(http, "/validate", claim(range(24), [1.2] * 24))
    truly = alone.distances(range(24))
    assert forged["distances"] == truly
    assert forged["n_invalid"] == sum(not distance < ROUND["r_target"] for distance in truly) > 0
    assert forged["fraud_detected"] is True
    assert forged["probability_honest"] < 0.01

    stolen = posted(http, "/validate", claim(nonces, dist, public_key="another-key"))
    assert stolen["fraud_detected"] is True
    assert stolen["distances"] == alone.distances(nonces, public_key="another-key")
    for field, value in (("block_hash", "0xother"), ("block_height", 8)):
        answer = http.post(f"{POW}/validate", json=claim(nonces, dist, **{field: value}))
        assert (answer.status_code, field in answer.json()["detail"]) == (400, True)


def test_batches_without_a_verdict(http: httpx2.Client, alone: Alone) -> None:
    begin(http, "validate")
    computed = posted(http, "/validate", claim(range(10)))
    expected = alone.distances(range(10))
    assert computed["distances"] == expected
    assert computed["valid"] == [distance < ROUND["r_target"] for distance in expected]
    empty = posted(http, "/validate", claim([]))
    assert (empty["nonces"], empty["distances"], empty["valid"]) == ([], [], [])
    for verdict in (computed, empty):
        assert (verdict["fraud_detected"], verdict["n_invalid"], verdict["probability_honest"]) == (False, 0, 1.0)


@pytest.mark.parametrize("state", ["init", "generate", "validate"])
def test_validation_in_every_running_state(http: httpx2.Client, alone: Alone, state: str) -> None:
    begin(http, state)
    assert posted(http, "/validate", claim(range(9)))["distances"] == alone.distances(range(9))


def test_any_order_split_and_position_give_the_same_distances(http: httpx2.Client, alone: Alone) -> None:
    nonces = [*range(20), 2**31, 2**32 + 1, 2**63 - 1]
    expected = dict(zip(nonces, alone.distances(nonces), strict=True))
    begin(http, "validate")
    draw = random.Random(0)
    for _ in range(6):
        draw.shuffle(nonces)
        cut = draw.randrange(1, len(nonces))
        for part in (nonces[:cut], nonces[cut:]):
            assert posted(http, "/validate", claim(part))["distances"] == [expected[nonce] for nonce in part]


def test_the_projection_is_a_flag(http: httpx2.Client, alone: Alone) -> None:
    computed = {}
    for changes in ({}, {"use_random_projection": True}, {"use_random_projection": False}):
        begin(http, "validate", **changes)
        computed[str(changes)] = posted(http, "/validate", claim(range(6)))["distances"]
        assert computed[str(changes)] == alone.distances(range(6), **changes)
    default, on, off = computed.values()
    assert default == off
    assert not set(on) & set(off)


def test_without_projection_a_round_is_that_of_phases_1_to_5(http: httpx2.Client, alone: Alone) -> None:
    nonces, (block_hash, key) = [0, 1, 7, 2**40], (ROUND["block_hash"], ROUND["public_key"])
    x = nonce_inputs(block_hash, key, nonces, ROUND["seq_len"], 64, "cpu", torch.float32)
    with torch.inference_mode():
        logits = alone.model(inputs_embeds=x).logits[:, -1]
    begin(http, "validate")
    computed = posted(http, "/validate", claim(nonces))["distances"]
    expected = [oracle_distance(row, block_hash, key, nonce) for row, nonce in zip(logits, nonces, strict=True)]
    assert computed == pytest.approx(expected, abs=1e-5)


def test_a_restarted_node_gives_the_same_distances(http: httpx2.Client, model_dir: Path) -> None:
    begin(http, use_random_projection=True)
    found = checked(http, 40)
    posted(http, "/stop")
    with running(model_dir, random_projection=True) as (_, again):
        begin(again, "validate", batch_size=ROUND["batch_size"])
        verdict = posted(again, "/validate", claim(found["valid_nonces"], found["valid_distances"]))
    assert verdict["distances"] == found["valid_distances"]
    assert verdict["fraud_detected"] is False


def test_the_queue_is_bounded_to_the_nonce(
    http: httpx2.Client, node: Node, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http, "validate")
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(posted, http, "/validate", claim(range(MAX_QUEUED - 4)))
            eventually(lambda: status(http)["queued_nonces"] == MAX_QUEUED - 4)
            full = http.post(f"{POW}/validate", json=claim(range(5)))
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) > 0
            hopeless = http.post(f"{POW}/validate", json=claim(range(MAX_QUEUED + 1)))
            assert (hopeless.status_code, f"at most {MAX_QUEUED} nonces" in hopeless.text) == (400, True)
            last = pool.submit(posted, http, "/validate", claim(range(100, 104)), "192.0.2.1")
            eventually(lambda: status(http)["queued_nonces"] == MAX_QUEUED)
        finally:
            blocked.release()
        assert first.result(TIMEOUT)["distances"] == alone.distances(range(MAX_QUEUED - 4))
        assert last.result(TIMEOUT)["distances"] == alone.distances(range(100, 104))


@pytest.mark.parametrize("path", ["/stop", "/stop and begin again"])
def test_validations_end_with_their_round(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    begin(http, "validate")
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    with ThreadPoolExecutor(2) as pool:
        try:
            waiting = [pool.submit(http.post, f"{POW}/validate", json=claim(range(12))) for _ in range(2)]
            eventually(lambda: status(http)["queued_nonces"] == 24)
            posted(http, "/stop")
            if path != "/stop":
                begin(http, "validate", r_target=1.9)
        finally:
            blocked.release()
        assert [answer.result(TIMEOUT).status_code for answer in waiting] == [409, 409]


def test_a_directory_is_served_by_its_last_part(model_dir: Path) -> None:
    with contextlib.closing(Node(settings(model_dir, served_name=None))) as node:
        assert node.inference.name == model_dir.name


def test_a_model_that_cannot_be_served_rightly_does_not_start(model_dir: Path) -> None:
    model = tiny("xlnet")
    with (
        contextlib.closing(Node(settings(model_dir), model, load(model_dir)[1])) as node,
        pytest.raises(ValueError, match="serve with its own text, XLNetLMHeadModel is not"),
    ):
        node.start()
