"""The app of the OpenAI routes."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving import server

from ...service.errors import AdmissionError
from .admission import no_such_model
from .compat import required_arguments
from .handlers import handlers
from .inference import Inference

_REQUEST_ID = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128
_KEPT_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/openapi.json")


def build(inference: Inference) -> FastAPI:
    """Build an app with POST /v1/chat/completions, /v1/completions, /v1/responses and GET /v1/models."""
    app: FastAPI = server.build_server(**required_arguments(server.build_server, handlers(inference)))
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in _KEPT_ROUTES]
    app.user_middleware.clear()
    app.add_middleware(_RequestIds)
    _add_models(app, inference.name)
    _add_error_handlers(app)
    return app


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

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if not request.url.path.startswith("/v1/"):
            return await request_validation_exception_handler(request, error)
        details = error.errors()[0]
        return await refused(
            request, AdmissionError(400, f"the body must be a JSON object, sent as application/json: {details['msg']}")
        )
