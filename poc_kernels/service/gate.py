"""The gate before an app: ASGI wrappers of one job each, and `Gate`, which puts them together.

Users' requests go through Shut, InFlight, Body, Shut again, Departure and, where the app does not end them itself,
DoneEvent; all others through Token, Places and Body.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import AdmissionError
from .settings import ServiceSettings

POC_PREFIX = "/api/v1/pow"
_MAX_PLACES = 256
"""Requests with a body at once on PoC routes: their bodies, each within its bound, lie in memory until answered."""
_MAX_SMALL_BODY = 1024
"""Bound on the bodies of routes that take none."""
_DONE = b"data: [DONE]"
_TAIL = 32
"""Bytes of the end of a stream: the last event, whatever its line ends."""
_ENDS_DONE = re.compile(rb"data: ?\[DONE\]\s*$")
_TRY_AGAIN_LATER = 1013
"""Close code of a websocket that is refused for now."""

Closed = Callable[[], tuple[str, str, int] | None]
"""Returns (code, message, Retry-After in seconds) while users are refused, else None."""


def under(*prefixes: str) -> Callable[[Scope], bool]:
    """Return a predicate of requests whose path begins with one of ``prefixes``."""
    return lambda scope: scope["path"].startswith(prefixes)


def posted_under(*prefixes: str) -> Callable[[Scope], bool]:
    """Return a predicate of POST requests whose path begins with one of ``prefixes``."""
    return lambda scope: scope.get("method") == "POST" and scope["path"].startswith(prefixes)


_TAKES_BODY = posted_under(f"{POC_PREFIX}/init", f"{POC_PREFIX}/validate")


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """What a gate has to know of the app behind it.

    Args:
        is_user: whether a request (``http`` or ``websocket``) is a user's: shut out while the node proves its compute,
            counted, and answered with OpenAI's error objects. It has to be true of every route that computes.
        takes_body: whether a request that is no user's takes a body of up to max_pow_body_bytes.
        ends_streams: whether the app ends its event streams with ``data: [DONE]`` itself.
    """

    is_user: Callable[[Scope], bool]
    takes_body: Callable[[Scope], bool] = _TAKES_BODY
    ends_streams: bool = False


class RefusedError(AdmissionError):
    """Raised by a wrapper, before the app is called, to refuse a request: `Gate` answers. ``code`` is the reason."""

    code: str


class Gate:
    """Refuses what cannot be served now, and counts what is being served.

    Users get 503 with Retry-After while ``closed`` gives a reason, and 429 above max_in_flight. Bodies are read here,
    to their bound and in body_seconds: larger ones get 413, slower ones 408. With a token, the PoC routes answer 401 to
    requests without it.

    Args:
        app: what is behind the gate.
        rules: what has to be known of it.
        settings: bounds, and the token.
        closed: asked for each user's request, before and after its body is read.
        refused: told the reason of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: GateRules,
        settings: ServiceSettings,
        *,
        closed: Closed,
        refused: Callable[[str], None],
    ) -> None:
        def limit_of_other(scope: Scope) -> int:
            limit = settings.max_pow_body_bytes
            return limit if rules.takes_body(scope) else min(limit, _MAX_SMALL_BODY)

        self._app = app
        self._is_user = rules.is_user
        self._refused = refused
        served = Departure(app if rules.ends_streams else DoneEvent(app))
        body = Body(Shut(served, closed), lambda scope: settings.max_body_bytes, settings.body_seconds)
        self._users = InFlight(body, settings.max_in_flight)
        self._shut_users = Shut(self._users, closed)
        others = Places(Body(app, limit_of_other, settings.body_seconds), rules.takes_body)
        self._others = others if settings.token is None else Token(others, settings.token)

    @property
    def in_flight(self) -> int:
        """Users' requests that are being served."""
        return self._users.count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: the ASGI interface."""
        user = scope["type"] in ("http", "websocket") and self._is_user(scope)
        others = self._others if scope["type"] == "http" else self._app
        try:
            await (self._shut_users if user else others)(scope, receive, send)
        except RefusedError as refusal:
            self._refused(refusal.code)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": refusal.message})
                return
            content = refusal.body() if user else {"detail": refusal.message}
            await JSONResponse(content, refusal.status, refusal.headers)(scope, receive, send)


class Shut:
    """Refuses users while ``closed`` gives a reason."""

    def __init__(self, app: ASGIApp, closed: Closed) -> None:
        self._app, self._closed = app, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = self._closed()
        if closed is not None:
            code, message, seconds = closed
            raise RefusedError(503, message, code=code, headers={"Retry-After": str(seconds)})
        await self._app(scope, receive, send)


class InFlight:
    """Counts requests, and refuses those above a maximum."""

    def __init__(self, app: ASGIApp, max_in_flight: int) -> None:
        self._app, self._max = app, max_in_flight
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.count >= self._max:
            raise _overloaded(f"at most {self._max} requests are served at once")
        self.count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.count -= 1


class Places:
    """Refuses requests with a body above a maximum, and those of a client that leaves less to others than it has.

    Other routes, including /stop and /health, are answered however many proofs wait.
    """

    def __init__(self, app: ASGIApp, takes_body: Callable[[Scope], bool]) -> None:
        self._app, self._takes_body = app, takes_body
        self._taken: collections.Counter[str] = collections.Counter()  # by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._takes_body(scope):
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("",))[0]
        left, own = _MAX_PLACES - self._taken.total() - 1, self._taken[client]
        if left < 0 or (own > 0 and own + 1 > left):
            raise _overloaded(
                f"at most {_MAX_PLACES} requests are served at once, of one client no more than it leaves to others"
            )
        self._taken[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken[client] -= 1
            if self._taken[client] == 0:
                del self._taken[client]


class Token:
    """Answers 401 on the PoC routes unless a request has the bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(POC_PREFIX):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._token):
                message = "the PoC routes ask for the node's bearer token"
                raise RefusedError(401, message, code="token", headers={"WWW-Authenticate": "Bearer"})
        await self._app(scope, receive, send)


