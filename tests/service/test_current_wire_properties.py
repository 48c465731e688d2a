"""The wire of today under bodies at random: no body fails the server, and no batch changes an artifact or a verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from current_wire import MLNODE, PARAMS, POW, artifacts, asked, claims
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_service import ArtifactProver, TinyNode, tiny_node
from web import client, serving

SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def node() -> Iterator[TinyNode]:
    with tiny_node(ArtifactProver(), shutdown_seconds=1.0, max_queued_nonces=1000) as node:
        yield node


@pytest.fixture(scope="module")
def http(node: TinyNode) -> Iterator[httpx2.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        with serving(node.app) as url, client(url) as http:
            yield http


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(
        ["", "\ud800", "\x00", "k" * 1025, "http://127.0.0.1:1", "http://[::1", "vectors", "fingerprint"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["nonce", "model", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [*asked([1]), "validation", "stat_test", "url", "poc_stronger_rng", "group_id", "n_groups", "r_target", "more"]
IN_PARAMS = [*PARAMS, "k_dim", "proof", "use_random_projection", "scheme", "decode", "max_tokens", "more"]
IN_TEST = ["dist_threshold", "p_mismatch", "fraud_threshold", "p_value_threshold", "more"]
CLAIMED = st.lists(st.fixed_dictionaries({"nonce": st.integers(0, 3) | ANYTHING, "vector_b64": st.text() | ANYTHING}))


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A body of /generate, which also has what /init/generate takes, with some keys changed or left out."""
    body = asked(draw(st.lists(st.integers(0, 5), unique=True, max_size=5)))
    body["validation"] = draw(
        st.none() | st.fixed_dictionaries({"artifacts": CLAIMED}) | st.just(claims(body["nonces"]))
    )
    body["stat_test"] = draw(st.none() | st.dictionaries(st.sampled_from(IN_TEST), st.floats(0, 1) | ANYTHING))
    body["params"] = {**PARAMS, **draw(st.dictionaries(st.sampled_from(IN_PARAMS), ANYTHING, max_size=1))}
    body |= draw(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=1))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=1)):
        body.pop(key, None)
    return body


@settings(max_examples=60, **SETTINGS)
@given(
    body=bodies(),
    path=st.sampled_from([f"{prefix}/{name}" for prefix in (POW, MLNODE) for name in ("generate", "init/generate")]),
)
def test_every_body_is_answered_as_documented(http: httpx2.Client, body: dict[str, Any], path: str) -> None:
    answer = http.post(path, content=json.dumps(body))
    documented = {200, 400, 409, 422, 429}
    assert answer.status_code in (documented | {502} if path == f"{MLNODE}/init/generate" else documented), answer.text
    strict = json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(strict, dict)
    assert ("detail" in strict) == (answer.status_code != 200)
    assert http.get("/health").status_code == 200
    if path.endswith("init/generate"):
        json.loads(http.get(f"{POW}/status").text)
        assert http.post(f"{POW}/stop").status_code == 200


@settings(max_examples=25, **SETTINGS)
@given(
    nonces=st.lists(st.integers(0, 2**31 - 1), unique=True, min_size=1, max_size=20),
    batch_size=st.integers(1, 9),
    proof=st.sampled_from(["vectors", "fingerprint"]),
    data=st.data(),
)
def test_answers_are_those_of_every_batch(
    http: httpx2.Client, nonces: list[int], batch_size: int, proof: str, data: st.DataObject
) -> None:
    """Whatever its size and order, and whatever else waits."""
    body = asked(nonces, params={"proof": proof}, batch_size=batch_size)
    beside = http.post(f"{POW}/generate", json={**body, "public_key": "another", "wait": False})
    assert beside.status_code == 200
    expected = artifacts(nonces, proof=proof)
    assert http.post(f"{POW}/generate", json=body).json()["artifacts"] == expected
    forged = data.draw(st.sets(st.sampled_from(nonces)))
    claimed = [each if each["nonce"] not in forged else {**each, "vector_b64": ""} for each in expected]
    validation = {"artifacts": data.draw(st.permutations(claimed))}
    verdict = http.post(f"{POW}/generate", json={**body, "validation": validation}).json()
    assert verdict["mismatch_nonces"] == [nonce for nonce in nonces if nonce in forged]
    assert (verdict["n_total"], verdict["n_mismatch"]) == (len(nonces), len(forged))


@settings(max_examples=25, **SETTINGS)
@given(request_id=st.text(st.characters(codec="utf-8", exclude_characters="/."), min_size=1, max_size=60))
def test_every_id_is_answered(http: httpx2.Client, request_id: str) -> None:
    for prefix in (POW, MLNODE):
        answer = http.get(f"{prefix}/generate/{quoted(request_id)}")
        assert answer.status_code in (400, 404)
        assert isinstance(answer.json()["detail"], str)


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())
