"""The wire of today over HTTP, case by case, on an engine of a few lines: rounds, and which bodies are taken."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from current_wire import (
    INIT,
    MLNODE,
    OLDER,
    PARAMS,
    POW,
    artifacts,
    asked,
    claims,
    generate,
    ok,
    refused,
)
from pydantic import ValidationError
from tiny_service import ARTIFACT_FORMS, ArtifactProver, TinyNode, tiny_node
from web import CHAT, client, eventually, serving

from poc_kernels import __version__
from poc_kernels.service.wires.current_bodies import GenerateBody

pytest_plugins = ["callback_receivers"]

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
    }
    host = receiver.url.removeprefix("http://")
    ours = {"proof": "vectors", "batch_size": 4, "use_random_projection": False, "stronger_rng": False}
    assert (status["status"], status["config"]) == ("GENERATING", config)
    assert (status["round"], status["ignored"]) == ({**ours, "callback_host": host}, ["other"])
    assert status["stats"].keys() == {"total_processed", "nonces_per_second"}
    eventually(lambda: any(len(content["artifacts"]) > 4 for content in receiver.contents()))  # merged
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
    status = ok(http.get(f"{POW}/status"))
    assert (status["round"]["proof"], status["config"]["k_dim"]) == (name, k_dim)
    receiver.wait(1)
    content = receiver.contents()[0]
    assert content["encoding"]["k_dim"] == k_dim
    assert {len(base64.b64decode(each["vector_b64"])) for each in content["artifacts"]} == {2 * k_dim}


def test_nonces_without_an_artifact_are_not_sent(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    node.prover.missing |= {1, 5}
    ok(http.post(f"{POW}/init/generate", json={**INIT, "url": receiver.url}))
    told = lambda: [each["nonce"] for content in receiver.contents() for each in content["artifacts"]]  # noqa: E731
    eventually(lambda: len(told()) > 2)
    assert told()[:3] == [3, 7, 9]


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
    assert (paused["status"], paused["round"]["proof"]) == ("VALIDATING", "vectors")
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
        stopped = ok(http.get(f"{POW}/status"))
        assert (stopped["status"], stopped["state"], stopped["config"]) == ("IDLE", "STOPPED", None)
        assert ok(http.get(f"{MLNODE}/status"))["status"] == "IDLE"


def test_a_prover_that_has_no_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArtifactProver, "forms", ARTIFACT_FORMS)
    with tiny_node(ArtifactProver()) as node, serving(node.app) as url, client(url) as http:
        assert refused(http.post(f"{POW}/init", json=OLDER), 400).startswith(
            "proof must be one of vectors, fingerprint"
        )
        assert generate(http, asked([1]))["artifacts"] == artifacts([1])
        assert ok(http.get(f"{POW}/status"))["status"] == "IDLE"


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
            "params.proof must be one of vectors, fingerprint, got 'guesses'",
        ),
        ({"params": {**PARAMS, "proof": "distances"}}, "params.proof must be one of vectors, fingerprint, got"),
        ({"params": {**PARAMS, "proof": "fingerprint", "k_dim": 12}}, "params.k_dim must be 64 in a round of"),
        ({"params": {**PARAMS, "k_dim": 0}}, "params.k_dim must be in [1, 256], got 0"),
        ({"params": {**PARAMS, "seq_len": 33}}, "params.seq_len must be at most 32, got 33"),
        ({"batch_size": 4096, "params": {**PARAMS, "seq_len": 32}}, "batch_size * params.seq_len must be at most"),
        ({"batch_size": -1}, "batch_size must be in [1, 4096], got -1"),
        ({"url": "ftp://host"}, "url must be an http or https URL"),
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


def test_what_is_refused_is_quoted_in_part(http: httpx2.Client) -> None:
    body = asked([1], params={"scheme": 100_000 * "x"})
    answer = http.post(f"{POW}/generate", json=body)
    assert "there is no decode scheme here, got 'xxx" in refused(answer, 400)
    assert len(answer.content) < 500
    answer = http.post(f"{POW}/generate", json=asked([1], params={100_000 * "x": 1}))
    assert refused(answer, 422)[0]["loc"][:2] == ["body", "params"]
    assert len(answer.content) < 500
    answer = http.get(f"{POW}/validate/{5000 * 'x'}")
    assert refused(answer, 404).startswith("id must be of a batch posted with wait=false and kept still, got 'xxx")
    assert len(answer.content) < 500


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"block_hash": "\xff"}', "that is no text in UTF-8: invalid start byte at byte 16"),
        (gzip.compress(b"{}"), "that is no text in UTF-8: invalid start byte at byte 1"),
        (100_000 * b"[", "that is nested too deeply"),
        (b'{"block_height": ' + 5000 * b"1" + b"}", "with a number of too many digits"),
    ],
)
@pytest.mark.parametrize("path", [*PATHS, "/init", "/validate"])
def test_bodies_that_cannot_be_read(http: httpx2.Client, path: str, content: bytes, fault: str) -> None:
    answer = http.post(POW + path, content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 400) == f"the body must be JSON, got one {fault}"


def test_of_many_unknown_keys_the_first_are_told() -> None:
    """An error of each of half a million would keep all other threads waiting for seconds."""
    many = {f"key{place}": 1 for place in range(1000)}
    with pytest.raises(ValidationError) as caught:
        GenerateBody.model_validate(asked([1], params={**many, "seq_len": "16"}))
    assert [detail["loc"] for detail in caught.value.errors()] == [
        ("params", "seq_len"),
        *(("params", f"key{place}") for place in range(20)),
    ]


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
    refusal = refused(http.post(f"{POW}/init/generate", json={**INIT, "node_id": 2**31}), 400)
    text = (
        f"node_id, node_count, group_id and n_groups must give nonces of at most {2**31 - 1}, got {2**31} as the first"
    )
    assert refusal == text
    answer = refused(http.post(f"{MLNODE}/init/generate", json={**INIT, "node_id": 2**31}), 502)
    assert text in answer["errors"][0]["error"]
    refusal = refused(http.post(f"{POW}/init/generate", json={**INIT, "node_id": -1, "node_count": -1}), 400)
    assert refusal.startswith("Node ID and node count must be set to generate")


def test_a_round_that_runs_out_of_nonces(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    """It ends generation with the last one that the network can store, a part of a batch, and serves users again."""
    last = 2**31 - 1
    begun = {**INIT, "url": receiver.url, "node_id": last - 5 * 4 + 1, "node_count": 4}
    ok(http.post(f"{POW}/init/generate", json=begun))
    why = f"every nonce of this node up to {last} was tried"
    eventually(lambda: ok(http.get(f"{POW}/status"))["generation_ended"] == why)
    status = ok(http.get(f"{POW}/status"))
    assert (status["status"], status["stats"]["total_processed"]) == ("VALIDATING", 5)
    eventually(lambda: http.post(CHAT, json={}).is_success)
    assert ok(http.get("/health"))["status"] == "ok"
    assert "poc_nonces_exhausted 1.0" in http.get("/metrics").text
    nonces = [last - 5 * 4 + 1 + 4 * index for index in range(5)]
    eventually(lambda: sum(len(content["artifacts"]) for content in receiver.contents()) == 5)
    told = [each for content in receiver.contents() for each in content["artifacts"]]
    assert told == artifacts(nonces)
    assert generate(http, asked(nonces, validation={"artifacts": told}))["n_mismatch"] == 0  # any validator takes them
    refusal = refused(http.post(f"{POW}/init/generate", json=begun), 409)
    assert refusal == f"phase GENERATING needs another round: {why}"
    assert ok(http.get(f"{MLNODE}/status"))["status"] == "MIXED"
    ok(http.post(f"{POW}/init/generate", json={**begun, "node_id": 0}))
    status = ok(http.get(f"{POW}/status"))
    assert (status["status"], status["generation_ended"]) == ("GENERATING", None)
    assert "poc_nonces_exhausted 0.0" in http.get("/metrics").text
