"""Handlers of the OpenAI routes: transformers' own, with checks in front and OpenAI's error objects behind."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseGenerateManager, CBStreamer, GenerationState, _StreamError

from ...service.errors import AdmissionError
from .admission import ENGINE_FAILED, engine_unavailable, no_such_model
from .bodies import ChatBody, CompletionBody, ResponseBody, check_encodable, cleaned
from .inference import Inference

logger = logging.getLogger("poc_kernels")


def handlers(inference: Inference) -> dict[str, Any]:
    """Make the handlers of ``inference``, by the names that transformers' ``build_server`` gives its arguments."""
    for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler):
        logging.getLogger(handler.__module__).setLevel(logging.ERROR)  # it warns of every request
    manager = ModelManager(device="cpu", model_timeout=-1)  # it loads no model: the handlers have theirs
    return {
        "model_manager": manager,
        "chat_handler": _Chat(inference, manager),
        "completion_handler": _Completion(inference, manager),
        "response_handler": _Response(inference, manager),
        "generation_state": _State(inference, "max_tokens"),
    }


class _BatchingGenerator(BaseGenerateManager):
    """Generates for the handlers, by `Inference.submit`.

    It replaces transformers' manager, which listens for outputs only after it has submitted the request: one that ended
    in its first step was never heard of.
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
        manager: Any = self  # the streamer calls only its cancel_request
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
        """End a request whose client is gone: `CBStreamer` calls this."""
        self._inference.cancel(request_id)

    def stop(self) -> None:
        """Do nothing: `Inference` stops continuous batching."""


class _State(GenerationState):
    """Has every request served by the continuous batching of an `Inference`."""

    def __init__(self, inference: Inference, param: str) -> None:
        super().__init__(continuous_batching=True)
        self._generator = _BatchingGenerator(inference, param)

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self._generator


class _CheckedHandler:
    """Guards a handler of transformers: only what it can serve reaches it, and only OpenAI's errors leave it."""

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
            raise no_such_model(model)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self._inference.name, self._inference.model, self._inference.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *_: Any, **__: Any) -> Any:
        return self._inference.generation_config(body.get(self._param))


class _Chat(_CheckedHandler, ChatCompletionHandler):  # type: ignore[misc]
    _body = ChatBody

    def _prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        # The newer name, which the handler refuses before transformers 5.23.
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        return body


class _Completion(_CheckedHandler, CompletionHandler):  # type: ignore[misc]
    _body = CompletionBody


class _Response(_CheckedHandler, ResponseHandler):  # type: ignore[misc]
    _body = ResponseBody
    _param = "max_output_tokens"

    def _prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        body.setdefault("stream", False)  # OpenAI's default; transformers' is True
        return body


_ERROR_EVENT = 'data: {"error": '


async def _with_openai_errors(events: Any, request_id: str) -> AsyncIterator[str]:
    """Pass a handler's server-sent events on; a stream that fails ends with an escaped error object, no internals."""
    failure = f"data: {json.dumps(AdmissionError(500, ENGINE_FAILED, code='engine_failed').body())}\n\n"
    try:
        async for part in events:
            # No chunk begins like an error event, and none has an empty line within.
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
