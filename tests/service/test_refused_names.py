"""Every refusal names the key of the body that the client sent: for every key of every body, on every wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import httpx2
import pytest
from current_wire import INIT, MLNODE, OLDER, POW, asked, claims, ok, refused
from pydantic import BaseModel
from tiny_service import TinyNode, tiny_node
from web import client, serving

from poc_kernels.protocol.distances.wire import ProofBody
from poc_kernels.service.wires.current_bodies import GenerateBody, GenerationBody
from poc_kernels.service.wires.names import named
from poc_kernels.service.wires.older_body import RoundBody

OF_A_BLOCK = {"block_hash": "", "block_height": -1, "public_key": 1025 * "k", "node_id": -2}
OF_A_NODE = {**OF_A_BLOCK, "node_count": 0}
OF_A_GROUP = {"group_id": -1, "n_groups": 0}
OF_TODAY = {
    **OF_A_NODE,
    "batch_size": 4097,
    "params.seq_len": 33,  # of the prover's check, and not of the configuration's
    "params.k_dim": 1,  # of the form's
    "params.proof": "distances",
    "params.scheme": "decode",
    "params.decode": True,
    "url": "ftp://host",
}
WRONG: dict[type[BaseModel], dict[str, Any]] = {
    GenerationBody: {**OF_TODAY, **OF_A_GROUP},
    GenerateBody: {
        **OF_TODAY,
        "nonces": [-1],
        "validation.artifacts": [],
        "stat_test.dist_threshold": -0.5,
        "stat_test.p_mismatch": 1.5,
        "stat_test.fraud_threshold": 2,
        "stat_test.p_value_threshold": 2,
    },
    RoundBody: {
        **OF_A_NODE,
        **OF_A_GROUP,
        "r_target": 0,
        "fraud_threshold": -1,
        "batch_size": 0,
        "seq_len": 33,
        "callback_url": "http://host/#fragment",
        "url": "http://",
        "params.seq_len": 33,
    },
    ProofBody: {**OF_A_BLOCK, "nonces": [1, 1], "dist": [-1.0]},
}
"""A value of the right type that is refused, by the key."""
ANY_VALUE = {
    GenerationBody: {"params.use_random_projection", "params.max_tokens", "params.route_window", "poc_stronger_rng"},
    GenerateBody: {
        *("params.use_random_projection", "params.max_tokens", "params.route_window", "poc_stronger_rng", "wait"),
        "validation.artifacts[].vector_b64",  # what is no vector mismatches
        "validation.artifacts[].nonce",  # those of the list are refused together
    },
    RoundBody: {"use_random_projection"},
    ProofBody: set[str](),
}
"""Keys that take every value of their type."""
OF_ANOTHER_ANSWER = "params.model"
"""409 says which models there are."""
CALLS = [
    (GenerationBody, f"{POW}/init/generate"),
    (GenerationBody, f"{MLNODE}/init/generate"),
    (GenerateBody, f"{POW}/generate"),
    (GenerateBody, f"{MLNODE}/generate"),
    (RoundBody, f"{POW}/init"),
    (RoundBody, f"{POW}/init/generate"),
    (RoundBody, f"{POW}/init/validate"),
    (ProofBody, f"{POW}/validate"),
]
SENT: dict[type[BaseModel], dict[str, Any]] = {
    GenerationBody: {**INIT, "group_id": 0, "n_groups": 1},
    GenerateBody: asked([1], validation=claims([1]), stat_test={}),
    RoundBody: OLDER,
    ProofBody: {"public_key": "key", "block_hash": "older", "block_height": 1, "nonces": [1, 2], "dist": []},
}


def keys_of(model: type[BaseModel], within: str = "") -> Iterator[str]:
    """Yield the keys of a body that hold values, and the lists: ``params.seq_len``, ``validation.artifacts``."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        is_list = "list" in str(field.annotation)
        if inner is None or is_list:
            yield within + name
        if inner is not None:
            yield from keys_of(inner, f"{within}{name}{'[]' if is_list else ''}.")


