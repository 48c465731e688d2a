"""The wire of today over HTTP, case by case, on an engine of a few lines."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from callback_receivers import Receiver
from current_wire import INIT, KEY, PARAMS, POW, artifacts, asked, claims, vector
from tiny_service import ArtifactProver, TinyNode, tiny_node
from web import CHAT, TIMEOUT, client, eventually, serving

from poc_kernels import __version__

OLDER: dict[str, Any] = {
    "block_hash": "older",
    "block_height": 1,
    "public_key": "key",
    "r_target": 1.0,
    "node_id": 0,
    "node_count": 1,
    "batch_size": 4,
    "seq_len": 8,
}
STAT_TEST = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}
"""What the chain's node sends."""


@pytest.fixture(scope="module")
def node() -> Iterator[TinyNode]:
    models = ("tiny", "/models/tiny")
    with tiny_node(ArtifactProver(), shutdown_seconds=1.0, max_queued_nonces=2000, models=models) as node:
        yield node


@pytest.fixture(scope="module")
def server(node: TinyNode) -> Iterator[httpx2.Client]:
    with serving(node.app) as url, client(url) as http:
        yield http


@pytest.fixture
def http(node: TinyNode, server: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.post(f"{POW}/stop")
    node.prover.before_forward = lambda: None
    node.prover.missing.clear()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


@contextlib.contextmanager
def blocked(node: TinyNode) -> Iterator[threading.Event]:
    """Forwards wait until the block ends; the event says that one does."""
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert release.wait(TIMEOUT)

    node.prover.before_forward = wait
    try:
        yield entered
    finally:
        node.prover.before_forward = lambda: None
        release.set()


def ok(answer: httpx2.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer: httpx2.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()["detail"]


def generate(http: httpx2.Client, body: dict[str, Any]) -> Any:
    return ok(http.post(f"{POW}/generate", json=body))


def ended(http: httpx2.Client, request_id: str) -> Any:
    """What a request that did not wait comes to."""
    answer = lambda: ok(http.get(f"{POW}/generate/{request_id}"))  # noqa: E731
    eventually(lambda: answer()["status"] not in ("queued", "running"))
    return answer()


# ---- rounds ----


def test_a_round_from_init_to_stop(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    url = f"{receiver.url}/v2/poc-batches/Qwen%252FQwen3-0.6B"
    answer = ok(http.post(f"{POW}/init/generate", json={**INIT, "url": url, "group_id": 1, "n_groups": 3, "other": 1}))
    assert answer == {"status": "OK", "pow_status": {"status": "GENERATING"}}
    refusal = http.post(CHAT, json={})
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "generating")
    eventually(lambda: ok(http.get(f"{POW}/status"))["stats"]["total_processed"] >= 12)
    status = ok(http.get(f"{POW}/status"))
    config = {
        **{name: INIT[name] for name in ("block_hash", "block_height", "public_key", "node_id", "node_count")},
        "group_id": 1,
        "n_groups": 3,
        "seq_len": 16,
        "k_dim": 12,
        "batch_size": 4,
        "proof": "vectors",
        "use_random_projection": False,
        "poc_stronger_rng": False,
        "callback_host": receiver.url.removeprefix("http://"),
    }
    assert (status["status"], status["config"], status["ignored"]) == ("GENERATING", config, ["other"])
    assert status["stats"].keys() == {"total_processed", "nonces_per_second"}
    eventually(lambda: sum(len(content["artifacts"]) for content in receiver.contents()) >= 12)
    assert ok(http.post(f"{POW}/stop")) == {"status": "OK", "pow_status": {"status": "STOPPED"}}
    idle = ok(http.get(f"{POW}/status"))
    assert (idle["status"], idle["config"], idle["stats"]) == ("IDLE", None, None)
    assert ok(http.post(CHAT, json={}).is_success and http.get("/health"))["status"] == "ok"
    for path, _, _, _, _ in receiver.posts:
        assert path == "/v2/poc-batches/Qwen%252FQwen3-0.6B/generated"
    told = [each for content in receiver.contents() for each in content["artifacts"]]
    assert told == artifacts([1 + 2 + 6 * index for index in range(len(told))])
    common = {name: INIT[name] for name in ("block_hash", "block_height", "public_key", "node_id")}
    encoding = {"dtype": "f16", "k_dim": 12, "endian": "le"}
    for content in receiver.contents():
        assert content == {**common, "artifacts": content["artifacts"], "encoding": encoding}
    assert any(len(content["artifacts"]) > 4 for content in receiver.contents()), "batches are merged"


@pytest.mark.parametrize(
    ("params", "name", "k_dim"),
    [
        ({"proof": "fingerprint"}, "fingerprint", 64),
        ({"k_dim": 9}, "vectors", 9),
        ({"proof": "vectors"}, "vectors", 12),
    ],
)
def test_the_forms_of_a_round(
    http: httpx2.Client, receiver: Receiver, params: dict[str, Any], name: str, k_dim: int
) -> None:
    ok(http.post(f"{POW}/init/generate", json={**INIT, "params": {**PARAMS, **params}, "url": receiver.url}))
    config = ok(http.get(f"{POW}/status"))["config"]
    assert (config["proof"], config["k_dim"]) == (name, k_dim)
    receiver.wait(1)
    content = receiver.contents()[0]
    assert content["encoding"]["k_dim"] == k_dim
    assert {len(base64.b64decode(each["vector_b64"])) for each in content["artifacts"]} == {2 * k_dim}


def test_nonces_without_an_artifact_are_not_sent(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    node.prover.missing |= {1, 5}
    ok(http.post(f"{POW}/init/generate", json={**INIT, "url": receiver.url}))
    receiver.wait(1)
    assert [each["nonce"] for each in receiver.contents()[0]["artifacts"]][:3] == [3, 7, 9]


def test_a_round_that_generates_is_not_replaced(http: httpx2.Client) -> None:
    ok(http.post(f"{POW}/init/generate", json=INIT))
    for body in (INIT, {**INIT, "block_hash": "another"}):
        assert refused(http.post(f"{POW}/init/generate", json=body), 409) == "Already generating"
    assert ok(http.get(f"{POW}/status"))["config"]["block_hash"] == INIT["block_hash"]
    ok(http.post(f"{POW}/stop"))
    ok(http.post(f"{POW}/init/generate", json={**INIT, "block_hash": "another"}))


def test_both_wires_beside_each_other(http: httpx2.Client) -> None:
    """A body with r_target is of the older wire, also if it has params, and replaces whatever runs."""
    ok(http.post(f"{POW}/init/generate", json=INIT))
    begun = ok(http.post(f"{POW}/init/generate", json={**OLDER, "params": {"dim": 1792, "seq_len": 8}}))
    assert (begun["pow_status"]["state"], begun["pow_status"]["r_target"]) == ("GENERATING", 1.0)
    assert refused(http.post(f"{POW}/init/generate", json=INIT), 409) == "Already generating"
    assert ok(http.post(f"{POW}/phase/validate"))["pow_status"]["state"] == "VALIDATING"
    ok(http.post(f"{POW}/init/generate", json=INIT))
    claim = {**{name: INIT[name] for name in ("block_hash", "block_height", "public_key")}, "nonces": [1], "dist": []}
    refusal = refused(http.post(f"{POW}/validate", json=claim), 400)
    assert refusal == "batch must be a ArtifactBatch, got ProofBatch"
    paused = ok(http.post(f"{POW}/phase/validate"))["pow_status"]
    assert (paused["status"], paused["config"]["proof"]) == ("VALIDATING", "vectors")
    assert ok(http.post(f"{POW}/stop"))["pow_status"] == {"status": "STOPPED"}
    ok(http.post(f"{POW}/init", json=OLDER))
    status = ok(http.get(f"{POW}/status"))
    assert (status["state"], status["valid_nonces"], status["valid_distances"]) == ("IDLE", [], [])
    assert ok(http.post(f"{POW}/stop"))["pow_status"]["state"] == "STOPPED"


def test_the_status_before_the_first_round_is_of_either_wire() -> None:
    with tiny_node(ArtifactProver()) as node, serving(node.app) as url, client(url) as http:
        status = ok(http.get(f"{POW}/status"))
        assert (status["status"], status["state"], status["config"], status.get("stats")) == (
            "IDLE",
            "IDLE",
            None,
            None,
        )
        assert ok(http.post(f"{POW}/stop"))["pow_status"]["status"] == "STOPPED"


def test_versions(http: httpx2.Client) -> None:
    expected = {"vllm_version": "tiny 1.0", "gonka_poc_version": f"poc-kernels {__version__}"}
    assert ok(http.get(f"{POW}/versions")) == {**expected, "poc_validation_inference": True}


# ---- bodies ----

PATHS = ["/init/generate", "/generate"]


def body_of(path: str, **changes: Any) -> dict[str, Any]:
    return {**(INIT if path == "/init/generate" else asked([1])), **changes}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"params": {**PARAMS, "dim": 1}}, ["params", "dim"]),
        ({"params": {"model": "tiny"}}, ["params", "seq_len"]),
        ({"params": {**PARAMS, "seq_len": "16"}}, ["params", "seq_len"]),
        ({"params": None}, ["params"]),
        ({"block_hash": 7}, ["block_hash"]),
        ({"poc_stronger_rng": 1}, ["poc_stronger_rng"]),
        ({"node_id": None}, ["node_id"]),
    ],
)
def test_bodies_that_are_none(http: httpx2.Client, path: str, changes: dict[str, Any], location: list[str]) -> None:
    (detail,) = refused(http.post(POW + path, json=body_of(path, **changes)), 422)
    assert detail["loc"] == ["body", *location]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"params": {**PARAMS, "decode": True}},
            "params.decode must be False: there is no decode scheme here, got True",
        ),
        ({"params": {**PARAMS, "scheme": "decode"}}, "params.scheme must be 'prefill': there is no decode scheme here"),
        (
            {"params": {**PARAMS, "proof": "guesses"}},
            "proof must be one of distances, vectors, fingerprint, got 'guesses'",
        ),
        ({"params": {**PARAMS, "proof": "distances"}}, "r_target must be a positive number in a round of distances"),
        ({"params": {**PARAMS, "proof": "fingerprint", "k_dim": 12}}, "k_dim must be 64 in a round of fingerprints"),
        ({"params": {**PARAMS, "k_dim": 0}}, "k_dim must be in [1, 256], got 0"),
        ({"params": {**PARAMS, "seq_len": 33}}, "seq_len must be at most 32, got 33"),
        ({"batch_size": 4096, "params": {**PARAMS, "seq_len": 32}}, "batch_size * seq_len must be at most 65536"),
        ({"batch_size": -1}, "batch_size must be in [1, 4096], got -1"),
        ({"url": "ftp://host"}, "callback_url must be an http or https URL"),
        ({"node_count": 0}, "node_count must be positive"),
        ({"public_key": ""}, "public_key must have 1 to 1024 characters, got 0"),
    ],
)
def test_values_that_are_refused(http: httpx2.Client, path: str, changes: dict[str, Any], text: str) -> None:
    assert refused(http.post(POW + path, json=body_of(path, **changes)), 400).startswith(text)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_is_not_served(http: httpx2.Client, path: str) -> None:
    content = json.dumps(body_of(path, params={**PARAMS, "model": "other\ud800"}))
    assert refused(http.post(POW + path, content=content), 409) == {
        "error": "params mismatch",
        "requested": {"model": "other\\ud800", "seq_len": 16},
        "deployed": {"model": "tiny", "served_names": ["tiny", "/models/tiny"]},
    }
    ok(http.post(POW + path, json=body_of(path, params={**PARAMS, "model": "/models/tiny"})))


