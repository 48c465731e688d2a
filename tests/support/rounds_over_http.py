"""Tests of rounds over HTTP, for any server that takes them: each room has a module that imports them.

They take the fixtures `http`, `alone`, `metrics` and `receiver`: a server of the small model, with `SETTINGS`, that is
reset after each test.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import httpx2
import pytest
import torch
from callback_receivers import Receiver
from nodes import (
    CALLBACK_KEY,
    JSON,
    MAX_QUEUED,
    POW,
    ROUND,
    STATUS_KEYS,
    VALIDATE_KEYS,
    Alone,
    begin,
    checked,
    claim,
    polled,
    posted,
    queued,
    status,
)
from poc2_oracle import distance as oracle_distance
from web import eventually

from poc_kernels.protocol import nonce_inputs
from poc_kernels.service.callbacks import verify

# ---- states, generating, validating ----


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


def test_an_honest_batch_and_its_forgeries(http: httpx2.Client, alone: Alone) -> None:
    begin(http)
    found = checked(http, 100)
    posted(http, "/phase/validate")
    nonces, dist = found["valid_nonces"][:MAX_QUEUED], found["valid_distances"][:MAX_QUEUED]
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


# ---- the queue ----


def test_a_polled_verdict_is_the_one_that_is_waited_for(http: httpx2.Client, alone: Alone, receiver: Receiver) -> None:
    begin(http, "validate", callback_url=receiver.url)
    empty = http.post(f"{POW}/validate?wait=false", json=claim([]))  # there is nothing to wait for
    assert (empty.status_code, empty.json()) == (200, posted(http, "/validate", claim([])))
    for body in (claim(range(10), [1.2] * 10), claim(range(10))):
        assert polled(http, queued(http, body)) == posted(http, "/validate", body)
        assert posted(http, "/validate?wait=true", body)["distances"] == alone.distances(body["nonces"])
    location = queued(http, claim([3], [1.0]))
    assert polled(http, location) == polled(http, location)  # as often as one likes
    receiver.wait(4)
    assert [batch["nonces"] for batch in receiver.contents(path="/validated")] == [list(range(10))] * 3 + [[3]]


@pytest.mark.parametrize("wait", ["0", "no", "", "False"])
def test_wait_is_true_or_false(http: httpx2.Client, wait: str) -> None:
    begin(http, "validate")
    assert http.post(f"{POW}/validate", params={"wait": wait}, json=claim([1])).status_code == 422


def test_batches_posted_without_waiting_are_refused_alike(http: httpx2.Client) -> None:
    begin(http, "validate")
    for body, code in (
        (claim([1], block_hash="0xother"), 400),
        (claim(range(MAX_QUEUED + 1)), 400),
        (claim([1, 1]), 400),
        (claim(["1"]), 422),  # type: ignore[list-item]
    ):
        assert http.post(f"{POW}/validate?wait=false", json=body).status_code == code
    posted(http, "/stop")
    polled(http, queued(http, claim([1])))


# ---- what is refused ----


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


def test_other_paths_and_methods(http: httpx2.Client) -> None:
    assert http.get(f"{POW}/nothing").status_code == 404
    assert http.get(f"{POW}/init").status_code == 405
    assert http.post(f"{POW}/status").status_code == 405
    paths = http.get("/openapi.json").json()["paths"]
    mine = {path.removeprefix(POW) for path in paths if path.startswith(POW)}
    phases = {"/init", "/init/generate", "/init/validate", "/phase/generate", "/phase/validate"}
    of_today = {"/generate", "/generate/{request_id}", "/versions"}
    assert mine == {*phases, "/validate", "/validate/{job_id}", "/status", "/stop", *of_today}


# ---- what is told ----


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


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.1:1/a", "https://user:pass@[::1]:1/x?y"])
def test_no_callback_url_ends_the_proof_thread(http: httpx2.Client, url: str) -> None:
    answer = http.post(f"{POW}/init/generate", json={**ROUND, "callback_url": url})
    assert answer.status_code == 200, answer.text
    checked(http, 40)
    posted(http, "/phase/validate")
    assert posted(http, "/validate", claim([1], [1.0]))["nonces"] == [1]
    assert http.get("/health").status_code == 200
