"""Handlers of the OpenAI routes: a body is checked and tokenized in a worker thread, generated, and answered."""

from __future__ import annotations

import asyncio
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from ...service.clients import client_of
from ...service.errors import AdmissionError
from ...service.fair import FairThreads
from .admission import check_prompt, no_such_model
from .answers import Answer, ChatAnswer, CompletionAnswer, ResponseAnswer, TokenTexts
from .bodies import Body, ChatBody, CompletionBody, ResponseBody
from .compat import response_parser
from .fields import parse
from .generation import Asked, Generation
from .inference import Inference
from .prompts import Prompts

logger = logging.getLogger("poc_kernels")

_LARGE_BODY = 2**16
"""Bytes from which a body is large: it may take seconds to tokenize, so large ones do not stand in the others' way."""
_LARGE_AT_ONCE, _OTHERS_AT_ONCE = 1, 4


_B = TypeVar("_B", bound=Body)
_Result = TypeVar("_Result")


class Preparation:
    """Runs what a request takes before it is generated, in a bounded number of threads in which clients take turns."""

    def __init__(self) -> None:
        # Not a limiter of asyncio: an app may be called in several event loops, and a limiter wakes only its own.
        self._large = FairThreads("large-body", _LARGE_AT_ONCE)
        self._others = FairThreads("body", _OTHERS_AT_ONCE)

    async def run(self, client: str, function: Callable[[bytes], _Result], content: bytes) -> _Result:
        """Return what ``function`` gives for the body ``content`` of a client."""
        threads = self._large if len(content) >= _LARGE_BODY else self._others
        return await asyncio.wrap_future(threads.submit(client, functools.partial(function, content)))


class Handler(ABC, Generic[_B]):
    """Handles the requests of one route.

    Args:
        inference: the model that is served.
        prompts: makes prompts for it.
        texts: the text of its tokens.
        preparation: of the requests of all routes.
    """

    body: ClassVar[type[Any]]

    def __init__(self, inference: Inference, prompts: Prompts, texts: TokenTexts, preparation: Preparation) -> None:
        self._inference = inference
        self._prompts = prompts
        self._texts = texts
        self._preparation = preparation

    async def handle(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            AdmissionError: it is refused, or failed.
        """
        request_id = request.state.request_id
        try:
            content = await request.body()
            body, asked = await self._preparation.run(client_of(request.scope), self._prepared, content)
            generation = Generation(self._inference, request_id, asked)
            answer = self._answer((request_id, self._inference.name, body, generation, self._texts))
            generation.begin(bool(body.stream))
            if body.stream:
                return StreamingResponse(answer.events(), media_type="text/event-stream")
            return Response(await answer.whole(), media_type="application/json")
        except AdmissionError:
            raise
        except Exception as error:
            logger.exception("request failed", extra={"request_id": request_id})
            raise AdmissionError(500, "the server failed while it served this request") from error

    def _prepared(self, content: bytes) -> tuple[_B, Asked]:
        body: _B = parse(content, self.body)
        if body.model is not None and body.model != self._inference.name:
            raise no_such_model(body.model)
        vocabulary = self._inference.vocabulary
        for field in ("logit_bias", "stop_token_ids"):
            if any(not 0 <= token < vocabulary for token in getattr(body, field) or ()):
                raise AdmissionError(400, f"{field} has token ids outside [0, {vocabulary})", field)
        prompt, parser = self._prompt(body, self._inference.max_tokens)
        new_tokens, param = body.new_tokens()
        asked = Asked(
            prompt=prompt,
            new_tokens=new_tokens,
            param=param,
            sampling=body.sampling(self._inference.sampling),
            stop=body.stop or (),
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=bool(body.ignore_eos),
            special_tokens=body.skip_special_tokens is False,
            one_tool_call=isinstance(body, (ChatBody, ResponseBody)) and body.parallel_tool_calls is False,
            parser=parser,
        )
        return body, asked

    @abstractmethod
    def _prompt(self, body: _B, max_tokens: int) -> tuple[list[int], Any]:
        """Return the prompt's token ids, and what takes the answer apart."""

    @abstractmethod
    def _answer(self, arguments: tuple[Any, ...]) -> Answer[_B]:
        """Make the answer of `Answer`'s arguments."""


class _Chats(Handler[_B]):
    def _prompt(self, body: Any, max_tokens: int) -> tuple[list[int], Any]:
        prompt, tools = self._prompts.of_chat(body, max_tokens)
        return prompt, response_parser(self._inference.tokenizer, self._inference.model, prompt, tools)


class ChatHandler(_Chats[ChatBody]):
    """Handles POST /v1/chat/completions."""

    body = ChatBody

    def _answer(self, arguments: tuple[Any, ...]) -> Answer[ChatBody]:
        return ChatAnswer(*arguments)


class ResponseHandler(_Chats[ResponseBody]):
    """Handles POST /v1/responses."""

    body = ResponseBody

    def _answer(self, arguments: tuple[Any, ...]) -> Answer[ResponseBody]:
        return ResponseAnswer(*arguments)


class CompletionHandler(Handler[CompletionBody]):
    """Handles POST /v1/completions."""

    body = CompletionBody

    def _prompt(self, body: CompletionBody, max_tokens: int) -> tuple[list[int], Any]:
        prompt = self._prompts.of_completion(body, max_tokens)
        check_prompt(prompt, self._inference.vocabulary, "prompt")
        return prompt, None

    def _answer(self, arguments: tuple[Any, ...]) -> Answer[CompletionBody]:
        return CompletionAnswer(*arguments)


def handlers(inference: Inference) -> dict[str, Handler[Any]]:
    """Make the handlers of a model, by the paths of their routes."""
    shared = (inference, Prompts(inference.tokenizer), TokenTexts(inference.tokenizer), Preparation())
    return {
        "/v1/chat/completions": ChatHandler(*shared),
        "/v1/completions": CompletionHandler(*shared),
        "/v1/responses": ResponseHandler(*shared),
    }
