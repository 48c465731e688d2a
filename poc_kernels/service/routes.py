"""The PoC routes, under /api/v1/pow, and /health and /metrics.

Nothing long runs on the event loop: bodies are read into their models, and large answers written, in threads.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from ..protocol import UNSET, IllegalTransitionError, PoCState, RoundEndedError
from ..protocol.distances import wire as distances_wire
from ..protocol.distances.form import DISTANCES
from .gate import POC_PREFIX
from .queue import QueueFullError, ValidationJob
from .round_service import RoundService

WIRES = {DISTANCES.name: distances_wire}
"""How each proof form is told in HTTP: a module with ProofBody and ValidateAnswer."""

_BUSY_SECONDS = 5
_MAX_DETAILS = 20
_MAX_SHOWN = 200
_MAX_PARSED_AGAIN = 65536
"""Bytes of a wrong body up to which its errors are made as FastAPI makes them, with the input: that takes long."""


class RoundBody(BaseModel):
    """Body of /init, /init/generate and /init/validate: a `PoCConfig`; unknown keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

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


class PhaseAnswer(BaseModel):
    """Answer of the routes that change the state."""

    status: str
    pow_status: dict[str, Any]


class WaitingAnswer(BaseModel):
    """Answer of /validate?wait=false, and of /validate/{id} until there is a verdict."""

    status: Literal["QUEUED", "RUNNING"]
    id: str
    nonces_done: int
    nonces: int


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A value that a round does not take, or no round was begun"},
    409: {"description": "The state does not allow it"},
    422: {"description": "The body is no JSON, or of wrong types"},
    503: {"description": "The server is shutting down, or the batch could not be computed"},
}
_WAITING: dict[int | str, dict[str, Any]] = {202: {"description": "No verdict yet", "model": WaitingAnswer}}


# ---- bodies ----


def _body(model: type[BaseModel]) -> Any:
    """Return the dependency that reads a request's body into ``model``, in a thread."""

    async def read(request: Request) -> Any:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return await run_in_threadpool(_parse, model, await request.body(), content_type)

    return Depends(read)