def test_what_is_taken_beside_the_table(http: httpx2.Client) -> None:
    """Both names of a scheme that is the only one here, what describes another, and keys that are unknown."""
    plain = {"scheme": "prefill", "decode": False, "max_tokens": 256, "route_window": 256}
    body = asked([5], params=plain, debug=True, enforced_k_steps=[], validation=None, stat_test=None, url="")
    assert generate(http, body)["artifacts"] == artifacts([5])
    assert generate(http, {**body, "batch_size": 0})["artifacts"] == artifacts([5])
    claimed = {"artifacts": [{**claims([5])["artifacts"][0], "k_points_steps": [1]}], "more": 1}
    assert generate(http, {**body, "validation": claimed, "stat_test": {"more": 1}})["n_mismatch"] == 0


@pytest.mark.parametrize("nonces", [[2**31], [-1], [1, 2**63], [1, 1]])
def test_nonces_that_are_refused(http: httpx2.Client, nonces: list[int]) -> None:
    refusal = refused(http.post(f"{POW}/generate", json=asked(nonces)), 400)
    assert refusal.startswith("nonces must be")


def test_rounds_whose_nonces_the_network_cannot_store(http: httpx2.Client) -> None:
    refusal = refused(http.post(f"{POW}/init/generate", json={**INIT, "node_count": 2**30}), 400)
    assert refusal == (f"node_id, node_count and n_groups must give nonces of at most {2**31 - 1}, got {1 + 3 * 2**30}")
    refusal = refused(http.post(f"{POW}/init/generate", json={**INIT, "node_id": -1, "node_count": -1}), 400)
    assert refusal.startswith("Node ID and node count must be set to generate")


