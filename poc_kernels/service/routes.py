"""The PoC routes, under /api/v1/pow, and /health and /metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from ..protocol import UNSET, IllegalTransitionError, PoCConfig, PoCState, ProofBatch, RoundEndedError, ValidatedBatch
from .gate import POC_PREFIX, USER_PREFIX
from .queue import QueueFullError, ValidationJob

if TYPE_CHECKING:
    from ..node.node import Node

_BUSY_SECONDS = 5
_MAX_LOGITS = 2**26
"""Logits of a batch: each takes some 30 bytes, with its permutation and what the distance needs."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class RoundBody(_Body):
    """Body of /init, /init/generate and /init/validate: a `PoCConfig`; unknown keys are ignored."""

    block_hash: str
    block_height: int
    public_key: str
    r_target: float
    fraud_threshold: float = 0.01
    node_id: int = UNSET
    node_count: int = UNSET
    batch_size: int = 32
    seq_len: int = 256
    callback_url: str | None = None
    use_random_projection: bool | None = None
    group_id: int = 0
    n_groups: int = 1


class ProofBody(_Body):
    """Body of /validate: a `ProofBatch`."""

    public_key: str
    block_hash: str
    block_height: int
    # The first wrong value ends it: a body can have a million of them.
    nonces: Annotated[list[int], Field(fail_fast=True)]
    dist: Annotated[list[float], Field(fail_fast=True)] = []
    node_id: int = UNSET


class PhaseAnswer(BaseModel):
    """Answer of the routes that change the state."""

    status: str
    pow_status: dict[str, Any]


class ValidateAnswer(BaseModel):
    """Answer of /validate; computed_distances repeats distances for older clients."""

    status: str
    nonces: list[int]
    distances: list[float]
    computed_distances: list[float]
    valid: list[bool]
    fraud_detected: bool
    n_invalid: int
    probability_honest: float


class WaitingAnswer(BaseModel):
    """Answer of /validate?wait=false, and of /validate/{id} until there is a verdict."""

    status: Literal["QUEUED", "RUNNING"]
    id: str
    nonces_done: int
    nonces: int


def poc_router(node: Node) -> APIRouter:
    """The routes of a node's rounds."""
    router = APIRouter(prefix=POC_PREFIX, tags=["pow"])
    manager = node.manager

    def to_config(body: RoundBody) -> PoCConfig:
        values = body.model_dump()
        if values["use_random_projection"] is None:
            values["use_random_projection"] = node.settings.random_projection
        config = PoCConfig(**values)
        tokens, most = config.batch_size * config.seq_len, node.settings.max_proof_tokens
        if tokens > most:
            raise ValueError(f"batch_size * seq_len must be at most {most} on this node, got {tokens}")
        rows = max(1, _MAX_LOGITS // node.engine.vocab_size)
        if config.batch_size > rows:
            raise ValueError(f"batch_size must be at most {rows} with this vocabulary, got {config.batch_size}")
        return config

    def changed(change: Callable[[], None]) -> PhaseAnswer:
        if node.stopping:
            raise HTTPException(503, "the server is shutting down")
        try:
            change()
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except IllegalTransitionError as error:
            raise HTTPException(400 if manager.config is None else 409, str(error)) from error
        finally:
            node.worker.wake()
        return PhaseAnswer(status="OK", pow_status=node.status())

    errors: dict[int | str, dict[str, Any]] = {
        400: {"description": "A value that a round does not take, or no round was begun"},
        409: {"description": "The state does not allow it"},
        503: {"description": "The server is shutting down, or the batch could not be computed"},
    }

    @router.post("/init", responses=errors)
    def init(body: RoundBody) -> PhaseAnswer:
        """Begin a round; no phase runs yet."""
        return changed(lambda: manager.init_round(to_config(body)))

    @router.post("/init/generate", responses=errors)
    def init_generate(body: RoundBody) -> PhaseAnswer:
        """Begin a round and look for nonces in the background. Users get 503 meanwhile."""
        return changed(lambda: manager.start_round(to_config(body), PoCState.GENERATING))

    @router.post("/init/validate", responses=errors)
    def init_validate(body: RoundBody) -> PhaseAnswer:
        """Begin a round and validate the proofs that come. Users are served meanwhile."""
        return changed(lambda: manager.start_round(to_config(body), PoCState.VALIDATING))

    @router.post("/phase/generate", responses=errors)
    def phase_generate() -> PhaseAnswer:
        """Look for nonces in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.GENERATING))

    @router.post("/phase/validate", responses=errors)
    def phase_validate() -> PhaseAnswer:
        """Validate proofs in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.VALIDATING))

    def enqueued(body: ProofBody, submitter: str, keep: bool) -> ValidationJob:
        try:
            return node.worker.enqueue(ProofBatch(**body.model_dump()), submitter, keep)
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_seconds)}) from error
        except IllegalTransitionError as error:
            raise HTTPException(400 if manager.config is None else 409, str(error)) from error
        except RoundEndedError as error:
            raise HTTPException(409, str(error)) from error

    waiting: dict[int | str, dict[str, Any]] = {202: {"description": "No verdict yet", "model": WaitingAnswer}}

    @router.post(
        "/validate",
        response_model=ValidateAnswer,
        responses={
            **errors,
            **waiting,
            429: {"description": "Too many nonces wait to be validated, of all submitters or of this one"},
        },
    )
    async def validate(
        request: Request, body: ProofBody, wait: Literal["true", "false"] = "true"
    ) -> ValidateAnswer | Response:
        """Recompute the distances of a proof batch, and judge it if it has distances.

        With wait=false the answer comes at once: its Location has the verdict later.
        """
        submitter = "" if request.client is None else request.client.host
        job = enqueued(body, submitter, keep=wait == "false")
        if wait == "false":
            return _waiting(job, {"Location": f"{POC_PREFIX}/validate/{job.id}"})
        try:
            # Shielded: the verdict goes to the callback even if this client does not wait for it.
            return _answer(await asyncio.shield(asyncio.wrap_future(job.future)))
        except Exception as error:
            raise _refusal(error) from error

    @router.get(
        "/validate/{job_id}",
        response_model=ValidateAnswer,
        responses={
            **waiting,
            404: {"description": "There is no such job, or not any more"},
            409: {"description": "The round ended before there was a verdict"},
            503: errors[503],
        },
    )
    def validated(job_id: str) -> ValidateAnswer | Response:
        """The verdict on a batch that was posted with wait=false."""
        job = node.worker.queue.get(job_id)
        if job is None:
            raise HTTPException(404, f"id must be of a batch posted with wait=false and kept still, got {job_id!r}")
        if job.error is not None:
            raise _refusal(job.error)
        return _waiting(job) if job.verdict is None else _answer(job.verdict)

    @router.get("/status")
    def status() -> dict[str, Any]:
        """State and progress of the round."""
        return node.status()

    @router.post("/stop", responses=errors)
    def stop() -> PhaseAnswer:
        """End the round."""
        return changed(manager.stop_round)

    return router


