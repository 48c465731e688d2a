"""What all PoC routes have in common: their errors, and how these and answers are written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic_core import to_json

from ...protocol import IllegalTransitionError, NoVerdictError, RoundEndedError
from .bodies import described

logger = logging.getLogger("poc_kernels")

_BUSY_SECONDS = 5

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A value that a round does not take, or no round was begun"},
    409: {"description": "The state does not allow it"},
    503: {"description": "The server is shutting down, or the batch could not be computed"},
}
BODY_ERRORS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    422: {
        "description": "The body is no JSON, or of wrong types",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}},
    },
}
TOO_MANY: dict[int | str, dict[str, Any]] = {
    429: {"description": "Too many nonces or batches wait to be validated, of all submitters or of this one"}
}


class PoCRoute(APIRoute):
    """A route whose errors read the same whatever handlers of errors the app has in which it is served."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handler = super().get_route_handler()

        async def answering(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return await run_in_threadpool(described, error)  # an input can be as large as the body
            except HTTPException as error:
                return await http_exception_handler(request, error)
            except Exception:
                logger.exception("a PoC route failed")
                return PlainTextResponse("Internal Server Error", 500)

        return answering


def written(content: object) -> Response:
    """Write what may be long: the status lists up to 100,000 nonces."""
    return Response(to_json(content), media_type="application/json")


# What an error says reaches a client only if it is ours: the text of others can hold paths, sizes and more. The log has
# it.


def bad_value(error: Exception) -> HTTPException:
    """Return the answer to a value that a check does not take; raise an error that is none of a check."""
    if type(error) not in (ValueError, TypeError):  # what libraries raise is often derived from them
        raise error
    return HTTPException(400, str(error))


def shutting_down() -> HTTPException:
    """Return the answer of a server that admits nothing more."""
    return HTTPException(503, "the server is shutting down")


def refusal(error: Exception) -> HTTPException:
    """Return the answer to who waits for a batch that has no verdict."""
    if isinstance(error, (IllegalTransitionError, RoundEndedError)):
        return HTTPException(409, str(error))
    if isinstance(error, NoVerdictError):
        return HTTPException(503, str(error))  # the next try would end so, too
    text = f"the batch could not be computed: {type(error).__name__}"
    if isinstance(error, ValueError):  # of the batch: it would fail again
        return HTTPException(409, text)
    return HTTPException(503, text, {"Retry-After": str(_BUSY_SECONDS)})
