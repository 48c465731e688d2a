"""The PoC routes, under /api/v1/pow, and /health and /metrics.

Nothing long runs on the event loop: bodies are read into their models, and large answers written, in threads.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import logging
import math
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from ..protocol import FORMS, IllegalTransitionError, PoCState, RoundEndedError
from .clients import client_at
from .gate import POC_PREFIX, body_done
from .queue import QueueFullError, ValidationJob
from .receivers import masked_urls
from .round_body import RoundBody
from .round_service import RoundService

logger = logging.getLogger("poc_kernels")

WIRES = {name: wire for name, entry in FORMS.items() if (wire := entry.load_wire()) is not None}
"""How each proof form is told in HTTP: a module with ProofBody and ValidateAnswer."""

_Result = TypeVar("_Result")

_BUSY_SECONDS = 5
_MAX_DETAILS = 20
_MAX_SHOWN = 200
_MAX_SHOWN_BODY = 65536


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
    503: {"description": "The server is shutting down, or the batch could not be computed"},
}
_BODY_ERRORS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    422: {
        "description": "The body is no JSON, or of wrong types",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}},
    },
}
_WAITING: dict[int | str, dict[str, Any]] = {202: {"description": "No verdict yet", "model": WaitingAnswer}}


# ---- bodies ----


class _Bodies:
    """Reads requests' bodies, one at a time in a thread of its own.

    Parsed, a body takes a hundred times its bytes; and other threads are left to routes that have none.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pow-body")

    async def read(self, request: Request, model: type[BaseModel], then: Callable[[Any], _Result]) -> _Result:
        """Return what ``then`` makes of the body as ``model``. The body is kept no longer than that takes."""
        body = b"".join([part async for part in request.stream()])
        content_type = request.headers.get("content-type", "")
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._thread, lambda: then(_parse(model, body, content_type)))
        body_done(request.scope)
        return result