def _waiting(job: ValidationJob, headers: dict[str, str] | None = None) -> Response:
    begun = job.started is not None
    answer = WaitingAnswer(
        status="RUNNING" if begun else "QUEUED", id=job.id, nonces_done=job.nonces_done, nonces=job.nonces
    )
    return JSONResponse(answer.model_dump(), 202, headers)


def _refusal(error: Exception) -> HTTPException:
    """What became of a batch that has no verdict."""
    if isinstance(error, (ValueError, IllegalTransitionError, RoundEndedError)):
        return HTTPException(409, str(error))
    return HTTPException(503, f"the batch could not be computed: {error}", {"Retry-After": str(_BUSY_SECONDS)})


def _answer(verdict: ValidatedBatch) -> ValidateAnswer:
    return ValidateAnswer(
        status="OK",
        nonces=verdict.nonces,
        distances=verdict.dist,
        computed_distances=verdict.dist,
        valid=[distance < verdict.r_target for distance in verdict.dist],
        fraud_detected=verdict.fraud_detected,
        n_invalid=verdict.n_invalid,
        probability_honest=verdict.probability_honest,
    )


def operation_router(node: Node) -> APIRouter:
    """/health and /metrics."""
    router = APIRouter(tags=["operation"])

    @router.get("/health", responses={503: {"description": "Something makes no progress"}})
    def health() -> JSONResponse:
        """Whether inference and proofs make progress."""
        troubles = node.troubles()
        content = {"status": "unhealthy" if troubles else "ok", "state": node.manager.state.value, "reasons": troubles}
        return JSONResponse(content, 503 if troubles else 200)

    @router.get("/metrics")
    def metrics() -> Response:
        """All metrics in Prometheus' text format."""
        return Response(node.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def handle_invalid_bodies(app: FastAPI) -> None:
    """Answer bodies that do not fit their model with 422, whatever they hold: also what JSON cannot say back.

    Users' routes keep the handler that ``app`` has.
    """
    users: Any = app.exception_handlers[RequestValidationError]

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.url.path.startswith(USER_PREFIX):
            answer: Response = await users(request, error)
            return answer
        details = [
            {"loc": list(detail["loc"]), "msg": detail["msg"], "type": detail["type"], "input": _shown(detail["input"])}
            for detail in error.errors()[:20]
        ]
        return JSONResponse({"detail": details}, 422)


def _shown(value: object) -> object:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = ascii(value) if not isinstance(value, int) else "an int beyond 64 bits"
    return text if len(text) <= 200 else f"{text[:200]}..."
