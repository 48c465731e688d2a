"""The answers and callbacks of the wire. Each may have more keys: implementations add some."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Told(BaseModel):
    model_config = ConfigDict(strict=True)


# ---- rounds ----


class Generating(_Told):
    """``pow_status`` of a round that began."""

    status: Literal["GENERATING"]


class Stopped(_Told):
    """``pow_status`` of one that ended."""

    status: Literal["STOPPED"]


class Began(_Told):
    """Answer of POST /init/generate."""

    status: Literal["OK"]
    pow_status: Generating


class Ended(_Told):
    """Answer of POST /stop."""

    status: Literal["OK"]
    pow_status: Stopped


class BackendResult(_Told):
    """What one of an MLNode's engines said."""

    port: int
    status: str


class BeganOnBackends(_Told):
    """Answer of an MLNode's POST /init/generate."""

    status: Literal["OK"]
    backends: int
    n_groups: int
    results: list[BackendResult]
    errors: Any


class EndedOnBackends(_Told):
    """Answer of an MLNode's POST /stop."""

    status: Literal["OK"]


class RoundConfig(_Told):
    """What a round runs with."""

    block_hash: str
    block_height: int
    public_key: str
    node_id: int
    node_count: int
    group_id: int
    n_groups: int
    seq_len: int
    k_dim: int


class Stats(_Told):
    """How far it is."""

    total_processed: int
    nonces_per_second: float


class GeneratingStatus(_Told):
    """Answer of GET /status while a round generates."""

    status: Literal["GENERATING"]
    config: RoundConfig
    stats: Stats


class IdleStatus(_Told):
    """Answer of GET /status while none does."""

    status: Literal["IDLE"]
    config: None = None
    stats: None = None


class Backend(_Told):
    """One of an MLNode's engines."""

    port: int


class BackendsStatus(_Told):
    """Answer of an MLNode's GET /status."""

    status: Literal["IDLE", "GENERATING", "MIXED", "NO_BACKENDS"]
    backends: list[Backend]


class Versions(_Told):
    """Answer of GET /versions."""

    vllm_version: str
    gonka_poc_version: str
    poc_validation_inference: bool


class Mismatch(_Told):
    """What is said of another model than the served one."""

    error: Literal["params mismatch"]
    requested: dict[str, Any]
    deployed: dict[str, Any]


class ParamsMismatch(_Told):
    """Answer to another model than the served one."""

    detail: Mismatch


# ---- requests for nonces ----


class Artifact(_Told):
    """What came of a nonce."""

    nonce: int
    vector_b64: str


class Encoding(_Told):
    """How artifacts are written."""

    dtype: Literal["f16"]
    k_dim: int
    endian: Literal["le"]


class Artifacts(_Told):
    """Answer of POST /generate without a validation."""

    status: Literal["completed"]
    request_id: str
    artifacts: list[Artifact]
    encoding: Encoding


class Judged(_Told):
    """What a verdict says, wherever it is told."""

    n_total: int
    n_mismatch: int
    mismatch_nonces: list[int]
    p_value: float
    fraud_detected: bool
    n_excluded: int = 0
    excluded_nonces: list[int] = []


class Verdict(Judged):
    """Answer of POST /generate with a validation."""

    status: Literal["completed"]
    request_id: str


class Queued(_Told):
    """Answer of POST /generate with wait false."""

    status: Literal["queued"]
    request_id: str
    queued_count: int


class Progress(_Told):
    """Answer of GET /generate/{request_id}, without what came of it."""

    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    request_id: str


class Refusal(_Told):
    """Answer to what is refused."""

    detail: Any


# ---- callbacks ----


class _OfRound(_Told):
    public_key: str
    block_hash: str
    block_height: int
    node_id: int


class Generated(_OfRound):
    """Body of a POST to {url}/generated."""

    artifacts: list[Artifact]
    encoding: Encoding
    request_id: str | None = None


class Validated(_OfRound, Judged):
    """Body of a POST to {url}/validated."""

    request_id: str
