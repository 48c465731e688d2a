"""Requests of today's wire over HTTP: nonces to compute, at once or later, and how many are taken."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from blocking import blocked
from callback_receivers import Receiver
from current_wire import (
    INIT,
    OLDER,
    POW,
    artifacts,
    asked,
    claims,
    ended,
    generate,
    ok,
    refused,
    vector,
)
from tiny_service import ArtifactProver, TinyNode, tiny_node
from web import TIMEOUT, client, eventually, serving

from poc_kernels.service.queue import ValidationJob

pytest_plugins = ["callback_receivers"]


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_artifacts_at_once(node: TinyNode, http: httpx2.Client, proof: str) -> None:
    nonces = [7, 0, 12345, 2**31 - 1, 3]
    answer = generate(http, asked(nonces, params={"proof": proof}))
    request_id = answer.pop("request_id")
    assert request_id == str(uuid.UUID(request_id, version=4))
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
        assert not ok(http.get(f"{POW}/status"))["round"]["use_random_projection"]
        assert generate(http, asked([1]))["artifacts"] == artifacts([1])


def test_results_that_are_asked_for_later(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    with blocked(node.prover) as entered:
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


def test_a_result_that_comes_while_it_is_asked_for(
    node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is told of a request is of one moment: nothing is completed and has no artifacts."""
    told = []

    class Watched:
        """A job that ends after the first look at it, whatever is looked at."""

        def __init__(self, job: ValidationJob) -> None:
            self._job, self._looked = job, False

        def __getattr__(self, name: str) -> Any:
            value = getattr(self._job, name)
            if name in ("verdict", "error", "state") and not self._looked:
                self._looked = True
                release.set()
                eventually(lambda: self._job.future.done())
            return value

    queue = node.service.worker.queue
    for fails in (False, True):
        entered, release = threading.Event(), threading.Event()

        def hold(entered: threading.Event = entered, release: threading.Event = release, fails: bool = fails) -> None:
            entered.set()
            assert release.wait(TIMEOUT)
            if fails:
                raise ValueError("of the batch")

        node.prover.before_forward = hold
        request_id = generate(http, asked([1], wait=False))["request_id"]
        assert entered.wait(TIMEOUT)
        with monkeypatch.context() as patch:
            job = queue.get(request_id)
            patch.setattr(queue, "get", lambda request_id, job=job: Watched(job))
            told.append(ok(http.get(f"{POW}/generate/{request_id}")))
        assert told[-1] == {"status": "running", "request_id": request_id}
        assert ended(http, request_id)["status"] == ("failed" if fails else "completed")


@pytest.mark.parametrize(("proof", "length"), [("vectors", 32), ("fingerprint", 172)])
def test_no_claim_is_kept_that_is_longer_than_an_artifact(
    node: TinyNode, http: httpx2.Client, proof: str, length: int
) -> None:
    """Else what waits and what is kept would be as large as all their bodies, and not as their nonces."""
    nonces = [1, 2, 3, 4]
    texts = [vector(1, proof), 100_000 * "A", length * "\U0001d7d8", (length - 1) * "A"]
    listed = [{"nonce": nonce, "vector_b64": text} for nonce, text in zip(nonces, texts, strict=True)]
    with blocked(node.prover) as entered:
        body = asked(nonces, wait=False, params={"proof": proof}, validation={"artifacts": listed})
        request_id = generate(http, body)["request_id"]
        assert entered.wait(TIMEOUT)
        job = node.service.worker.queue.get(request_id)
        assert job is not None
        assert job.validation.proof.vectors == [texts[0], "", "", ""]
    assert ended(http, request_id)["mismatch_nonces"] == nonces[1:]
    assert job.verdict.received_vectors == [texts[0], "", "", ""]


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
    with blocked(node.prover), pytest.raises(httpx2.ReadTimeout):
        http.post(f"{POW}/generate", json=asked([9], validation=claims([9]), url=receiver.url), timeout=0.2)
    receiver.wait(1)
    assert receiver.contents("/validated")[0]["n_mismatch"] == 0


def test_requests_of_several_keys_share_forwards(node: TinyNode, http: httpx2.Client) -> None:
    """Of one block, form and shape; others do not, and everybody gets what is theirs."""
    bodies = [asked([nonce], public_key=f"key {nonce % 3}", node_id=nonce, wait=False) for nonce in range(1, 9)]
    bodies += [asked([9], params={"proof": "fingerprint"}, wait=False), asked([10], block_hash="other", wait=False)]
    with blocked(node.prover) as entered:
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


def test_who_says_the_form_s_own_k_dim_shares_forwards_with_who_does_not(node: TinyNode, http: httpx2.Client) -> None:
    with blocked(node.prover) as entered:
        generate(http, asked([0], block_hash="other", wait=False))
        assert entered.wait(TIMEOUT)
        ids = [
            generate(http, asked([n], params={"k_dim": k}, wait=False))["request_id"] for n, k in ((1, 12), (2, None))
        ]
        forwards = len(node.prover.forwards)
    assert [ended(http, request_id)["artifacts"] for request_id in ids] == [artifacts([1]), artifacts([2])]
    assert node.prover.forwards[forwards:] == [1, 2]


# ---- bounds ----


def test_a_queue_that_is_full() -> None:
    with (
        tiny_node(ArtifactProver(), max_queued_nonces=20, max_queued_batches=3) as node,
        serving(node.app) as url,
        client(url) as http,
    ):
        with blocked(node.prover) as entered:
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
        with blocked(node.prover) as entered:
            waiting = pool.submit(http.post, f"{POW}/generate", json=asked([1]))
            assert entered.wait(TIMEOUT)
            queued = generate(http, asked([2], wait=False))["request_id"]
            node.service.begin_shutdown()
            for path, body in (("/init/generate", INIT), ("/generate", asked([1]))):
                assert refused(http.post(POW + path, json=body), 503) == "the server is shutting down"
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