# ---- nonces that are asked for ----


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_artifacts_at_once(node: TinyNode, http: httpx2.Client, proof: str) -> None:
    nonces = [7, 0, 12345, 2**31 - 1, 3]
    answer = generate(http, asked(nonces, params={"proof": proof}))
    uuid.UUID(answer.pop("request_id"))
    encoding = {"dtype": "f16", "k_dim": {"vectors": 12, "fingerprint": 64}[proof], "endian": "le"}
    assert answer == {"status": "completed", "artifacts": artifacts(nonces, proof=proof), "encoding": encoding}
    node.prover.missing.add(0)
    assert [each["nonce"] for each in generate(http, asked(nonces, params={"proof": proof}))["artifacts"]] == [
        nonce for nonce in nonces if nonce != 0
    ]


def test_no_nonces(http: httpx2.Client) -> None:
    """Are answered at once, whether they wait or not."""
    for wait in (True, False):
        empty = generate(http, asked([], wait=wait))
        assert (empty["status"], empty["artifacts"]) == ("completed", [])
        judged = generate(http, asked([], wait=wait, validation={"artifacts": []}))
        assert (judged["n_total"], judged["p_value"], judged["fraud_detected"]) == (0, 1.0, False)


def test_what_reaches_the_prover(http: httpx2.Client) -> None:
    assert generate(http, asked([1], poc_stronger_rng=True))["artifacts"] == artifacts([1], stronger_rng=True)
    projected = artifacts([1], use_random_projection=True)
    assert generate(http, asked([1], params={"use_random_projection": True}))["artifacts"] == projected


