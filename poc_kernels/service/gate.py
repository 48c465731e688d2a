"""In front of every route: the gate that GENERATING shuts for users, bounds on bodies, the token of the PoC routes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hmac
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import AdmissionError

USER_PREFIX = "/v1/"
POC_PREFIX = "/api/v1/pow"
_DONE = b"data: [DONE]\n\n"
_LARGE = (f"{POC_PREFIX}/init", f"{POC_PREFIX}/validate")
"""Routes outside /v1 that take a body."""
_MAX_LARGE = 256
"""Requests for these routes at once: their bodies, each within its bound, lie in memory until they are answered. A
client with some there gets no more than it leaves to others."""

_MAX_OTHER_BODY = 1024  # no other route takes one


class Gate:
    """Refuses what cannot be served now, and counts what is being served.

    Users' requests, under /v1, get 503 with Retry-After while ``closed`` gives a reason, and 429 above
    ``max_in_flight``; their errors are OpenAI error objects. Their event streams end with ``data: [DONE]``.
    Bodies are read here, to their bound and in ``body_seconds``: larger ones get 413, slower ones 408.
    With a token, the PoC routes get 401 without it.

    Args:
        app: what is behind the gate.
        closed: (code, message, Retry-After in seconds) while users are refused, else None. Asked for each request,
            before and after its body is read.
        refused: told the reason of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        closed: Callable[[], tuple[str, str, int] | None],
        refused: Callable[[str], None],
        max_in_flight: int,
        max_body_bytes: int,
        max_pow_body_bytes: int,
        body_seconds: float,
        token: str | None,
    ) -> None:
        self._app = app
        self._closed = closed
        self._refused = refused
        self._max_in_flight = max_in_flight
        self._max_body_bytes = max_body_bytes
        self._max_pow_body_bytes = max_pow_body_bytes
        self._body_seconds = body_seconds
        self._token = None if token is None else token.encode()
        self._in_flight = 0
        self._large: collections.Counter[str] = collections.Counter()  # by client
        self._idle = threading.Condition()

    @property
    def in_flight(self) -> int:
        """Users' requests that are being served."""
        return self._in_flight

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no user's request is being served; whether none is. Not for the event loop's thread."""
        with self._idle:
            return self._idle.wait_for(lambda: self._in_flight == 0, timeout_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].startswith(USER_PREFIX):
            await self._user(scope, receive, send)
        else:
            await self._other(scope, receive, send)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(POC_PREFIX) and not self._authorized(scope):
            self._refused("token")
            headers = [(b"www-authenticate", b"Bearer")]
            await _answer(send, 401, {"detail": "the PoC routes ask for the node's bearer token"}, headers)
            return
        refuse: Callable[[int, str, str], Awaitable[None]] = functools.partial(self._refuse_other, send)
        # The others, among them /stop and /health, are answered however many proofs wait.
        large = scope["method"] == "POST" and scope["path"].startswith(_LARGE)
        client = (scope.get("client") or ("",))[0]
        if large:
            left, own = _MAX_LARGE - self._large.total() - 1, self._large[client]
            if left < 0 or (own > 0 and own + 1 > left):
                message = (
                    f"at most {_MAX_LARGE} requests are served at once, of one client no more than it leaves to others"
                )
                await self._refuse_other(send, 429, "overloaded", message, 1)
                return
            self._large[client] += 1
        limit = self._max_pow_body_bytes if large else min(self._max_pow_body_bytes, _MAX_OTHER_BODY)
        try:
            body = await self._read_body(scope, receive, limit, refuse)
            if body is not None:
                await self._app(scope, _play_back(body, receive), send)
        finally:
            if large:
                self._large[client] -= 1
                if self._large[client] == 0:
                    del self._large[client]

    def _authorized(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, self._token)

    async def _user(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._shut(send):
            return
        with self._idle:
            admitted = self._in_flight < self._max_in_flight
            self._in_flight += admitted
        if not admitted:
            message = f"at most {self._max_in_flight} requests are served at once"
            await self._refuse_user(send, 429, "overloaded", message, 1)
            return
        try:
            await self._admitted(scope, receive, send)
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        refuse: Callable[[int, str, str], Awaitable[None]] = functools.partial(self._refuse_user, send)
        body = await self._read_body(scope, receive, self._max_body_bytes, refuse)
        # Asked again: the gate may have been shut while the body came.
        if body is not None and not await self._shut(send):
            await self._serve(scope, body, receive, send)

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Serve a user as long as the user is there: whoever leaves before the answer begins frees the engine."""
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

        app: asyncio.Future[None] = asyncio.ensure_future(
            self._app(scope, _play_back(body, left), _ends_streams(sending))
        )
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

    async def _shut(self, send: Send) -> bool:
        """Whether users are refused now; then this one is."""
        closed = self._closed()
        if closed is not None:
            code, message, seconds = closed
            await self._refuse_user(send, 503, code, message, seconds)
        return closed is not None

    async def _refuse_user(
        self, send: Send, status: int, code: str, message: str, retry_after: int | None = None
    ) -> None:
        self._refused(code)
        kind = "rate_limit_error" if status == 429 else None
        headers = [] if retry_after is None else [(b"retry-after", str(retry_after).encode())]
        await _answer(send, status, AdmissionError(status, message, code=code, kind=kind).body(), headers)

    async def _refuse_other(
        self, send: Send, status: int, code: str, message: str, retry_after: int | None = None
    ) -> None:
        self._refused(code)
        headers = [] if retry_after is None else [(b"retry-after", str(retry_after).encode())]
        await _answer(send, status, {"detail": message}, headers)

    async def _read_body(
        self, scope: Scope, receive: Receive, limit: int, refuse: Callable[[int, str, str], Awaitable[None]]
    ) -> bytes | None:
        """Read the whole body; None if it was refused, or if the client went away."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared[:20]) if declared.isdigit() else 0
        parts: list[bytes] = []
        received, more = 0, True
        deadline = time.monotonic() + self._body_seconds
        while more and max(size, received) <= limit:
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                await refuse(408, "body_too_slow", f"the body must come within {self._body_seconds:g} s")
                return None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            received += len(parts[-1])
            more = message.get("more_body", False)
        if max(size, received) > limit:
            got = f"got {size}" if size > limit else "got more"
            await refuse(413, "body_too_large", f"the body must have at most {limit} bytes, {got}")
            return None
        return b"".join(parts)


def _play_back(body: bytes, then: Receive) -> Receive:
    """A ``receive`` that gives ``body`` once, and then what ``then`` gives."""
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await then()

    return receive


def _ends_streams(send: Send) -> Send:
    """``send``, with the end that OpenAI's event streams have."""
    streaming = False

    async def sending(message: Message) -> None:
        nonlocal streaming
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            streaming = message["status"] == 200 and content_type.startswith(b"text/event-stream")
        elif streaming and message["type"] == "http.response.body" and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + _DONE}
        await send(message)

    return sending


async def _answer(
    send: Send, status: int, content: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode()
    start = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # The request's body may be unread: the connection cannot be used again.
        *([(b"connection", b"close")] if status in (408, 413) else []),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
