"""Verdicts of today's wire over HTTP: which artifacts are mismatches, and how many of them convict."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2
import numpy as np
import pytest
from callback_receivers import Receiver
from current_wire import (
    KEY,
    MLNODE,
    POW,
    STAT_TEST,
    artifacts,
    asked,
    claims,
    ended,
    generate,
    ok,
    refused,
    vector,
)
from tiny_service import TinyNode

pytest_plugins = ["callback_receivers"]


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


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_nonce_of_which_the_validator_has_nothing_is_left_out(
    node: TinyNode, http: httpx2.Client, receiver: Receiver, proof: str
) -> None:
    nonces, params = [*range(32)], {"proof": proof}
    node.prover.missing.add(7)
    claimed = {"artifacts": artifacts(nonces, proof=proof)}
    claimed["artifacts"][9]["vector_b64"] = ""
    body = asked(nonces, validation=claimed, params=params, url=receiver.url)
    count = 'poc_nonces_without_artifact_total{phase="validate"}'
    before = metric(http, count)
    answer = generate(http, body)
    assert metric(http, count) == before + 1
    assert (answer["n_total"], answer["n_excluded"], answer["excluded_nonces"]) == (31, 1, [7])
    assert (answer["n_mismatch"], answer["mismatch_nonces"]) == (1, [9])
    receiver.wait(1)
    (told,) = receiver.contents(path="/validated")
    assert {name: told[name] for name in answer if name in told} == {
        name: value for name, value in answer.items() if name != "status"
    }


@pytest.mark.parametrize("failed", [10, 32])
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_validator_whose_own_model_fails_convicts_nobody(
    node: TinyNode, http: httpx2.Client, receiver: Receiver, proof: str, failed: int
) -> None:
    """Nor does it vote: what is posted to /validated is a vote for or against the node."""
    nonces, params = [*range(32)], {"proof": proof}
    node.prover.missing |= set(range(failed))
    body = asked(nonces, validation={"artifacts": artifacts(nonces, proof=proof)}, params=params, url=receiver.url)
    why = f"there is no verdict: {failed} of 32 nonces gave no finite vector when they were recomputed here"
    abstentions = metric(http, "poc_abstentions_total")
    answer = http.post(f"{POW}/generate", json=body)
    assert refused(answer, 503).startswith(why)
    assert metric(http, "poc_abstentions_total") == abstentions + 1
    assert "retry-after" not in answer.headers
    told = ended(http, generate(http, {**body, "wait": False})["request_id"])
    assert (told["status"], told["error"].startswith(why)) == ("failed", True)
    assert node.service.worker.trouble() is None
    node.prover.missing.clear()
    assert generate(http, body)["n_mismatch"] == 0
    receiver.wait(1)
    assert [told["n_total"] for told in receiver.contents(path="/validated")] == [32]


@pytest.mark.parametrize("wire", [POW, MLNODE])
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_plain_forgery_is_fraud_though_too_much_cannot_be_recomputed(
    node: TinyNode, http: httpx2.Client, receiver: Receiver, proof: str, wire: str
) -> None:
    """179 forgeries are as plain beside 21 nonces of which the model here gives nothing as beside 20."""
    nonces = [*range(200)]
    forged = artifacts([1000] * 200, proof=proof)
    claimed = {"artifacts": [{**each, "nonce": nonce} for nonce, each in zip(nonces, forged, strict=True)]}
    body = asked(nonces, validation=claimed, params={"proof": proof}, batch_size=64, url=receiver.url)
    for failed in (20, 21):
        node.prover.missing |= set(range(failed))
        answer = ok(http.post(f"{wire}/generate", json=body))
        assert (answer["n_total"], answer["n_mismatch"], answer["fraud_detected"]) == (200 - failed,) * 2 + (True,)
        assert (answer["n_excluded"], answer["excluded_nonces"]) == (failed, nonces[:failed])
    receiver.wait(2)
    assert [told["n_excluded"] for told in receiver.contents("/validated")] == [20, 21]


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
            "stat_test.fraud_threshold and stat_test.p_value_threshold must be the same",
        ),
        ({"p_mismatch": 1.5}, "stat_test.p_mismatch must be a probability"),
        ({"fraud_threshold": -0.1}, "stat_test.fraud_threshold must be a probability"),
        ({"p_value_threshold": 2}, "stat_test.p_value_threshold must be a probability"),
        ({"dist_threshold": -1}, "stat_test.dist_threshold must be at least 0, got -1"),
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
