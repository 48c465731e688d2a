"""The bodies of the PoC routes: how they are read, described where they are wrong, and documented.

Nothing of them happens on the event loop: they are read into their models in a thread.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from ..clients import client_of
from ..fair import FairThreads
from ..gate import body_done
from ..receivers import masked_urls

_Result = TypeVar("_Result")

_MAX_DETAILS = 20
MAX_SHOWN = 200
"""Characters of what a client sent that an answer repeats at most."""
_MAX_SHOWN_BODY = 65536

ModelOf = Callable[[Any], type[BaseModel]]
"""Returns the model by which a body is read, given its JSON."""


class Bodies:
    """Reads requests' bodies, one at a time in a thread of its own, in which clients take turns.

    Parsed, a body takes a hundred times its bytes, and up to some seconds; other threads are left to routes that have
    none.
    """

    def __init__(self) -> None:
        self._threads = FairThreads("pow-body")

    async def read(self, request: Request, model_of: ModelOf, then: Callable[[Any], _Result]) -> _Result:
        """Return what ``then`` makes of the body as its model. The body is kept no longer than that takes."""
        body = b"".join([part async for part in request.stream()])
        content_type = request.headers.get("content-type", "")
        read = self._threads.submit(client_of(request.scope), lambda: then(_parse(model_of, body, content_type)))
        result = await asyncio.wrap_future(read)
        body_done(request.scope)
        return result


def always(model: type[BaseModel]) -> ModelOf:
    """Return what reads every body as ``model``."""
    return lambda content: model


def _parse(model_of: ModelOf, body: bytes, content_type: str) -> BaseModel:
    """Return the body as its model. What is taken, and errors, are FastAPI's; JSON may lack its content type."""
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
    except Exception as error:  # whatever it holds
        raise HTTPException(400, f"the body must be JSON, got one {_fault(error)}") from error
    try:
        return model_of(content).model_validate(content, from_attributes=True)  # as FastAPI does
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


def _fault(error: Exception) -> str:
    """Say why a body cannot be read that is not known to be no JSON."""
    if isinstance(error, RecursionError):
        return "that is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"that is no text in UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, ValueError):
        return "with a number of too many digits"
    return f"that cannot be read: {type(error).__name__}"


def _invalid(loc: tuple[Any, ...], kind: str, message: str, value: object) -> RequestValidationError:
    return RequestValidationError([{"loc": loc, "type": kind, "msg": message, "input": value}])


# ---- what is wrong ----


def described(error: RequestValidationError) -> Response:
    """Return the answer to a body that is none of its model."""
    details = [
        {
            "loc": [part if isinstance(part, int) else _cut(part) for part in detail["loc"]],
            "msg": detail["msg"],
            "type": detail["type"],
            "input": _shown(detail["input"]),
        }
        for detail in error.errors()[:_MAX_DETAILS]
    ]
    return JSONResponse({"detail": details}, 422)


def _shown(value: object) -> object:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    return _cut(masked_urls(ascii(value)) if not isinstance(value, int) else "an int beyond 64 bits")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# ---- what is documented ----


def takes(*models: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a route that takes one of ``models``."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI, models: Iterable[type[BaseModel]]) -> None:
    """Add the models of bodies, which the PoC routes read themselves, to the schemas that ``app`` documents."""
    make_openapi, models = app.openapi, tuple(models)

    def openapi() -> dict[str, Any]:
        documentation = make_openapi()
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
                documentation["components"]["schemas"].setdefault(name, part)
        return documentation

    app.openapi = openapi  # type: ignore[method-assign]
