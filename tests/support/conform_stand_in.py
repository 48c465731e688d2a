"""A small server that speaks the wire of artifacts, with numbers by hash and no model; and with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import math
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json
from web import TIMEOUT, serving

MODEL = "stand-in/model"
QUEUE_LIMIT = 50
DEFAULTS = {
    "vectors": {"dist_threshold": 0.02, "p_mismatch": 0.001, "fraud_threshold": 0.01},
    "fingerprint": {"dist_threshold": 0.30, "p_mismatch": 0.02, "fraud_threshold": 0.01},
}
_RETRY_SECONDS, _BATCH_SECONDS = 0.02, 0.02


class Params(BaseModel):
    model: str
    seq_len: int
    k_dim: int = 12
    proof: str = "vectors"


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    block_hash: str
    block_height: int
    public_key: str
    node_id: int
    node_count: int
    group_id: int = 0
    n_groups: int = 1
    batch_size: int = 32
    params: dict[str, Any]
    url: str | None = None
    poc_stronger_rng: bool = False


class RequestBody(Body):
    nonces: list[int]
    wait: bool = False
    validation: dict[str, Any] | None = None
    stat_test: dict[str, float] | None = None


class StandIn:
    """The server's state. ``faults`` are what it does wrong: names that are searched for below."""

    def __init__(self) -> None:
        self.faults: set[str] = set()
        self.round: Body | None = None
        self.rounds = self.requests = 0
        self.results: dict[str, Any] = {}
        self.queued_key = ""
        self.app = FastAPI()
        self.app.add_api_route("/health", self.health)
        self.app.add_api_route("/v1/models", self.models)
        for prefix, init, stop, status, slash in (
            ("/api/v1/pow", self.init, self.stop, self.status, ""),
            ("/api/v1/inference/pow", self.node_init, self.node_stop, self.node_status, "8000:"),
        ):
            self.app.add_api_route(f"{prefix}/init/generate", init, methods=["POST"])
            self.app.add_api_route(f"{prefix}/stop", stop, methods=["POST"])
            self.app.add_api_route(f"{prefix}/status", status)
            self.app.add_api_route(f"{prefix}/versions", self.versions)
            self.app.add_api_route(f"{prefix}/generate/{slash}{{request_id}}", self.result)
        self.app.add_api_route("/api/v1/pow/generate", self.generate, methods=["POST"])
        self.app.add_api_route("/api/v1/inference/pow/generate", self.node_generate, methods=["POST"])

    def has(self, *faults: str) -> bool:
        return not self.faults.isdisjoint(faults)

    def reset(self, *faults: str) -> None:
        self.round, self.faults = None, set(faults)

    def reading(self, model: type[Any], content: bytes) -> Any:
        try:
            body = model.model_validate_json(content)
            params = Params.model_validate(body.params)
        except ValidationError as error:
            raise HTTPException(500 if self.has("malformed_is_500") else 422, "malformed") from error
        if body.params.keys() - Params.model_fields.keys() and not self.has("params_allow"):
            raise HTTPException(422, "params forbid extras")
        if body.model_extra and self.has("forbids_keys"):
            raise HTTPException(422, "extras")
        body.params = params
        return body

    # ---- rounds ----

    def health(self) -> JSONResponse:
        return JSONResponse({}, 503 if self.has("unhealthy") else 200)

    def models(self) -> Any:
        return {"data": [] if self.has("no_models") else [{"id": MODEL}]}

    def versions(self) -> Any:
        told = {"vllm_version": "0", "gonka_poc_version": "0"}
        return told if self.has("versions_lack_a_key") else {**told, "poc_validation_inference": True}

    async def init(self, request: Request) -> Any:
        body = self.reading(Body, await request.body())
        if body.params.model != MODEL and not self.has("any_model"):
            about = {"error": "params mismatch", "requested": dict(body.params), "deployed": {"model": MODEL}}
            raise HTTPException(409, about)
        if self.round is not None and not self.has("init_replaces"):
            raise HTTPException(409, "no" if self.has("says_no_reason") else "Already generating")
        self.round, self.rounds = body, self.rounds + 1
        if body.url:
            threading.Thread(target=self._generate, args=(body,), daemon=True).start()
        return (
            {"status": "OK"} if self.has("init_is_short") else {"status": "OK", "pow_status": {"status": "GENERATING"}}
        )

    def stop(self) -> Any:
        if self.round is None and self.has("stops_once"):
            raise HTTPException(409, "nothing runs")
        if not self.has("stop_goes_on"):
            self.round = None
        return {"status": "OK", "pow_status": {"status": "IDLE" if self.has("stop_is_idle") else "STOPPED"}}

    def status(self) -> Any:
        body = self.round
        if body is None:
            return {"status": "IDLE", "config": None, "stats": None}
        names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups")
        config = {name: getattr(body, name) for name in names}
        config |= {"seq_len": body.params.seq_len, "k_dim": body.params.k_dim}
        if self.has("status_of_another"):
            config["node_id"] = 0
        stats = None if self.has("no_stats") else {"total_processed": 1, "nonces_per_second": 1.0}
        return {"status": "GENERATING", "config": config, "stats": stats}

    async def node_init(self, request: Request) -> Any:
        await self.init(request)
        results = [] if self.has("no_results") else [{"port": 8000, "status": "OK"}]
        return {"status": "OK", "backends": 1, "n_groups": 1, "results": results, "errors": None}

    def node_stop(self) -> Any:
        self.stop()
        return {"status": "OK", "results": []}

    def node_status(self) -> Any:
        told = self.status()
        return {"status": told["status"], "backends": [] if self.has("no_backends") else [{"port": 8000, **told}]}

    def _generate(self, body: Body) -> None:
        place, faults = 0, self.faults
        while self.round is body or (self.has("generates_on") and self.faults is faults):
            offset, step = body.node_id + body.group_id * body.node_count, body.node_count * body.n_groups
            if self.has("no_groups"):
                offset, step = body.node_id, body.node_count
            nonces = [offset + (place + row) * step for row in range(body.batch_size)]
            place += body.batch_size + self.has("leaves_out")
            artifacts = self.artifacts(body, nonces, "round" if self.has("round_differs") else "")
            for _ in range(1 + self.has("posts_twice")):
                self._post(body, "generated", self._generated(body, artifacts))
            threading.Event().wait(_BATCH_SECONDS)

    # ---- requests ----

    async def generate(self, request: Request) -> Any:
        body = self.reading(RequestBody, await request.body())
        claimed = (
            None if body.validation is None else {a["nonce"]: a["vector_b64"] for a in body.validation["artifacts"]}
        )
        if claimed is not None and set(claimed) != set(body.nonces) and not self.has("claims_of_others"):
            raise HTTPException(400, "unequal")
        if max(body.nonces) >= 2**31 - 1 and self.has("small_nonces"):
            raise HTTPException(400, "too large")
        if self.round is not None and self.has("no_requests_in_a_round"):
            raise HTTPException(409, "Already generating")
        wait = body.wait or (self.has("waits_by_default") and "wait" not in body.model_fields_set)
        if not wait and len(body.nonces) > QUEUE_LIMIT and not self.has("unlimited"):
            raise HTTPException(429, "full" if self.has("says_no_reason") else f"Queue full: limit is {QUEUE_LIMIT}")
        if not wait:
            before, self.queued_key = self.queued_key, body.public_key
            body.public_key = before if before and self.has("key_of_the_one_before") else body.public_key
        self.requests += 1
        request_id = str(self.requests) if self.has("ids_are_numbers") else str(uuid.uuid4())
        artifacts = self.artifacts(body, body.nonces, "queued" if not wait and self.has("queued_differs") else "")
        answer = {"status": "completed", "request_id": request_id}
        answer |= self._verdict(body, artifacts, claimed) if claimed is not None else self._found(body, artifacts)
        if wait:
            return answer
        self.results[request_id] = answer
        if body.url and (answer.get("n_mismatch") != 0 or not self.has("posts_frauds_alone")):
            told = self._generated(body, artifacts) if claimed is None else {**self._of_round(body), **answer}
            if self.has("excludes_another"):
                told["excluded_nonces"] = body.nonces[-1:]
            told = {**told, "request_id": None if self.has("no_request_id") else request_id}
            name = "generated" if claimed is None else "validated"
            threading.Thread(target=self._post, args=(body, name, told), daemon=True).start()
        return {"status": "queued", "request_id": request_id, "queued_count": len(body.nonces)}

    async def node_generate(self, request: Request) -> Any:
        answer = await self.generate(request)
        answer["request_id"] = f"8000:{answer['request_id']}"
        return answer

    def result(self, request_id: str, request: Request) -> Any:
        known = self.results.get(request_id)
        if known is None and not self.has("knows_all_ids"):
            raise HTTPException(404, f"Request {request_id} not found")
        known = known or {"status": "queued", "request_id": request_id}
        if self.has("never_done"):
            known = {"status": "queued", "request_id": request_id}
        is_node = "/inference/" in request.url.path and not self.has("engines_ids")
        return {**known, "request_id": f"8000:{request_id}" if is_node else request_id}

    # ---- artifacts ----

    def artifacts(self, body: Body, nonces: list[int], salt: str = "") -> dict[int, str]:
        found = {nonce: self._artifact(body, nonce, place, len(nonces), salt) for place, nonce in enumerate(nonces)}
        if self.has("drops_a_nonce"):
            del found[nonces[0]]
        return found

    def _artifact(self, body: Body, nonce: int, place: int, count: int, salt: str) -> str:
        of_rng = body.poc_stronger_rng and not self.has("one_rng")
        of_what = {
            "block_hash": "" if self.has("no_block") else body.block_hash,
            "public_key": "" if self.has("no_key") else body.public_key,
            "nonce": 0 if self.has("one_for_all") else nonce,
            "seq_len": 0 if self.has("no_seq_len") else body.params.seq_len,
            "faults": [
                self.requests if self.has("drifts") else 0,
                count if self.has("sees_neighbours") else 0,
                place if self.has("sees_places") else 0,
                body.batch_size if self.has("sees_batches") else 0,
                self.rounds if self.has("sees_rounds") else 0,
            ],
        }
        digest = hashlib.sha256(f"{of_what} {salt} {of_rng}".encode()).digest()
        k_dim = body.params.k_dim - self.has("k_dim_is_less")
        vector = np.random.default_rng(list(digest)).normal(size=k_dim)
        vector *= (2 if self.has("no_norm") else 1) / np.linalg.norm(vector)
        if self.has("finds_nan"):
            vector[0] = math.nan
        kind = ">f2" if self.has("big_endian") else "<f4" if self.has("wide") else "<f2"
        text = base64.b64encode(vector.astype(kind).tobytes()).decode()
        return text.replace("=", "") if self.has("no_padding") else f"#{text[1:]}" if self.has("no_alphabet") else text

    def _found(self, body: Body, artifacts: dict[int, str]) -> dict[str, Any]:
        listed = [{"nonce": nonce, "vector_b64": text} for nonce, text in artifacts.items()]
        return {"artifacts": listed, "encoding": {"dtype": "f16", "k_dim": body.params.k_dim, "endian": "le"}}

    # ---- verdicts ----

    def _verdict(self, body: RequestBody, artifacts: dict[int, str], claimed: dict[int, str]) -> dict[str, Any]:
        test = dict(DEFAULTS[body.params.proof])
        if self.has("other_defaults"):
            test = {"dist_threshold": 0.4, "p_mismatch": 0.1, "fraud_threshold": 0.05}
        given = dict(body.stat_test or {})
        if "p_value_threshold" in given and not self.has("own_name_alone"):
            given.setdefault("fraud_threshold", given["p_value_threshold"])
        if self.has("all_or_nothing") and len(given) < 3:
            given = {}
        test |= {name: given[name] for name in test if name in given}
        if self.has("own_threshold"):
            test["dist_threshold"] = 0.25
        if self.has("own_level"):
            test["fraud_threshold"] = 0.01
        if self.has("claims_by_place"):
            claimed = dict(zip(artifacts, claimed.values(), strict=True))
        wrong = [
            nonce for nonce in artifacts if self._mismatches(body, artifacts, claimed, nonce, test["dist_threshold"])
        ]
        if wrong and self.has("one_for_all_forged"):
            wrong = list(artifacts)
        n, k, p = len(artifacts), len(wrong) + self.has("p_of_more"), test["p_mismatch"]
        excluded = list(artifacts)[:1] if self.has("leaves_one_out", "excludes_another") else []
        p_value = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        return {
            "n_total": n,
            "n_mismatch": len(wrong),
            "mismatch_nonces": wrong,
            "p_value": p_value,
            "fraud_detected": p_value < test["fraud_threshold"] and not self.has("never_fraud"),
            **({"n_excluded": len(excluded), "excluded_nonces": excluded} if excluded else {}),
        }

    def _mismatches(
        self, body: Body, artifacts: dict[int, str], claimed: dict[int, str], nonce: int, threshold: float
    ) -> bool:
        k_dim, text = body.params.k_dim, claimed[nonce]
        if self.has("all_agree"):
            return False
        if self.has("any_place") and text in artifacts.values():
            return False
        try:
            content = base64.b64decode(text, validate=True)
        except ValueError as error:
            if self.has("base64_is_422"):
                raise HTTPException(422, "no base64") from error
            return True
        if not content and self.has("empty_agrees"):
            return False
        if len(content) != 2 * k_dim:
            if self.has("lengths_raise"):
                raise HTTPException(500, "a length")
            return not self.has("lengths_agree")
        received = np.frombuffer(content, "<f2").astype(np.float64)
        if not np.isfinite(received).all():
            return not self.has("not_finite_agrees")
        if body.params.proof == "fingerprint" and abs(np.linalg.norm(received) - 1) > 0.01 and not self.has("any_norm"):
            return True
        expected = np.frombuffer(base64.b64decode(artifacts[nonce]), "<f2").astype(np.float64)
        return bool(np.linalg.norm(received - expected) > threshold) or self.has("all_mismatch")

    # ---- callbacks ----

    def _of_round(self, body: Body) -> dict[str, Any]:
        key = "the endpoint's own" if self.has("own_key") else body.public_key
        told = {"public_key": key, "block_hash": body.block_hash, "block_height": body.block_height}
        return told if self.has("no_node") else {**told, "node_id": body.node_id}

    def _generated(self, body: Body, artifacts: dict[int, str]) -> dict[str, Any]:
        return {**self._of_round(body), **self._found(body, artifacts)}

    def _post(self, body: Body, name: str, content: dict[str, Any]) -> None:
        url = f"{unquote(str(body.url)) if self.has('decodes_urls') else body.url}/{name}"
        if self.has("posts_nothing"):
            return
        headers = {"content-type": "application/json"}
        for _ in range(1 if self.has("posts_once") else 50):
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, to_json(content), headers), timeout=TIMEOUT
                ) as answer:
                    answer.read()
                return
            except (urllib.error.URLError, ConnectionError):
                threading.Event().wait(_RETRY_SECONDS)


@contextmanager
def stand_in() -> Iterator[tuple[StandIn, str]]:
    """A `StandIn` behind a real server; and its URL."""
    server = StandIn()
    with serving(server.app) as url:
        yield server, url
        server.round = None
