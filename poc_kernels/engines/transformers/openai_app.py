"""The OpenAI routes: transformers' own handlers, with checks in front and OpenAI's error objects behind."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving import server
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseGenerateManager, CBStreamer, GenerationState, _StreamError

from ...service.errors import AdmissionError
from .admission import ENGINE_FAILED, engine_unavailable
from .bodies import ChatBody, CompletionBody, ResponseBody, check_encodable, cleaned

if TYPE_CHECKING:
    from .inference import Inference

logger = logging.getLogger("poc_kernels")

REQUEST_ID = "x-request-id"
_LONGEST_REQUEST_ID = 128
_KEPT = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/openapi.json")


class _Generation(BaseGenerateManager):
    """What the handlers generate with.

    In place of transformers' manager, which hands a request to CB before it listens for outputs: one that ended in its
    first step was never heard of.
    """

    def __init__(self, inference: Inference, param: str) -> None:
        self._inference = inference
        self._param = param

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], CBStreamer]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        tokenizer = processor._tokenizer
        manager: Any = self  # a streamer only cancels there
        streamer = CBStreamer(manager, request_id, tokenizer, loop, queue, response_parser=response_parser)

        def on_output(output: Any) -> None:
            try:
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(_StreamError(output.error))
                elif output.is_finished():
                    streamer.end()
            except Exception:
                logger.exception("an output cannot be told", extra={"request_id": request_id})
                queue.put_nowait(_StreamError(ENGINE_FAILED))
                streamer.cancel()

        self._inference.submit(request_id, inputs["input_ids"], gen_config, True, on_output, self._param)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        prompt = inputs["input_ids"]
        finished = asyncio.get_running_loop().create_future()

        def on_output(output: Any) -> None:
            if not finished.done():
                finished.set_result(output)

        self._inference.submit(request_id, prompt, gen_config, False, on_output, self._param)
        try:
            output = await finished
        except asyncio.CancelledError:
            self.cancel_request(request_id)
            raise
        if output.error is not None:
            raise engine_unavailable(output.error)
        return processor.decode(output.generated_tokens, skip_special_tokens=True), len(prompt), output.generated_tokens

    def cancel_request(self, request_id: str) -> None:
        """`CBStreamer` calls this when its client is gone."""
        self._inference.cancel(request_id)

    def stop(self) -> None:
        """`Inference` stops CB."""


class _State(GenerationState):
    """Continuous batching for all, of an `Inference`."""

    def __init__(self, inference: Inference, param: str) -> None:
        super().__init__(continuous_batching=True)
        self._generation = _Generation(inference, param)

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self._generation


class _OneModel(ModelManager):
    """The one loaded model. It is never fetched, reloaded or unloaded."""

    def __init__(self, inference: Inference) -> None:
        super().__init__(device="cpu", model_timeout=-1)  # it places no model anywhere
        self._pair = inference.model, inference.tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._pair

    def shutdown(self) -> None:
        """The model outlives the app."""


class _Checked:
    """Goes before a handler of transformers: only what it can serve reaches it, only OpenAI's errors leave it."""

    _body: type[BaseModel]
    _param = "max_tokens"
    _valid_params_class: Any

    def __init__(self, inference: Inference, manager: ModelManager) -> None:
        super().__init__(model_manager=manager, generation_state=_State(inference, self._param))  # type: ignore[call-arg]
        self._inference = inference

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        try:
            check_encodable(body)
            self._check_names(body)
            body = cleaned(body, self._body)
            response: Response = await super().handle_request(self._prepared(body), request_id)  # type: ignore[misc]
        except AdmissionError:
            raise
        except HTTPException as error:
            raise AdmissionError(400 if error.status_code == 422 else error.status_code, str(error.detail)) from error
        except TemplateError as error:
            raise AdmissionError(400, f"the chat template refuses the messages: {error}", "messages") from error
        except Exception as error:
            logger.exception("request failed", extra={"request_id": request_id})
            raise AdmissionError(500, "the server failed while it served this request") from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_openai_errors(response.body_iterator, request_id)
        return response

    def _prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def _check_names(self, body: dict[str, Any]) -> None:
        unknown = sorted(body.keys() - self._valid_params_class.__mutable_keys__)
        if unknown:
            raise AdmissionError(400, f"unknown fields in the body: {', '.join(unknown)}", unknown[0])
        model = body.get("model")
        if isinstance(model, str) and model != self._inference.name:
            raise _no_such_model(model)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self._inference.name, self._inference.model, self._inference.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *_: Any, **__: Any) -> Any:
        return self._inference.generation_config(body.get(self._param))


