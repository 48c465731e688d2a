"""The gate before an app: ASGI wrappers of one job each, and `Gate`, which puts them together.

Every HTTP request goes through Head and, where web pages of other origins may call, starlette's CORSMiddleware. Users'
requests then go through Shut, Body, Shut again, InFlight and, where the app does not do it itself, Departure and
DoneEvent; all others through Token and Body. Where the bodies of users have no bound here, Body and Departure are left
out. What the rules let pass goes through nothing.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .clients import client_of
from .errors import AdmissionError
from .settings import ServiceSettings

POC_PREFIX = "/api/v1/pow"
MLNODE_PREFIX = "/api/v1/inference/pow"
"""Where an MLNode, which the network puts before its engines, has the same routes."""
POC_PREFIXES = (POC_PREFIX, MLNODE_PREFIX)
_BODY_DONE = "poc_kernels.body_done"
_MAX_SMALL_BODY = 1024
"""Bound on the bodies of routes that take none."""
_HEALTH = "/health"
_EXPOSED_HEADERS = ("Location", "Retry-After", "X-Request-Id")
"""Headers of answers that web pages of other origins may read."""
_DONE = b"data: [DONE]"
_TAIL = 32
"""Bytes of the end of a stream: the last event, whatever its line ends."""
_ENDS_DONE = re.compile(rb"data: ?\[DONE\]\s*$")
_TRY_AGAIN_LATER = 1013
"""Close code of a websocket that is refused for now."""

_CLOSE = {"Connection": "close"}
"""Header of an answer to a request whose body was not read to its end: the connection cannot be used again."""
_SHARED = "of one client no more than it leaves to others"

Closed = Callable[[], tuple[str, str, int] | None]
"""Returns (code, message, Retry-After in seconds) while users are refused, else None."""


def path_of(scope: Scope) -> str:
    """Return the path of a request by which starlette finds its route: without the root_path of the app, if it has one.

    Without that, a token could be gone round by a path under root_path.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if below != path and below.startswith("/") else path


def under(*prefixes: str) -> Callable[[Scope], bool]:
    """Return a predicate of requests whose path begins with one of ``prefixes``."""
    return lambda scope: path_of(scope).startswith(prefixes)


def posted_under(*prefixes: str) -> Callable[[Scope], bool]:
    """Return a predicate of POST requests whose path begins with one of ``prefixes``."""
    return lambda scope: scope.get("method") == "POST" and path_of(scope).startswith(prefixes)


def _none(scope: Scope) -> bool:
    return False


_TAKES_BODY = posted_under(
    *(f"{prefix}/{name}" for prefix in POC_PREFIXES for name in ("init", "validate", "generate"))
)


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """What a gate has to know of the app behind it.

    Args:
        is_user: whether a request (``http`` or ``websocket``) is a user's: shut out while the node proves its compute,
            counted, and answered with OpenAI's error objects. It has to be true of every route that computes.
        takes_body: whether a request that is no user's takes a body of up to max_pow_body_bytes.
        passes: whether a request goes to the app as it is: for an app that has other routes than users' and the
            service's.
        ends_streams: whether the app ends its event streams with ``data: [DONE]`` itself.
        sees_departures: whether the app listens for a client's departure, and ends what it does for it, itself.
    """

    is_user: Callable[[Scope], bool]
    takes_body: Callable[[Scope], bool] = _TAKES_BODY
    passes: Callable[[Scope], bool] = _none
    ends_streams: bool = False
    sees_departures: bool = False


class RefusedError(AdmissionError):
    """Raised by a wrapper, before the app is called, to refuse a request: `Gate` answers. ``code`` is the reason."""

    code: str


