"""The app of the OpenAI routes."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...service.errors import AdmissionError
from .admission import no_such_model
from .handlers import Handler, handlers
from .inference import Inference

_REQUEST_ID = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128


def build(inference: Inference) -> FastAPI:
    """Build an app with POST /v1/chat/completions, /v1/completions, /v1/responses and GET /v1/models."""
    app = FastAPI(docs_url=None, redoc_url=None)
    app.add_middleware(_RequestIds)
    for path, handler in handlers(inference).items():
        _add_route(app, path, handler)
    _add_models(app, inference.name)
    _add_error_handlers(app)
    return app


def _add_route(app: FastAPI, path: str, handler: Handler[Any]) -> None:
    name = path.removeprefix("/v1/").replace("/", "_")
    body = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}

    @app.post(path, name=name, operation_id=name, openapi_extra={"requestBody": body})
    async def answer(request: Request) -> Response:
        _check_content_type(request.headers.get("content-type", ""))
        return await handler.handle(request)


def _check_content_type(given: str) -> None:
    """Refuse what a browser sends for any page without asking, as FastAPI does."""
    kind = given.partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise AdmissionError(400, f"the body must be a JSON object, sent as application/json, got {kind[:100]!r}")


class _RequestIds:
    """Gives every request an id of our own, and answers with the client's.

    It replaces transformers' middleware, which takes the client's id: continuous batching dies of an id that is in
    flight twice.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = own
        theirs = Headers(scope=scope).get(_REQUEST_ID, "")
        usable = 0 < len(theirs) <= _MAX_REQUEST_ID_LENGTH and theirs.isascii() and theirs.isprintable()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_REQUEST_ID] = theirs if usable else own
            await send(message)

        await self._app(scope, receive, send_with_id)


def _add_models(app: FastAPI, name: str) -> None:
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "poc_kernels"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    def model(model: str) -> dict[str, Any]:
        if model != name:
            raise no_such_model(model)
        return entry


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(AdmissionError)
    async def refused(_: Request, error: AdmissionError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        if not request.url.path.startswith("/v1/"):
            return await http_exception_handler(request, error)
        refusal = AdmissionError(error.status_code, str(error.detail), headers=error.headers)
        return await refused(request, refusal)