def with_value(body: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """Return a body with another value of a key, and without the other name that some values have."""
    name, _, inner = key.partition(".")
    changed = {**body, name: with_value(body.get(name) or {}, inner, value) if inner else value}
    if key == "params.seq_len" and "seq_len" in body:
        del changed["seq_len"]
    return changed


def test_every_key_of_every_body_is_here() -> None:
    for model, wrong in WRONG.items():
        expected = {*wrong, *ANY_VALUE[model]} | ({OF_ANOTHER_ANSWER} if "params.proof" in wrong else set())
        assert set(keys_of(model)) == expected, model


@pytest.mark.parametrize(
    ("path", "model", "key"),
    [(path, model, key) for model, path in CALLS for key in WRONG[model]],
)
def test_a_value_that_is_refused(
    node: TinyNode, http: httpx2.Client, path: str, model: type[BaseModel], key: str
) -> None:
    if path == f"{MLNODE}/init/generate" and key in OF_A_GROUP:
        pytest.skip("an MLNode chooses the group itself")
    if model is ProofBody:
        ok(http.post(f"{POW}/init/validate", json=OLDER))
    body = with_value(SENT[model], key, WRONG[model][key])
    answer = http.post(path, json=body)
    told = refused(answer, 502 if path == f"{MLNODE}/init/generate" else 400)
    if path.startswith(MLNODE):
        told = json.loads(told["errors"][0]["error"] if isinstance(told, dict) else told)["detail"]
    names, must, _ = told.partition(" must ")
    assert must, told
    assert key in names.replace(",", " ").split(), told


@pytest.mark.parametrize(("path", "model"), [(path, model) for model, path in CALLS])
def test_a_value_of_another_type(http: httpx2.Client, path: str, model: type[BaseModel]) -> None:
    for key in keys_of(model):
        if "[]" in key:
            continue
        (detail, *_) = refused(http.post(path, json=with_value(SENT[model], key, [[]])), 422)
        where = ["body", *key.split(".")]
        assert detail["loc"][: len(where)] == where


def test_values_under_two_names(http: httpx2.Client) -> None:
    """The one that counts is named."""
    ftp = {"url": "ftp://host", "callback_url": "ftp://host"}
    assert refused(http.post(f"{POW}/init", json={**OLDER, **ftp}), 400).startswith("callback_url must be")
    lengths = {"seq_len": 33, "params": {"seq_len": 33}}
    assert refused(http.post(f"{POW}/init", json={**OLDER, **lengths}), 400).startswith("seq_len must be")
    both = {"fraud_threshold": 2, "p_value_threshold": 2}
    refusal = refused(http.post(f"{POW}/generate", json=asked([1], stat_test=both)), 400)
    assert refusal.startswith("stat_test.fraud_threshold must be")


def test_a_product_of_two_keys(http: httpx2.Client) -> None:
    body = {**INIT, "batch_size": 4096, "params": {**INIT["params"], "seq_len": 32}}
    for path, sent in (("/init/generate", body), ("/generate", {**body, "nonces": [1]})):
        told = refused(http.post(POW + path, json=sent), 400)
        assert told == "batch_size * params.seq_len must be at most 65536 on this node, got 131072"


def test_hosts_that_callbacks_may_not_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with tiny_node(loopback=False) as node, serving(node.app) as url, client(url) as http:
        for key in ("url", "callback_url"):
            told = refused(http.post(f"{POW}/init", json={**OLDER, key: "http://127.0.0.1/"}), 400)
            assert told.startswith(f"{key} must have a host that this node may send callbacks to")


def test_a_node_that_proves_no_form_with_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with tiny_node() as node, serving(node.app) as url, client(url) as http:
        for path, body in (("/init/generate", INIT), ("/generate", asked([1]))):
            told = refused(http.post(POW + path, json=body), 400)
            expected = "params.proof must be a form that has artifacts, none of which is proved here, got 'vectors'"
            assert told == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a must be b, got 'a must'", "x.a must be b, got 'a must'"),
        ("a, b and ab must give a", "x.a, b and ab must give a"),
        ("a * b must be at most 3", "x.a * b must be at most 3"),
        ("y.a must be a", "y.a must be a"),
        ("a is wrong", "a is wrong"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_names_alone_are_replaced(kind: type[Exception], text: str, told: str) -> None:
    with pytest.raises(kind) as caught, named({"a": "x.a"}):
        raise kind(text)
    assert (type(caught.value), str(caught.value)) == (kind, told)


def test_errors_of_libraries_are_left_as_they_are() -> None:
    error = json.JSONDecodeError("a must be", "", 0)
    with pytest.raises(json.JSONDecodeError) as caught, named({"a": "x.a"}):
        raise error
    assert caught.value is error
