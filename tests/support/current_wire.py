"""What tests of today's wire send, and the artifacts that a tiny node gives for it."""

from __future__ import annotations

from typing import Any

import httpx2
from tiny_service import ROUND, artifact
from web import eventually

from poc_kernels.protocol import PoCConfig

POW = "/api/v1/pow"
MLNODE = "/api/v1/inference/pow"
KEY = "02a1b2c3"
BLOCK: dict[str, Any] = {"block_hash": "B10C", "block_height": 7, "public_key": KEY, "node_id": 1, "node_count": 2}
PARAMS: dict[str, Any] = {"model": "tiny", "seq_len": 16}
INIT: dict[str, Any] = {**BLOCK, "batch_size": 4, "params": PARAMS}


def asked(nonces: list[int], *, params: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """The body of /generate."""
    return {**INIT, "nonces": nonces, "wait": True, "params": {**PARAMS, **(params or {})}, **keys}


def vector(nonce: int, proof: str = "vectors", public_key: str = KEY, **changes: Any) -> str:
    """The artifact of a nonce in the round of `BLOCK`."""
    return artifact(PoCConfig(BLOCK["block_hash"], 7, public_key, proof=proof, **changes), public_key, nonce)


def artifacts(nonces: list[int], **changes: Any) -> list[dict[str, Any]]:
    """Artifacts as they are told."""
    return [{"nonce": nonce, "vector_b64": vector(nonce, **changes)} for nonce in nonces]


def claims(nonces: list[int], **other: str) -> dict[str, Any]:
    """What a node claims: the artifacts, or by ``n{nonce}`` another text."""
    texts = {nonce: other.get(f"n{nonce}", vector(nonce)) for nonce in nonces}
    return {"artifacts": [{"nonce": nonce, "vector_b64": text} for nonce, text in texts.items()]}


OLDER = {**ROUND, "block_hash": "older", "block_height": 1}
"""A round of the older wire."""
STAT_TEST = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}
"""What the chain's node sends."""


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