def _parse(model: type[BaseModel], body: bytes, content_type: str) -> BaseModel:
    """Return the body as ``model``; errors are those that FastAPI gives."""
    if not body:
        raise _invalid(("body",), "missing", "Field required", None)
    is_json = content_type == "application/json" or content_type.endswith("+json")
    if is_json:
        try:
            return model.model_validate_json(body)  # holds the interpreter for a fifth of the time of json.loads
        except ValidationError as error:
            if len(body) > _MAX_PARSED_AGAIN:
                raise _mismatch(error, include_input=False) from error
    try:
        content: Any = json.loads(body) if is_json else body
    except json.JSONDecodeError as error:
        raise _invalid(("body", error.pos), "json_invalid", "JSON decode error", {}) from error
    except Exception as error:  # too deep, too long a number, no text: whatever it holds
        raise HTTPException(400, "There was an error parsing the body") from error
    try:
        return model.model_validate(content, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        raise _mismatch(error, include_input=True) from error


def _mismatch(error: ValidationError, include_input: bool) -> RequestValidationError:
    details = error.errors(include_url=False, include_input=include_input)[:_MAX_DETAILS]
    return RequestValidationError([{"input": None, **detail, "loc": ("body", *detail["loc"])} for detail in details])


def _invalid(loc: tuple[Any, ...], kind: str, message: str, value: object) -> RequestValidationError:
    return RequestValidationError([{"loc": loc, "type": kind, "msg": message, "input": value}])


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a route that takes ``model``."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _described(error: RequestValidationError) -> Response:
    details = [
        {"loc": list(detail["loc"]), "msg": detail["msg"], "type": detail["type"], "input": _shown(detail["input"])}
        for detail in error.errors()[:_MAX_DETAILS]
    ]
    return JSONResponse({"detail": details}, 422)


def _shown(value: object) -> object:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = ascii(value) if not isinstance(value, int) else "an int beyond 64 bits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def handle_invalid_bodies(app: FastAPI) -> None:
    """Answer bodies of PoC routes that do not fit their model with 422, whatever they hold: also what JSON cannot say.

    Other routes keep the handler that ``app`` has.
    """
    others: Callable[..., Awaitable[Response]] = app.exception_handlers[RequestValidationError]  # type: ignore[assignment]

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if not request.url.path.startswith(POC_PREFIX):
            return await others(request, error)
        return await run_in_threadpool(_described, error)  # an input can be as large as the body


# ---- rounds ----


def poc_router(service: RoundService) -> APIRouter:
    """Make the routes of a node's rounds."""
    router = APIRouter(prefix=POC_PREFIX, tags=["pow"])
    manager, wire = service.manager, WIRES[service.form.name]

    def changed(change: Callable[[], None]) -> Response:
        if service.stopping:
            raise HTTPException(503, "the server is shutting down")
        try:
            change()
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except IllegalTransitionError as error:
            raise _not_allowed(error) from error
        return _json({"status": "OK", "pow_status": service.status()})

    def _not_allowed(error: Exception) -> HTTPException:
        return HTTPException(400 if manager.config is None else 409, str(error))

    def begun(body: RoundBody, state: PoCState) -> Response:
        return changed(lambda: service.begin(body.model_dump(), state))

    phase: dict[str, Any] = {"response_model": PhaseAnswer, "responses": _ERRORS}
    begin: dict[str, Any] = {**phase, "openapi_extra": _takes(RoundBody)}

    round_body, proof_body = _body(RoundBody), _body(wire.ProofBody)

    @router.post("/init", **begin)
    def init(body: RoundBody = round_body) -> Response:
        """Begin a round; no phase runs yet."""
        return begun(body, PoCState.IDLE)

    @router.post("/init/generate", **begin)
    def init_generate(body: RoundBody = round_body) -> Response:
        """Begin a round and look for nonces in the background. Users get 503 meanwhile."""
        return begun(body, PoCState.GENERATING)

    @router.post("/init/validate", **begin)
    def init_validate(body: RoundBody = round_body) -> Response:
        """Begin a round and validate the proofs that come. Users are served meanwhile."""
        return begun(body, PoCState.VALIDATING)

    @router.post("/phase/generate", **phase)
    def phase_generate() -> Response:
        """Look for nonces in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.GENERATING))

    @router.post("/phase/validate", **phase)
    def phase_validate() -> Response:
        """Validate proofs in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.VALIDATING))

    def enqueued(body: Any, submitter: str, keep: bool) -> ValidationJob:
        try:
            return service.enqueue(body.proof(), submitter, keep)
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_seconds)}) from error
        except IllegalTransitionError as error:
            raise _not_allowed(error) from error
        except RoundEndedError as error:
            raise HTTPException(409, str(error)) from error

    def answered(verdict: Any) -> Response:
        return Response(wire.ValidateAnswer.of(verdict).model_dump_json(), media_type="application/json")

    @router.post(
        "/validate",
        response_model=wire.ValidateAnswer,
        responses={
            **_ERRORS,
            **_WAITING,
            429: {"description": "Too many nonces wait to be validated, of all submitters or of this one"},
        },
        openapi_extra=_takes(wire.ProofBody),
    )
    async def validate(request: Request, body: Any = proof_body, wait: Literal["true", "false"] = "true") -> Response:
        """Recompute the distances of a proof batch, and judge it if it has distances.

        With wait=false the answer comes at once: its Location has the verdict later.
        """
        submitter = "" if request.client is None else request.client.host
        job = await run_in_threadpool(enqueued, body, submitter, wait == "false")
        if wait == "false":
            return _waiting(job, {"Location": f"{POC_PREFIX}/validate/{job.id}"})
        try:
            # Shielded: the verdict goes to the callback even if this client does not wait for it.
            verdict = await asyncio.shield(asyncio.wrap_future(job.future))
        except Exception as error:
            raise _refusal(error) from error
        return await run_in_threadpool(answered, verdict)

    @router.get(
        "/validate/{job_id}",
        response_model=wire.ValidateAnswer,
        responses={
            **_WAITING,
            404: {"description": "There is no such job, or not any more"},
            409: {"description": "The round ended before there was a verdict"},
            503: _ERRORS[503],
        },
    )
    def validated(job_id: str) -> Response:
        """Return the verdict on a batch that was posted with wait=false."""
        job = service.worker.queue.get(job_id)
        if job is None:
            raise HTTPException(404, f"id must be of a batch posted with wait=false and kept still, got {job_id!r}")
        if job.error is not None:
            raise _refusal(job.error)
        return _waiting(job) if job.verdict is None else answered(job.verdict)

    @router.get("/status", response_model=dict[str, Any])
    def status() -> Response:
        """Return state and progress of the round."""
        return _json(service.status())

    @router.post("/stop", **phase)
    def stop() -> Response:
        """End the round."""
        return changed(manager.stop_round)

    return router


def _json(content: object) -> Response:
    """Write what may be long: the status lists up to 100,000 nonces."""
    return Response(to_json(content), media_type="application/json")


def _waiting(job: ValidationJob, headers: dict[str, str] | None = None) -> Response:
    begun = job.started is not None
    answer = WaitingAnswer(
        status="RUNNING" if begun else "QUEUED", id=job.id, nonces_done=job.nonces_done, nonces=job.nonces
    )
    return JSONResponse(answer.model_dump(), 202, headers)


def _refusal(error: Exception) -> HTTPException:
    """Return the answer to who waits for a batch that has no verdict."""
    if isinstance(error, (ValueError, IllegalTransitionError, RoundEndedError)):
        return HTTPException(409, str(error))
    return HTTPException(503, f"the batch could not be computed: {error}", {"Retry-After": str(_BUSY_SECONDS)})


# ---- operation ----


def operation_router(service: RoundService) -> APIRouter:
    """Make /health and /metrics."""
    router = APIRouter(tags=["operation"])

    @router.get("/health", responses={503: {"description": "Something makes no progress"}})
    def health() -> JSONResponse:
        """Say whether inference and proofs make progress."""
        troubles = service.troubles()
        content = {
            "status": "unhealthy" if troubles else "ok",
            "state": service.manager.state.value,
            "reasons": troubles,
        }
        return JSONResponse(content, 503 if troubles else 200)

    @router.get("/metrics")
    def metrics() -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