class Gate:
    """Refuses what cannot be served now, and counts what is being served.

    Users get 503 with Retry-After while ``closed`` gives a reason, and 429 above max_in_flight. Bodies are read here,
    to their bound and in body_seconds: larger ones get 413, slower ones 408, and 429 those that come when
    max_bodies_bytes of bodies are held. No client gets more places or bytes than it leaves to others. With a token, the
    PoC routes answer 401 to requests without it.

    Args:
        app: what is behind the gate.
        rules: what has to be known of it.
        settings: bounds, and the token; bounds on users that are None are the app's own business.
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

        def in_memory(then: ASGIApp, limit_of: Callable[[Scope], int]) -> Body:
            return Body(then, limit_of, settings.body_seconds, self._bodies)

        self._bodies = Shares(settings.max_bodies_bytes)
        self._app = app
        self._rules = rules
        self._refused = refused
        served = app if rules.ends_streams else DoneEvent(app)
        max_in_flight = math.inf if settings.max_in_flight is None else settings.max_in_flight
        max_body_bytes = settings.max_body_bytes
        if max_body_bytes is None:
            self._users = InFlight(served, max_in_flight)
            self._shut_users = Shut(self._users, closed)
        else:
            self._users = InFlight(served if rules.sees_departures else Departure(served), max_in_flight)
            self._shut_users = Shut(in_memory(Shut(self._users, closed), lambda scope: max_body_bytes), closed)
        self._others: ASGIApp = in_memory(app, limit_of_other)
        if settings.token is not None:
            self._others = Token(self._others, settings.token, everywhere=settings.guard_metrics)
        self._entry: ASGIApp = Head(self._admit)
        if settings.allowed_origins is not None:
            self._entry = CORSMiddleware(
                self._entry,
                allow_origins=settings.allowed_origins.split(","),
                allow_methods=("*",),
                allow_headers=("*",),
                expose_headers=_EXPOSED_HEADERS,
            )

    @property
    def in_flight(self) -> int:
        """Users' requests that are being served."""
        return self._users.count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: the ASGI interface."""
        passes = scope["type"] in ("http", "websocket") and self._rules.passes(scope)
        await (self._app if passes else self._entry)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = scope["type"] in ("http", "websocket") and self._rules.is_user(scope)
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


class Shares:
    """Divides a maximum between clients: none gets more than it leaves to others, except for its only one."""

    def __init__(self, maximum: float) -> None:
        self.maximum = maximum
        self.total = 0
        """What all clients have taken together."""
        self._taken: collections.Counter[str] = collections.Counter()  # by client

    def take(self, client: str, amount: int = 1, held: int = 0) -> bool:
        """Take an amount for a client, for what already has ``held`` of it; return whether it could be had."""
        if amount == 0:
            return True
        own = self._taken[client]
        left = self.maximum - self.total - amount
        if left < 0 or (own > held and own + amount > left):
            return False
        self._taken[client] = own + amount
        self.total += amount
        return True

    def give_back(self, client: str, amount: int = 1) -> None:
        """Give back what a client took."""
        self._taken[client] -= amount
        self.total -= amount
        if self._taken[client] == 0:
            del self._taken[client]


class Head:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "HEAD":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, sending)


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
    """Counts requests, and refuses those above a maximum, or of a client that leaves less to others than it has."""

    def __init__(self, app: ASGIApp, max_in_flight: float) -> None:
        self._app = app
        self._places = Shares(max_in_flight)

    @property
    def count(self) -> int:
        """Requests that are being served."""
        return self._places.total

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = client_of(scope)
        if not self._places.take(client):
            raise _overloaded(f"at most {self._places.maximum} requests are served at once, {_SHARED}")
        try:
            await self._app(scope, receive, send)
        finally:
            self._places.give_back(client)


class Token:
    """Answers 401 unless a request has the bearer token: on the PoC routes, or everywhere except on /health."""

    def __init__(self, app: ASGIApp, token: str, *, everywhere: bool = False) -> None:
        self._app, self._token, self._everywhere = app, token.strip().encode(), everywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if path.startswith(POC_PREFIXES) or (self._everywhere and path != _HEALTH):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._token):
                message = "this route asks for the node's bearer token"
                raise RefusedError(401, message, code="token", headers={"WWW-Authenticate": "Bearer"})
        await self._app(scope, receive, send)


class Body:
    """Reads the whole body before the app is called: refuses one that is too large, too slow, or one too many.

    What has come of a body counts, for its client, among the bytes of all ``bodies``, until the app calls `body_done`,
    at the latest until it has answered.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int], seconds: float, bodies: Shares) -> None:
        self._app, self._limit_of, self._seconds, self._bodies = app, limit_of, seconds, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client, held = client_of(scope), 0

        def hold(part: bytes) -> None:
            nonlocal held
            if not self._bodies.take(client, len(part), held):
                text = f"at most {self._bodies.maximum} bytes of bodies are held at once, {_SHARED}"
                raise _overloaded(text, **_CLOSE)
            held += len(part)

        def done() -> None:
            nonlocal held
            self._bodies.give_back(client, held)
            held = 0

        try:
            body = await self._read(scope, receive, hold)
            if body is not None:
                received = _play_back(body, receive)
                del body  # the app decides how long it is kept
                await self._app({**scope, _BODY_DONE: done}, received, send)
        finally:
            done()

    async def _read(self, scope: Scope, receive: Receive, hold: Callable[[bytes], None]) -> bytes | None:
        """Return the body; None if the client went away. Each part is handed to ``hold``."""
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
                raise RefusedError(408, text, code="body_too_slow", headers=_CLOSE) from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            hold(parts[-1])
            received += len(parts[-1])
            more = message.get("more_body", False)
        if max(size, received) > limit:
            got = f"got {size}" if size > limit else "got more"
            text = f"the body must have at most {limit} bytes, {got}"
            raise RefusedError(413, text, code="body_too_large", headers=_CLOSE)
        return b"".join(parts)


def body_done(scope: Scope) -> None:
    """Say that the body of a request is not needed any more, before its answer is there: it does not count then."""
    scope.get(_BODY_DONE, lambda: None)()


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


def _overloaded(message: str, **headers: str) -> RefusedError:
    return RefusedError(429, message, code="overloaded", headers={"Retry-After": "1", **headers})