class Body:
    """Reads the whole body before the app is called: refuses one that is too large or too slow."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int], seconds: float) -> None:
        self._app, self._limit_of, self._seconds = app, limit_of, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await self._read(scope, receive)
        if body is not None:
            await self._app(scope, _play_back(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client went away."""
        # Where a body is refused, the rest of it is unread: the connection cannot be used again.
        close = {"Connection": "close"}
        limit = self._limit_of(scope)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared[:20]) if declared.isdigit() else 0
        parts: list[bytes] = []
        received, more = 0, True
        deadline = time.monotonic() + self._seconds
        while more and max(size, received) <= limit:
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                text = f"the body must come within {self._seconds:g} s"
                raise RefusedError(408, text, code="body_too_slow", headers=close) from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            received += len(parts[-1])
            more = message.get("more_body", False)
        if max(size, received) > limit:
            got = f"got {size}" if size > limit else "got more"
            text = f"the body must have at most {limit} bytes, {got}"
            raise RefusedError(413, text, code="body_too_large", headers=close)
        return b"".join(parts)


class Departure:
    """Serves a client as long as it is there: one that leaves before its answer begins frees the engine.

    The body must have been read: whatever else comes from the client is its departure.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await receive()
        gone, begun = asyncio.Event(), False

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def left() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        serving = self._app(scope, _play_back(body["body"], left), sending)
        app: asyncio.Future[None] = asyncio.ensure_future(serving)
        listener = asyncio.ensure_future(listen())
        try:
            await asyncio.wait({app, listener}, return_when=asyncio.FIRST_COMPLETED)
            if gone.is_set() and not begun:
                app.cancel()
            with contextlib.suppress(*([asyncio.CancelledError] if gone.is_set() else [])):
                await app
        finally:
            app.cancel()
            listener.cancel()
            await asyncio.gather(app, listener, return_exceptions=True)


class DoneEvent:
    """Ends event streams with ``data: [DONE]``, as OpenAI's end, unless the app has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streaming, tail = False, b""

        async def sending(message: Message) -> None:
            nonlocal streaming, tail
            if message["type"] == "http.response.start":
                content_type = dict(message["headers"]).get(b"content-type", b"")
                streaming = message["status"] == 200 and content_type.startswith(b"text/event-stream")
            elif streaming and message["type"] == "http.response.body":
                tail = (tail + message.get("body", b"")[-_TAIL:])[-_TAIL:]
                if not message.get("more_body", False) and not _ENDS_DONE.search(tail):
                    message = {**message, "body": message.get("body", b"") + _DONE + b"\n\n"}
            await send(message)

        await self._app(scope, receive, sending)


def _play_back(body: bytes, then: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once, and then what ``then`` gives."""
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await then()

    return receive


def _overloaded(message: str) -> RefusedError:
    return RefusedError(429, message, code="overloaded", headers={"Retry-After": "1"})
