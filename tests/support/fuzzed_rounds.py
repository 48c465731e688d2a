"""Tests of the PoC routes under generated requests, for any server: they answer as their schema says, and it lives on.

They take the fixtures `fuzzed`, a client of the server, which has to be as good after all tests as before; `api`, what
schemathesis makes of its documentation; and `alone`.
"""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nodes import JSON, POW, ROUND, Alone, begin, claim, posted
from schemathesis.specs.openapi.checks import positive_data_acceptance

FUZZED_SETTINGS: dict[str, Any] = {"max_proof_tokens": 1024, "max_queued_nonces": 100}
"""Of the server."""

ONE = "/validate/{job_id}"
REQUESTED = "/generate/{request_id}"
WITH_BODY = ["/init", "/init/generate", "/init/validate", "/validate", "/generate"]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, mode) for path in WITH_BODY for mode in (POSITIVE, NEGATIVE)),
        *((path, POSITIVE) for path in ("/phase/generate", "/phase/validate", "/status", "/stop", ONE, REQUESTED)),
    ],
)
def test_routes_conform_to_their_schema(
    fuzzed: httpx2.Client, api: Any, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = api[POW + path]["GET" if path in ("/status", ONE, REQUESTED) else "POST"]

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case: Any) -> None:
        if path == "/validate":
            begin(fuzzed, "validate")
        else:
            posted(fuzzed, "/stop")
        # A body that fits the schema may still have a value that no round takes.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    conforms()


TEXT = st.text(min_size=1, max_size=8)
TAKEN = {
    "block_hash": TEXT,
    "block_height": st.integers(0, 2**63 - 1),
    "public_key": TEXT,
    "r_target": st.floats(0.0, exclude_min=True, allow_infinity=False) | st.integers(1, 10),
    "fraud_threshold": st.floats(0, 1),
    "node_id": st.integers(0, 2**62),
    "node_count": st.integers(1, 2**20),
    "batch_size": st.integers(1, 8),
    "seq_len": st.integers(1, 32),
    "callback_url": st.none() | st.sampled_from(["http://127.0.0.1:1", "http://[::1]:1/x?y"]),
    "use_random_projection": st.none() | st.booleans(),
    "group_id": st.integers(0, 2),
    "n_groups": st.integers(3, 2**11),
    "url": st.sampled_from(["", None]),
    "params": st.sampled_from([None, {}, {"seq_len": 4, "dim": 1792}]),
    "unknown": st.just(1),
}
NOT_TAKEN = st.one_of(
    st.sampled_from([-2, -1, 2**31 + 1, 2**63, 10**30, "", "\ud800", "k" * 1025, "http://[::1", "https://a:b", "\x00"]),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.none() | st.booleans(),
)
CHANGES = st.builds(
    lambda taken, other: {**taken, **other},
    st.fixed_dictionaries({}, optional=TAKEN),
    st.just({}) | st.dictionaries(st.sampled_from(sorted(TAKEN)), NOT_TAKEN, max_size=1),
)
NONCES = st.integers(0, 2**63 - 1) | st.sampled_from([-1, 0, 2**63 - 1, 2**63, 10**30])


@settings(max_examples=80)
@given(changes=CHANGES, phase=st.sampled_from(["generate", "validate"]), nonce=NONCES)
def test_a_round_is_refused_or_runs(
    fuzzed: httpx2.Client, alone: Alone, changes: dict[str, Any], phase: str, nonce: int
) -> None:
    posted(fuzzed, "/stop")
    body = {**ROUND, "batch_size": 2, "seq_len": 4, **changes}
    answer = fuzzed.post(f"{POW}/init/{phase}", content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 200:
        proof = claim([nonce], **{key: body[key] for key in ("block_hash", "block_height", "public_key")})
        verdict = fuzzed.post(f"{POW}/validate", content=json.dumps(proof), headers=JSON)
        assert fuzzed.get("/health").status_code == 200
        posted(fuzzed, "/stop")  # a CPU that generates leaves little to this process
        if 0 <= nonce < 2**63:
            config = {
                key: value for key, value in body.items() if key not in ("unknown", "callback_url", "url", "params")
            }
            config["use_random_projection"] = bool(config.get("use_random_projection"))
            assert verdict.json()["distances"] == alone.distances([nonce], **config)
        else:
            assert verdict.status_code == 400
    assert fuzzed.get("/health").status_code == 200