def _parse(model: type[BaseModel], body: bytes, content_type: str) -> BaseModel:
    """Return the body as ``model``. What is taken, and errors, are FastAPI's; JSON may lack its content type."""
    if not body:
        raise _invalid(("body",), "missing", "Field required", None)
    header = email.message.Message()
    header["content-type"] = content_type.strip() or "application/json"
    is_json = header.get_content_maintype() == "application" and (
        header.get_content_subtype() == "json" or header.get_content_subtype().endswith("+json")
    )
    try:
        content: Any = _loads(body) if is_json else body
    except json.JSONDecodeError as error:
        raise _invalid(("body", error.pos), "json_invalid", "JSON decode error", {}) from error
    except Exception as error:  # too deep, too long a number, no text: whatever it holds
        raise HTTPException(400, "There was an error parsing the body") from error
    try:
        return model.model_validate(content, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        # With the input, as FastAPI has it, unless that would take long to show.
        details = error.errors(include_url=False, include_input=len(body) <= _MAX_SHOWN_BODY)[:_MAX_DETAILS]
        raise RequestValidationError(
            [{"input": None, **detail, "loc": ("body", *detail["loc"])} for detail in details]
        ) from error


def _loads(body: bytes) -> Any:
    try:
        return from_json(body, cache_strings="none")  # a quarter of the time of json.loads, which takes more
    except ValueError:
        return json.loads(body)


def _invalid(loc: tuple[Any, ...], kind: str, message: str, value: object) -> RequestValidationError:
    return RequestValidationError([{"loc": loc, "type": kind, "msg": message, "input": value}])


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a route that takes ``model``."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
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
    text = masked_urls(ascii(value)) if not isinstance(value, int) else "an int beyond 64 bits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _PoCRoute(APIRoute):
    """A route whose errors read the same whatever handlers of errors the app has in which it is served."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answering(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return await run_in_threadpool(_described, error)  # an input can be as large as the body
            except HTTPException as error:
                return await http_exception_handler(request, error)
            except Exception:
                logger.exception("a PoC route failed")
                return PlainTextResponse("Internal Server Error", 500)

        return answering


def document_bodies(app: FastAPI) -> None:
    """Add the models of bodies, which the PoC routes read themselves, to the schemas that ``app`` documents."""
    make_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        documentation = make_openapi()
        for model in (RoundBody, *(wire.ProofBody for wire in WIRES.values())):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
                documentation["components"]["schemas"].setdefault(name, part)
        return documentation

    app.openapi = openapi  # type: ignore[method-assign]


# ---- rounds ----


def poc_router(service: RoundService) -> APIRouter:
    """Make the routes of a node's rounds."""
    router = APIRouter(prefix=POC_PREFIX, tags=["pow"], route_class=_PoCRoute)
    manager = service.manager
    wire = WIRES[manager.form(None).name]

    def changed(change: Callable[[], None]) -> Response:
        if service.stopping:
            raise _shutting_down()
        try:
            change()
        except (ValueError, TypeError) as error:
            raise _bad_value(error) from error
        except IllegalTransitionError as error:
            raise _not_allowed(error) from error
        return _json({"status": "OK", "pow_status": service.status()})

    def _not_allowed(error: Exception) -> HTTPException:
        return HTTPException(400 if manager.config is None else 409, str(error))

    bodies = _Bodies()

    async def begun(request: Request, state: PoCState) -> Response:
        def begin(body: RoundBody) -> Response:
            return changed(lambda: service.begin(body.config(), state, body.ignored()))

        return await bodies.read(request, RoundBody, begin)

    phase: dict[str, Any] = {"response_model": PhaseAnswer, "responses": _ERRORS}
    begin: dict[str, Any] = {**phase, "responses": _BODY_ERRORS, "openapi_extra": _takes(RoundBody)}

    @router.post("/init", **begin)
    async def init(request: Request) -> Response:
        """Begin a round; no phase runs yet."""
        return await begun(request, PoCState.IDLE)

    @router.post("/init/generate", **begin)
    async def init_generate(request: Request) -> Response:
        """Begin a round and look for nonces in the background. Users get 503 meanwhile."""
        return await begun(request, PoCState.GENERATING)

    @router.post("/init/validate", **begin)
    async def init_validate(request: Request) -> Response:
        """Begin a round and validate the proofs that come. Users are served meanwhile."""
        return await begun(request, PoCState.VALIDATING)

    @router.post("/phase/generate", **phase)
    def phase_generate() -> Response:
        """Look for nonces in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.GENERATING))

    @router.post("/phase/validate", **phase)
    def phase_validate() -> Response:
        """Validate proofs in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.VALIDATING))

    def enqueued(body: Any, submitter: str, keep: bool) -> ValidationJob:
        if service.stopping:
            raise _shutting_down()
        try:
            return service.enqueue(body.proof(), submitter, keep)
        except (ValueError, TypeError) as error:
            raise _bad_value(error) from error
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
            **_BODY_ERRORS,
            **_WAITING,
            429: {"description": "Too many nonces or batches wait to be validated, of all submitters or of this one"},
        },
        openapi_extra=_takes(wire.ProofBody),
    )
    async def validate(request: Request, wait: Literal["true", "false"] = "true") -> Response:
        """Recompute the distances of a proof batch, and judge it if it has distances.

        The batch is taken at once: who leaves before the answer gets the verdict at the callback_url. With wait=false
        the answer comes at once: its Location has the verdict later. A batch without nonces is judged at once.
        """
        submitter = "" if request.client is None else client_at(request.client.host)
        job = await bodies.read(request, wire.ProofBody, lambda body: enqueued(body, submitter, wait == "false"))
        if job.keep:
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


# What an error says reaches a client only if it is ours: the text of others can hold paths, sizes and more. The log has
# it.


def _bad_value(error: Exception) -> HTTPException:
    """Return the answer to a value that a check does not take; raise an error that is none of a check."""
    if type(error) not in (ValueError, TypeError):  # what libraries raise is often derived from them
        raise error
    return HTTPException(400, str(error))


def _shutting_down() -> HTTPException:
    return HTTPException(503, "the server is shutting down")


def _refusal(error: Exception) -> HTTPException:
    """Return the answer to who waits for a batch that has no verdict."""
    if isinstance(error, (IllegalTransitionError, RoundEndedError)):
        return HTTPException(409, str(error))
    text = f"the batch could not be computed: {type(error).__name__}"
    if isinstance(error, ValueError):  # of the batch: it would fail again
        return HTTPException(409, text)
    return HTTPException(503, text, {"Retry-After": str(_BUSY_SECONDS)})


# ---- operation ----


def operation_router(service: RoundService, others: Callable[[], bytes] = lambda: b"") -> APIRouter:
    """Make /health and /metrics.

    Args:
        others: gives further metrics, in Prometheus' text format.
    """
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
        return Response(others() + service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
