"""Tests of today's wire over HTTP, for any server that takes it: each room has a module that imports them.

They take the fixtures `http`, `alone` and `receiver`: a server of the small model, which is reset after each test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from nodes import POW, ROUND, Alone, begin, posted
from served import NAME
from web import eventually

from poc_kernels.protocol import EngineProver, PoCConfig, Row

BODY: dict[str, Any] = {
    **{name: value for name, value in ROUND.items() if name not in ("r_target", "seq_len")},
    "params": {"model": NAME, "seq_len": ROUND["seq_len"]},
}
STAT_TEST = {"dist_threshold": 0.005, "p_mismatch": 0.001, "p_value_threshold": 0.01}
"""What another engine's roundings change in float32, and those of artifacts to float16."""


@pytest.fixture
def older(http: httpx2.Client) -> Iterator[None]:
    """The status is that of the older wire again, as those who reset the server read it."""
    yield
    begin(http, "init")


def asked(nonces: list[int], proof: str, **changes: Any) -> dict[str, Any]:
    params = {**BODY["params"], "proof": proof}
    return {**BODY, "nonces": nonces, "wait": True, "params": params, **changes}


@pytest.mark.usefixtures("older")
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_artifacts_are_those_of_every_batch(http: httpx2.Client, alone: Alone, proof: str) -> None:
    nonces = [5, 0, 2**31 - 1, 3]
    told = posted(http, "/generate", asked(nonces, proof))["artifacts"]
    assert [each["nonce"] for each in told] == nonces
    for some in (slice(2, None), slice(0, 1)):
        assert posted(http, "/generate", asked(nonces[some], proof))["artifacts"] == told[some]
    config = PoCConfig(**{**ROUND, "r_target": None, "proof": proof})
    proved = EngineProver(alone._engine).prove(config, [Row(ROUND["public_key"], nonce) for nonce in nonces]).values
    claims = {"artifacts": [{"nonce": n, "vector_b64": artifact} for n, artifact in zip(nonces, proved, strict=True)]}
    honest = posted(http, "/generate", asked(nonces, proof, validation=claims, stat_test=STAT_TEST))
    assert (honest["n_total"], honest["n_mismatch"], honest["fraud_detected"]) == (4, 0, False)
    stolen = posted(http, "/generate", asked(nonces, proof, validation=claims, public_key="another key"))
    assert (stolen["n_mismatch"], stolen["fraud_detected"]) == (4, True)


@pytest.mark.usefixtures("older")
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_round_of_artifacts_and_its_validation(http: httpx2.Client, receiver: Receiver, proof: str) -> None:
    body = {**BODY, "params": {**BODY["params"], "proof": proof}, "url": receiver.url}
    posted(http, "/init/generate", body)
    receiver.wait(1)
    told = receiver.contents(path="/generated")[0]["artifacts"][:8]
    beside = posted(http, "/generate", asked([each["nonce"] for each in told], proof, validation={"artifacts": told}))
    assert beside["n_mismatch"] == 0
    assert http.get(f"{POW}/status").json()["status"] == "GENERATING"
    posted(http, "/stop")
    # While the receiver lives: what is not delivered stays in the server's queue, and is other tests' trouble.
    eventually(lambda: http.get(f"{POW}/status").json()["callbacks"]["pending_batches"] == 0)
    queued = posted(http, "/generate", asked([told[0]["nonce"]], proof, wait=False))["request_id"]
    result = lambda: http.get(f"{POW}/generate/{queued}").json()  # noqa: E731
    eventually(lambda: result()["status"] == "completed")
    assert result()["artifacts"] == told[:1]
