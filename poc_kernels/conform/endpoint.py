"""The endpoint that is judged: calls of it that end, and what they answer."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from .outcome import FailedError, NoAnswerError, fit

_Model = TypeVar("_Model", bound=BaseModel)

_MAX_BYTES = 2**24
_MAX_SHOWN = 160


def shown(content: bytes) -> str:
    """Return the beginning of what came from the endpoint, fit for a terminal."""
    return fit(content[: 4 * _MAX_SHOWN].decode("utf-8", "replace"), _MAX_SHOWN)


def read(model: type[_Model], content: bytes, what: str) -> _Model:
    """Return JSON from the endpoint as ``model``.

    Raises:
        FailedError: it is not; what is wrong is named.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise FailedError(f"{what}: {place}: {first['msg']}: {shown(content)}") from error


@dataclass(frozen=True)
class Answer:
    """An answer of the endpoint."""

    status: int
    content: bytes
    headers: httpx2.Headers

    def __str__(self) -> str:
        return f"{self.status} {shown(self.content)}"

    def expect(self, *statuses: int) -> Answer:
        """Return the answer if its status is one of those given.

        Raises:
            FailedError: it is another one.
        """
        if self.status not in statuses:
            raise FailedError(f"expected {' or '.join(map(str, statuses))}, got {self}")
        return self

    def read(self, model: type[_Model], status: int = 200) -> _Model:
        """Return the body of an answer with that status as ``model``, or raise `FailedError`."""
        return read(model, self.expect(status).content, f"answer {self.status}")


class Endpoint:
    """Calls an endpoint.

    Args:
        url: its base.
        prefix: of the PoC routes.
        token: bearer token, or None.
        timeout_seconds: for an answer.
        ends: time of time.monotonic() after which nothing is called.

    Raises:
        ValueError: the url has a host that no connection can be made to.
    """

    def __init__(self, url: str, prefix: str, token: str | None, timeout_seconds: float, ends: float) -> None:
        headers = {} if token is None else {b"authorization": b"Bearer " + token.strip().encode()}
        # Time-outs of a client are between bytes; an answer of which a byte comes now and then has to end as well.
        try:
            self._http = httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=None)
        except httpx2.InvalidURL as error:
            raise ValueError(f"url must have a host that can be connected to, got {url!r}") from error
        self._loop = asyncio.new_event_loop()
        self._prefix, self._timeout, self._ends = prefix, timeout_seconds, ends

    def close(self) -> None:
        """Close the connections."""
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()

    def extend(self, seconds: float) -> None:
        """Allow calls for at least that many seconds from now on."""
        self._ends = max(self._ends, time.monotonic() + seconds)

    def seconds_left(self) -> float:
        """Return how long to wait now for an answer or a callback.

        Raises:
            NoAnswerError: the time for everything is over.
        """
        left = min(self._timeout, self._ends - time.monotonic())
        if left <= 0:
            raise NoAnswerError("no time left for more calls")
        return left

    def get(self, path: str) -> Answer:
        """Call a PoC route, or raise `NoAnswerError`."""
        return self._call("GET", self._prefix + path)

    def post(self, path: str, body: Any = None) -> Answer:
        """Post a body to a PoC route: bytes as they are, None for none, else as JSON. Raises `NoAnswerError`."""
        return self._call("POST", self._prefix + path, body)

    def get_root(self, path: str) -> Answer:
        """Call a route that is none of PoC, or raise `NoAnswerError`."""
        return self._call("GET", path)

    def _call(self, method: str, path: str, body: Any = None) -> Answer:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {} if content is None else {"content-type": "application/json"}
        seconds = self.seconds_left()
        received = bytearray()
        try:
            return self._loop.run_until_complete(
                asyncio.wait_for(self._answer(method, path, content, headers, received), seconds)
            )
        except asyncio.TimeoutError as error:
            raise NoAnswerError(
                f"{method} {path}: no whole answer in {seconds:.1f} s, {len(received)} bytes of its body so far"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise NoAnswerError(f"{method} {path}: {type(error).__name__}: {error}") from error

    async def _answer(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], received: bytearray
    ) -> Answer:
        async with self._http.stream(method, path, content=content, headers=headers) as answer:
            async for part in answer.aiter_bytes():
                received += part
                if len(received) > _MAX_BYTES:
                    raise NoAnswerError(f"{method} {path}: an answer without an end, of {len(received)} bytes so far")
            return Answer(answer.status_code, bytes(received), answer.headers)