def test_projections_are_off_whatever_the_operator_uses_in_rounds_of_distances() -> None:
    with tiny_node(ArtifactProver(), random_projection=True) as node, serving(node.app) as url, client(url) as http:
        ok(http.post(f"{POW}/init/generate", json=INIT))
        assert not ok(http.get(f"{POW}/status"))["config"]["use_random_projection"]
        assert generate(http, asked([1]))["artifacts"] == artifacts([1])


def test_results_that_are_asked_for_later(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    with blocked(node) as entered:
        first = generate(http, asked([1, 2, 3, 4, 5], wait=False, url=receiver.url))
        assert entered.wait(TIMEOUT)
        second = generate(http, asked([6], wait=False, validation=claims([6]), url=receiver.url))
        assert (first["status"], first["queued_count"], second["queued_count"]) == ("queued", 5, 1)
        running = {"status": "running", "request_id": first["request_id"]}
        assert ok(http.get(f"{POW}/generate/{first['request_id']}")) == running
        queued = {"status": "queued", "request_id": second["request_id"]}
        assert ok(http.get(f"{POW}/generate/{second['request_id']}")) == queued
        ok(http.post(f"{POW}/stop"))
        ok(http.post(f"{POW}/init/generate", json={**INIT, "block_hash": "next"}))
    assert ended(http, first["request_id"])["artifacts"] == artifacts([1, 2, 3, 4, 5])
    ok(http.post(f"{POW}/stop"))
    judged = {"n_total": 1, "n_mismatch": 0, "mismatch_nonces": [], "p_value": 1.0, "fraud_detected": False}
    result = {"status": "completed", "request_id": second["request_id"], **judged}
    assert [ended(http, second["request_id"]) for _ in range(2)] == [result] * 2
    receiver.wait(2)
    of_round = {name: INIT[name] for name in ("block_hash", "block_height", "public_key", "node_id")}
    told = {**of_round, "request_id": first["request_id"], "artifacts": artifacts([1, 2, 3, 4, 5])}
    assert receiver.contents("/generated") == [{**told, "encoding": {"dtype": "f16", "k_dim": 12, "endian": "le"}}]
    assert receiver.contents("/validated") == [{**of_round, "request_id": second["request_id"], **judged}]


def test_ids_that_are_unknown_or_of_another_wire(http: httpx2.Client) -> None:
    assert refused(http.get(f"{POW}/generate/no-such"), 404) == "Request no-such not found"
    request_id = generate(http, asked([1], wait=False))["request_id"]
    assert refused(http.get(f"{POW}/validate/{request_id}"), 404).startswith("id must be of a batch posted with")
    ok(http.post(f"{POW}/init/validate", json=OLDER))
    claim = {**{name: OLDER[name] for name in ("block_hash", "block_height", "public_key")}, "nonces": [1], "dist": []}
    job = http.post(f"{POW}/validate?wait=false", json=claim).json()["id"]
    assert refused(http.get(f"{POW}/generate/{job}"), 404) == f"Request {job} not found"


def test_a_forward_that_fails(node: TinyNode, http: httpx2.Client) -> None:
    def fail() -> None:
        raise RuntimeError("secret")

    node.prover.before_forward = fail
    waited = http.post(f"{POW}/generate", json=asked([1]))
    text = "the batch could not be computed: RuntimeError"
    assert (waited.status_code, waited.json()["detail"], "retry-after" in waited.headers) == (503, text, True)
    request_id = generate(http, asked([2], wait=False))["request_id"]
    assert ended(http, request_id) == {"status": "failed", "request_id": request_id, "error": text}


def test_who_waits_while_a_round_generates_is_answered(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    ok(http.post(f"{POW}/init/generate", json={**INIT, "url": receiver.url}))
    nonces = list(range(100, 140))
    assert generate(http, asked(nonces, validation=claims(nonces)))["n_mismatch"] == 0
    assert ok(http.get(f"{POW}/status"))["status"] == "GENERATING"
    before = ok(http.get(f"{POW}/status"))["stats"]["total_processed"]
    eventually(lambda: ok(http.get(f"{POW}/status"))["stats"]["total_processed"] > before)


def test_who_leaves_gets_the_callback(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    with blocked(node), pytest.raises(httpx2.ReadTimeout):
        http.post(f"{POW}/generate", json=asked([9], validation=claims([9]), url=receiver.url), timeout=0.2)
    receiver.wait(1)
    assert receiver.contents("/validated")[0]["n_mismatch"] == 0


def test_requests_of_several_keys_share_forwards(node: TinyNode, http: httpx2.Client) -> None:
    """Of one block, form and shape; others do not, and everybody gets what is theirs."""
    bodies = [asked([nonce], public_key=f"key {nonce % 3}", node_id=nonce, wait=False) for nonce in range(1, 9)]
    bodies += [asked([9], params={"proof": "fingerprint"}, wait=False), asked([10], block_hash="other", wait=False)]
    with blocked(node) as entered:
        first = generate(http, asked([0], wait=False))["request_id"]
        assert entered.wait(TIMEOUT)
        ids = [generate(http, body)["request_id"] for body in bodies]
        forwards = len(node.prover.forwards)
    results = [ended(http, request_id)["artifacts"][0]["vector_b64"] for request_id in ids]
    assert results[:8] == [vector(nonce, public_key=f"key {nonce % 3}") for nonce in range(1, 9)]
    assert results[8] == vector(9, "fingerprint")
    assert results[9] not in {vector(10)}
    assert ended(http, first)["artifacts"] == artifacts([0])
    assert sorted(node.prover.forwards[forwards:]) == [1, 1, 1, 4, 4]


# ---- bounds ----


def test_a_queue_that_is_full() -> None:
    with (
        tiny_node(ArtifactProver(), max_queued_nonces=20, max_queued_batches=3) as node,
        serving(node.app) as url,
        client(url) as http,
    ):
        with blocked(node) as entered:
            generate(http, asked(list(range(15)), wait=False))
            assert entered.wait(TIMEOUT)
            for count, wait in ((6, True), (6, False), (5, False)):
                full = http.post(f"{POW}/generate", json=asked(list(range(count)), wait=wait))
                refusal = refused(full, 429)
                assert refusal.startswith("Queue full: 15 nonces queued, limit is 20: ")
                assert int(full.headers["retry-after"]) >= 1
            assert "a submitter with 15 nonces waiting can add at most" in refusal
        eventually(lambda: node.service.worker.queue.nonces == 0)
        never = refused(http.post(f"{POW}/generate", json=asked(list(range(21)))), 429)
        assert never == "Queue full: 0 nonces queued, limit is 20: 21 nonces never fit, send fewer at once"
        assert len(generate(http, asked(list(range(20))))["artifacts"]) == 20


def test_a_server_that_shuts_down_answers_who_waits() -> None:
    with (
        tiny_node(ArtifactProver()) as node,
        serving(node.app) as url,
        client(url) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        with blocked(node) as entered:
            waiting = pool.submit(http.post, f"{POW}/generate", json=asked([1]))
            assert entered.wait(TIMEOUT)
            queued = generate(http, asked([2], wait=False))["request_id"]
            node.service.begin_shutdown()
            for path in PATHS:
                assert refused(http.post(POW + path, json=body_of(path)), 503) == "the server is shutting down"
            closing = threading.Thread(target=node.service.worker.close, args=(TIMEOUT,))
            closing.start()
            assert refused(waiting.result(TIMEOUT), 503) == "the node is shutting down"
        closing.join(TIMEOUT)
        cancelled = {"status": "cancelled", "request_id": queued, "error": "the node is shutting down"}
        assert ok(http.get(f"{POW}/generate/{queued}")) == cancelled


def test_results_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_node(ArtifactProver(), result_seconds=0.2) as node, serving(node.app) as url, client(url) as http:
        request_id = generate(http, asked([1], wait=False))["request_id"]
        eventually(lambda: http.get(f"{POW}/generate/{request_id}").status_code == 404)


def test_large_bodies_are_taken_where_small_ones_are_not(http: httpx2.Client) -> None:
    nonces = list(range(500))
    assert generate(http, asked(nonces, validation=claims(nonces), batch_size=256))["n_total"] == 500
    assert refused(http.post(f"{POW}/stop", json={"padding": 2000 * "x"}), 413)


# ---- verdicts ----


def text(numbers: list[float]) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f2").tobytes()).decode()


VECTOR = np.frombuffer(base64.b64decode(vector(1)), "<f2").tolist()
FORGED = {
    "another nonce's": vector(2),
    "a NaN": text([*VECTOR[:-1], float("nan")]),
    "all NaN": text([float("nan")] * 12),
    "an infinity": text([float("inf"), *VECTOR[1:]]),
    "too short": text(VECTOR[:-1]),
    "too long": text([*VECTOR, 0.0]),
    "empty": "",
    "odd bytes": base64.b64encode(b"abc").decode(),
    "not base64": "?" * 32,
    "another alphabet": vector(1).replace("+", "-").replace("/", "_") + "=",
    "not padded": text(VECTOR[:-1]).rstrip("="),
    "a surrogate": "\ud800" * 32,
    "float32": base64.b64encode(np.array(VECTOR, "<f4").tobytes()).decode(),
    "negated": text([-number for number in VECTOR]),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_every_forged_artifact_is_a_mismatch_of_its_nonce_alone(http: httpx2.Client, forged: str) -> None:
    """Also those that published engines do not count: a NaN, no vector at all."""
    body = asked([3, 1, 2], validation=claims([1, 2, 3], n1=forged), stat_test=STAT_TEST)
    answer = ok(http.post(f"{POW}/generate", content=json.dumps(body)))
    assert (answer["n_total"], answer["n_mismatch"], answer["mismatch_nonces"]) == (3, 1, [1])


def test_nonces_that_were_never_computed_are_mismatches(node: TinyNode, http: httpx2.Client) -> None:
    node.prover.missing.add(2)
    answer = generate(http, asked([1, 2, 3], validation=claims([1, 2, 3])))
    assert (answer["n_total"], answer["mismatch_nonces"]) == (3, [2])


@pytest.mark.parametrize(
    ("count", "stat_test", "least"),
    [
        (64, STAT_TEST, 12),
        (64, {**STAT_TEST, "p_value_threshold": 0.01}, 13),
        (64, {}, 2),
        (64, None, 2),
        (64, {"fraud_threshold": 0.05, "p_mismatch": 0.1}, 12),
        (200, STAT_TEST, 28),
        (200, {**STAT_TEST, "p_value_threshold": 0.05, "fraud_threshold": 0.05}, 28),
        (200, None, 3),
    ],
)
def test_least_mismatches_that_convict(
    http: httpx2.Client, count: int, stat_test: dict[str, Any] | None, least: int
) -> None:
    nonces = list(range(count))
    for mismatches, fraud in ((least - 1, False), (least, True)):
        forged = claims(nonces, **{f"n{nonce}": "" for nonce in range(mismatches)})
        answer = generate(http, asked(nonces, validation=forged, stat_test=stat_test, batch_size=64))
        assert (answer["n_mismatch"], answer["fraud_detected"]) == (mismatches, fraud)
        assert answer["mismatch_nonces"] == nonces[:mismatches]


def test_the_distance_of_the_test_is_what_counts(http: httpx2.Client) -> None:
    near = np.array(VECTOR, "<f2")
    near[0] += np.float16(0.1)
    body = asked([1], validation=claims([1], n1=base64.b64encode(near.tobytes()).decode()))
    for threshold, mismatches in ((0.05, 1), (0.2, 0)):
        assert generate(http, {**body, "stat_test": {"dist_threshold": threshold}})["n_mismatch"] == mismatches
    assert generate(http, body)["n_mismatch"] == 1


@pytest.mark.parametrize(
    ("stat_test", "message"),
    [
        (
            {"fraud_threshold": 0.05, "p_value_threshold": 0.01},
            "fraud_threshold and p_value_threshold must be the same",
        ),
        ({"p_mismatch": 1.5}, "p_mismatch must be a probability"),
        ({"fraud_threshold": -0.1}, "fraud_threshold must be a probability"),
        ({"p_value_threshold": 2}, "fraud_threshold must be a probability"),
        ({"dist_threshold": -1}, "dist_threshold must be at least 0, got -1"),
    ],
)
def test_tests_that_are_none(http: httpx2.Client, stat_test: dict[str, float], message: str) -> None:
    body = asked([1], validation=claims([1]), stat_test=stat_test)
    assert refused(http.post(f"{POW}/generate", json=body), 400).startswith(message)


@pytest.mark.parametrize(
    ("nonces", "claimed"),
    [([1, 2], [1]), ([1], [1, 2]), ([1, 2], [1, 3]), ([], [1]), ([1], [])],
)
def test_claims_of_other_nonces(http: httpx2.Client, nonces: list[int], claimed: list[int]) -> None:
    refusal = refused(http.post(f"{POW}/generate", json=asked(nonces, validation=claims(claimed))), 400)
    assert refusal.startswith(f"validation.artifacts must have one artifact for each of the {len(nonces)} nonces")


def test_claims_that_are_repeated(http: httpx2.Client) -> None:
    twice = {"artifacts": claims([1])["artifacts"] * 2}
    refusal = refused(http.post(f"{POW}/generate", json=asked([1], validation=twice)), 400)
    assert refusal.endswith("got 2, 1 of them repeated and 0 of other nonces")
    refused(http.post(f"{POW}/generate", json=asked([1, 2], validation=twice)), 400)


def test_a_claim_that_is_no_text(http: httpx2.Client) -> None:
    for value in (None, 7, [1.0]):
        wrong = {"artifacts": [{"nonce": 1, "vector_b64": value}]}
        (detail,) = refused(http.post(f"{POW}/generate", json=asked([1], validation=wrong)), 422)
        assert detail["loc"] == ["body", "validation", "artifacts", 0, "vector_b64"]


def test_validated_callbacks_have_the_prover_s_key(http: httpx2.Client, receiver: Receiver) -> None:
    body = asked([1], validation=claims([1], n1=""), url=receiver.url, public_key="prover", node_id=-1, node_count=-1)
    assert generate(http, body)["fraud_detected"]
    receiver.wait(1)
    (told,) = receiver.contents("/validated")
    assert (told["public_key"], told["node_id"], told["fraud_detected"]) == ("prover", 0, True)
    assert KEY != "prover"


def test_metrics_and_health_are_of_all_forms(node: TinyNode, http: httpx2.Client) -> None:
    before = metric(http, 'poc_nonces_checked_total{phase="validate"}'), metric(http, "poc_frauds_total")
    generate(http, asked([1, 2, 3], validation=claims([1, 2, 3], n1="", n2="")))
    after = metric(http, 'poc_nonces_checked_total{phase="validate"}'), metric(http, "poc_frauds_total")
    assert after == (before[0] + 3, before[1] + 1)
    assert ok(http.get("/health"))["status"] == "ok"


def metric(http: httpx2.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


def test_json_without_a_content_type(http: httpx2.Client) -> None:
    content = json.dumps(asked([4])).encode()
    assert ok(http.post(f"{POW}/generate", content=content))["artifacts"] == artifacts([4])