class _Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    _body = ChatBody

    def _prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        # Versions before 5.23 do not know the newer name.
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        return body


class _Completion(_Checked, CompletionHandler):  # type: ignore[misc]
    _body = CompletionBody


class _Response(_Checked, ResponseHandler):  # type: ignore[misc]
    _body = ResponseBody
    _param = "max_output_tokens"

    def _prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        body.setdefault("stream", False)  # OpenAI's default; transformers' is True
        return body


class _RequestIds:
    """Gives every request an id of our own, since CB dies of one that is in flight twice; the client gets its own back.

    In place of transformers' middleware, which takes the client's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = own
        theirs = Headers(scope=scope).get(REQUEST_ID, "")
        usable = 0 < len(theirs) <= _LONGEST_REQUEST_ID and theirs.isascii() and theirs.isprintable()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = theirs if usable else own
            await send(message)

        await self._app(scope, receive, send_with_id)


def build(inference: Inference, lifespan: Callable[[FastAPI], Any] | None) -> FastAPI:
    """The app of ``inference``: see `Inference.build_app`."""
    manager = _OneModel(inference)
    handlers: dict[str, Any] = {
        "model_manager": manager,
        "chat_handler": _Chat(inference, manager),
        "completion_handler": _Completion(inference, manager),
        "response_handler": _Response(inference, manager),
        "generation_state": _State(inference, "max_tokens"),
    }
    # Versions differ in their other handlers, whose routes go.
    parameters = inspect.signature(server.build_server).parameters.values()
    wanted: dict[str, Any] = {each.name: handlers.get(each.name) for each in parameters if each.default is each.empty}
    app: FastAPI = server.build_server(**wanted)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in _KEPT]
    app.user_middleware.clear()
    app.add_middleware(_RequestIds)
    if lifespan is not None:
        app.router.lifespan_context = lifespan
    for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler):
        logging.getLogger(handler.__module__).setLevel(logging.ERROR)  # it warns of every request
    _add_models(app, inference.name)
    _add_error_handlers(app)
    return app


def _add_models(app: FastAPI, name: str) -> None:
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "poc_kernels"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    def model(model: str) -> dict[str, Any]:
        if model != name:
            raise _no_such_model(model)
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


def _no_such_model(model: str) -> AdmissionError:
    return AdmissionError(404, f"the model {model!r} does not exist here", "model", "model_not_found")


_ERROR_EVENT = 'data: {"error": '


async def _with_openai_errors(events: Any, request_id: str) -> AsyncIterator[str]:
    """The server-sent events of a handler; one that fails ends with an error object, escaped and with no internals."""
    failure = f"data: {json.dumps(AdmissionError(500, ENGINE_FAILED, code='engine_failed').body())}\n\n"
    try:
        async for part in events:
            # No chunk begins like this, and none has an empty line within.
            head, error, _ = ("\n\n" + part).partition("\n\n" + _ERROR_EVENT)
            if not error:
                yield part
                continue
            yield head[2:] + ("\n\n" if head[2:] else "") + failure
            return
    except Exception:
        logger.exception("stream failed", extra={"request_id": request_id})
        yield failure
    finally:
        await events.aclose()
