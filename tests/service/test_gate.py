"""The gate alone, before an app of a few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from web import TIMEOUT

from poc_kernels.service.gate import Gate, GateRules, Shares, body_done, under
from poc_kernels.service.settings import ServiceSettings

USER, POW, OTHER = "/v1/chat/completions", "/api/v1/pow/validate", "/health"
CLOSED = ("generating", "not now", 7)
Message = dict[str, Any]


class Client:
    """One request, spoken to a gate in ASGI; what came back."""

    def __init__(
        self, gate: Gate, path: str, parts: list[bytes] | None = None, of: str = "", **headers: str | bytes
    ) -> None:
        self.sent: list[Message] = []
        self.arriving: asyncio.Queue[Message] = asyncio.Queue()
        parts = [b""] if parts is None else parts
        for index, part in enumerate(parts):
            more = index + 1 < len(parts)
            self.arriving.put_nowait({"type": "http.request", "body": part, "more_body": more})
        fields = [
            (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in headers.items()
        ]
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": fields,
            "client": (of, 1) if of else None,
        }
        self._gate = gate

    async def speak(self) -> Client:
        async def send(message: Any) -> None:
            self.sent.append(message)

        await asyncio.wait_for(self._gate(self.scope, self.arriving.get, send), TIMEOUT)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object that the answer is."""
        content = json.loads(self.body)
        assert content.keys() == {"error"}
        assert content["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = content["error"]
        return error


class Echo:
    """Answers with the body; then, if it is told to, waits for what the client does."""

    def __init__(self, answer: Callable[[bytes], Awaitable[bytes]] | None = None) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[str] = []
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope["type"])
        if scope["type"] != "http":
            return
        message = await receive()
        assert message["type"] == "http.request"
        assert not message["more_body"]
        self.bodies.append(message["body"])
        body = await self._answer(message["body"]) if self._answer else message["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def answering_later() -> tuple[Echo, asyncio.Event]:
    """Return an app that answers with the body, and the event that it waits for before."""
    release = asyncio.Event()

    async def wait(body: bytes) -> bytes:
        await release.wait()
        return body

    return Echo(wait), release


def gate(app: Any, **changes: Any) -> Gate:
    asks = {"closed": lambda: None, "refused": lambda reason: None}
    asks = {name: changes.pop(name, default) for name, default in asks.items()}
    rules = changes.pop("rules", GateRules(is_user=under("/v1/")))
    defaults = {"max_in_flight": 2, "max_body_bytes": 10, "max_pow_body_bytes": 2000, "body_seconds": TIMEOUT}
    return Gate(app, rules, ServiceSettings(**{**defaults, **changes}), **asks)


def speak(*clients: Client) -> None:
    async def together() -> None:
        await asyncio.gather(*(client.speak() for client in clients))

    asyncio.run(together())


@pytest.mark.parametrize("path", [USER, POW, OTHER])
@pytest.mark.parametrize("parts", [[b""], [b"1234567890"], [b"1234", b"", b"567890"], [b"", b""]])
def test_bodies_are_played_back_whole(path: str, parts: list[bytes]) -> None:
    app = Echo()
    client = Client(gate(app), path, parts)
    speak(client)
    assert (client.status, client.body) == (200, b"".join(parts))
    assert app.bodies == [b"".join(parts)]


@pytest.mark.parametrize(("path", "limit"), [(USER, 10), (POW, 2000), (OTHER, 1024)])
def test_bodies_are_bounded_to_the_byte(path: str, limit: int) -> None:
    app, reasons = Echo(), []
    front = gate(app, refused=reasons.append)
    large = [
        Client(front, path, [b"x" * (limit + 1)]),
        Client(front, path, [b"x" * limit, b"x"]),
        Client(front, path, [b"x"], content_length=str(limit + 1)),
        Client(front, path, [b"x"], content_length="9" * 500),
    ]
    for client in large:
        speak(client)
        assert client.status == 413
        assert f"the body must have at most {limit} bytes, got " in client.body.decode()
        assert client.headers[b"connection"] == b"close"
    assert app.bodies == []
    assert reasons == ["body_too_large"] * 4
    exact = Client(front, path, [b"x" * limit], content_length=str(limit))
    speak(exact)
    assert exact.status == 200
    assert front.in_flight == 0


def test_the_rest_of_a_body_that_is_too_large_is_not_read() -> None:
    client = Client(gate(Echo()), USER, [b"x" * 11, b"rest"])
    speak(client)
    assert client.arriving.qsize() == 1


@pytest.mark.parametrize("path", [USER, POW])
@pytest.mark.parametrize("parts", [[], [b"begins", b""]])
def test_a_body_that_does_not_come(path: str, parts: list[bytes]) -> None:
    app, reasons = Echo(), []
    front = gate(app, body_seconds=0.02, refused=reasons.append)

    async def ask() -> Client:
        client = Client(front, path, parts)
        if parts:  # the last part does not come yet
            first, _ = client.arriving.get_nowait(), client.arriving.get_nowait()
            client.arriving.put_nowait(first)
        return await client.speak()

    client = asyncio.run(ask())
    assert (client.status, client.headers[b"connection"]) == (408, b"close")
    assert b"the body must come within 0.02 s" in client.body
    assert (reasons, app.bodies, front.in_flight) == (["body_too_slow"], [], 0)


@pytest.mark.parametrize("path", [USER, POW])
def test_a_client_that_leaves_before_its_body_is_whole(path: str) -> None:
    app, reasons = Echo(), []
    front = gate(app, refused=reasons.append)

    async def ask() -> Client:
        client = Client(front, path, [])
        client.arriving.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        client.arriving.put_nowait({"type": "http.disconnect"})
        return await client.speak()

    client = asyncio.run(ask())
    assert (client.sent, reasons, app.bodies, front.in_flight) == ([], [], [], 0)


def test_a_client_that_leaves_later_is_seen_by_the_app() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append(await receive())

    async def ask() -> None:
        client = Client(gate(app), USER, [b"abc"])
        client.arriving.put_nowait({"type": "http.disconnect"})
        await client.speak()

    asyncio.run(ask())
    assert seen == [{"type": "http.request", "body": b"abc", "more_body": False}, {"type": "http.disconnect"}]


def test_a_client_that_leaves_before_the_answer_begins_ends_the_app() -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    front = gate(app)

    async def ask() -> Client:
        client = Client(front, USER, [b"abc"])
        speaking = asyncio.create_task(client.speak())
        while front.in_flight == 0:
            await asyncio.sleep(0)
        client.arriving.put_nowait({"type": "http.disconnect"})
        return await asyncio.wait_for(speaking, TIMEOUT)

    assert asyncio.run(ask()).sent == []
    assert (ended, front.in_flight) == ([True], 0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_user_that_leaves_ends_the_work_unless_the_answer_has_begun(begun: bool) -> None:
    """A stream that has begun sees it by itself, and ends in order."""
    ends = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            ends.append((await receive())["type"] if begun else await asyncio.Event().wait())
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def ask() -> None:
        client = Client(front, USER, [b"abc"])
        client.arriving.put_nowait({"type": "http.disconnect"})
        await client.speak()

    front = gate(app)
    asyncio.run(ask())
    assert ends == ["http.disconnect" if begun else "cancelled"]
    assert front.in_flight == 0


def test_shares() -> None:
    shares = Shares(10)
    assert shares.take("a", 6)  # the first of a client may be more than it leaves
    assert not shares.take("a", 1)
    assert not shares.take("b", 5)
    assert shares.take("b", 2)
    assert not shares.take("b", 1)  # it would have 3 and leave 1
    assert shares.take("c", 1)
    assert shares.take("c", 1, held=1)  # more for its only one
    assert not shares.take("d", 1)
    assert shares.take("d", 0)
    assert shares.total == 10
    shares.give_back("a", 6)
    assert shares.total == 4
    assert shares.take("b", 2)
    for client, amount in [("b", 4), ("c", 2)]:
        shares.give_back(client, amount)
    assert (shares.total, shares._taken) == (0, {})


# ---- bodies that come slowly, and many ----


@pytest.mark.parametrize("path", [USER, POW])
def test_bodies_that_do_not_come_hold_no_places(path: str) -> None:
    async def run() -> None:
        app = Echo()
        front = gate(app, max_in_flight=2)
        slow = [Client(front, path, []) for _ in range(50)]
        speaking = [asyncio.create_task(client.speak()) for client in slow]
        for client in slow:
            client.arriving.put_nowait({"type": "http.request", "body": b"1", "more_body": True})
        for _ in range(10):
            await asyncio.sleep(0)
        assert front.in_flight == 0
        assert (await Client(front, path, [b"whole"]).speak()).status == 200
        slow[0].arriving.put_nowait({"type": "http.request", "body": b"2", "more_body": False})
        assert (await speaking[0]).body == b"12"
        for client in slow[1:]:
            client.arriving.put_nowait({"type": "http.disconnect"})
        await asyncio.gather(*speaking)
        assert app.bodies == [b"whole", b"12"]

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def test_no_client_s_bodies_take_the_memory_of_others() -> None:
    async def run() -> None:
        app, release = answering_later()
        reasons: list[str] = []
        front = gate(app, max_in_flight=100, max_bodies_bytes=40, refused=reasons.append)
        begun = [Client(front, USER, [], of="a") for _ in range(3)]  # of each, 9 bytes have come, and no more do
        begun += [Client(front, POW, [], of="a")]  # of users and of the chain together
        speaking = [asyncio.create_task(client.speak()) for client in begun]
        for client in begun:
            client.arriving.put_nowait({"type": "http.request", "body": b"x" * 9, "more_body": True})
            for _ in range(10):
                await asyncio.sleep(0)
        refused = [client for client in begun if client.sent]
        assert [(client.status, client.headers[b"connection"]) for client in refused] == [(429, b"close")] * 2
        assert refused[0].error["message"].startswith("at most 40 bytes of bodies are held at once, of one client no")
        assert json.loads(refused[1].body).keys() == {"detail"}
        assert reasons == ["overloaded"] * 2
        other = asyncio.create_task(Client(front, USER, [b"x" * 10], of="b").speak())
        while not app.bodies:
            await asyncio.sleep(0)
        release.set()
        assert (await Client(front, OTHER, [b""], of="c").speak()).status == 200
        assert (await other).status == 200
        for client in begun[:2]:
            client.arriving.put_nowait({"type": "http.disconnect"})
        await asyncio.gather(*speaking)
        assert [(await Client(front, USER, [b"x" * 10], of="a").speak()).status for _ in range(5)] == [200] * 5

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


@pytest.mark.parametrize("early", [False, True])
def test_bodies_are_held_until_they_are_answered_or_not_needed(early: bool) -> None:
    async def run() -> None:
        release, begun = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            if early:
                body_done(scope)
            begun.set()
            await release.wait()
            body_done(scope)  # again: nothing more is given back
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        front = gate(app, max_bodies_bytes=20)
        waiting = [asyncio.create_task(Client(front, POW, [b"x" * 6, b"x" * 6], of="a").speak())]
        await begun.wait()
        others = [asyncio.create_task(Client(front, POW, [b"x" * 10], of="a").speak()) for _ in range(100)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert [task.done() for task in others] == [not early] * 100
        release.set()
        assert {client.status for client in await asyncio.gather(*others)} == {200 if early else 429}
        assert [client.status for client in await asyncio.gather(*waiting)] == [200]
        assert (await Client(front, POW, [b"x" * 20], of="a").speak()).status == 200

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def test_routes_without_bodies_are_answered_whatever_is_held() -> None:
    async def run() -> None:
        front = gate(Echo(), max_bodies_bytes=10)
        slow = Client(front, POW, [], of="b")
        slow.arriving.put_nowait({"type": "http.request", "body": b"x" * 10, "more_body": True})
        speaking = asyncio.create_task(slow.speak())
        for _ in range(10):
            await asyncio.sleep(0)
        refused = await Client(front, POW, [b"proof"]).speak()
        assert (refused.status, refused.headers[b"retry-after"]) == (429, b"1")
        for path in ("/api/v1/pow/stop", "/api/v1/pow/phase/validate", "/api/v1/pow/status", OTHER, "/metrics"):
            assert (await Client(front, path).speak()).status == 200
        slow.arriving.put_nowait({"type": "http.disconnect"})
        await speaking
        assert (await Client(front, POW, [b"proof"]).speak()).status == 200

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


# ---- users ----


def test_users_are_refused_while_it_is_closed() -> None:
    app, reasons = Echo(), []
    front = gate(app, closed=lambda: CLOSED, refused=reasons.append)
    user, chain, health = (Client(front, path) for path in (USER, POW, OTHER))
    speak(user, chain, health)
    assert (user.status, user.headers[b"retry-after"]) == (503, b"7")
    assert user.error == {"message": "not now", "type": "server_error", "param": None, "code": "generating"}
    assert (chain.status, health.status) == (200, 200)
    assert reasons == ["generating"]


def test_a_gate_that_shuts_while_the_body_comes() -> None:
    app, reasons = Echo(), []
    answers = iter([None, CLOSED])
    front = gate(app, closed=lambda: next(answers), refused=reasons.append)
    client = Client(front, USER, [b"abc"])
    speak(client)
    assert (client.status, client.error["code"]) == (503, "generating")
    assert (app.bodies, reasons, front.in_flight) == ([], ["generating"], 0)


def test_so_many_users_at_once_and_no_more() -> None:
    async def run() -> None:
        app, release = answering_later()
        reasons: list[str] = []
        front = gate(app, refused=reasons.append)
        served = [asyncio.create_task(Client(front, USER, of=of).speak()) for of in "ab"]
        while len(app.bodies) < 2:
            await asyncio.sleep(0)
        assert front.in_flight == 2
        refused = await Client(front, USER).speak()
        assert (refused.status, refused.headers[b"retry-after"]) == (429, b"1")
        assert (refused.error["type"], refused.error["code"]) == ("rate_limit_error", "overloaded")
        assert reasons == ["overloaded"]
        other = asyncio.create_task(Client(front, POW).speak())  # these do not count
        release.set()
        assert [client.status for client in await asyncio.gather(*served, other)] == [200] * 3
        assert front.in_flight == 0
        assert (await Client(front, USER).speak()).status == 200

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def test_no_user_takes_the_places_of_others() -> None:
    async def run() -> None:
        app, release = answering_later()
        front = gate(app, max_in_flight=8)

        async def ask(of: str) -> tuple[str, int]:
            return of, (await Client(front, USER, of=of).speak()).status

        asked = []
        for of in "aaaaaabbbcaa":
            asked.append(asyncio.create_task(ask(of)))
            for _ in range(10):
                await asyncio.sleep(0)
        release.set()
        assert [of for of, status in await asyncio.gather(*asked) if status == 200] == list("aaaabbc")
        assert front.in_flight == 0

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def test_addresses_of_one_network_share_their_places() -> None:
    async def run() -> None:
        app, release = answering_later()
        front = gate(app, max_in_flight=8)
        clients = [Client(front, USER, of=f"2001:db8::{number}") for number in range(6)]
        clients += [Client(front, USER, of="2001:db8:0:1::1"), Client(front, USER, of="::ffff:192.0.2.1")]
        asked = [asyncio.create_task(client.speak()) for client in clients]
        for _ in range(10):
            await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*asked)
        assert [client.status for client in clients] == [200] * 4 + [429] * 2 + [200] * 2

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


@pytest.mark.parametrize("error", [RuntimeError, asyncio.TimeoutError, ConnectionResetError])
def test_an_app_that_raises_is_not_answered_for(error: type[Exception]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    front = gate(app)
    client = Client(front, USER)
    with pytest.raises(error):
        speak(client)
    assert (client.sent, front.in_flight) == ([], 0)


def answering(status: int, content_type: bytes, *bodies: bytes) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})

    return app


@pytest.mark.parametrize(
    ("path", "status", "content_type", "ends"),
    [
        (USER, 200, b"text/event-stream", True),
        (USER, 200, b"text/event-stream; charset=utf-8", True),
        (USER, 500, b"text/event-stream", False),
        (USER, 200, b"application/json", False),
        (OTHER, 200, b"text/event-stream", False),
    ],
)
def test_event_streams_of_users_end_with_done(path: str, status: int, content_type: bytes, ends: bool) -> None:
    client = Client(gate(answering(status, content_type, b"data: 1\n\n", b"data: 2\n\n")), path)
    speak(client)
    assert client.body == b"data: 1\n\ndata: 2\n\n" + (b"data: [DONE]\n\n" if ends else b"")
    assert not client.sent[-1].get("more_body", False)


# ---- the token ----


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, 401),
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer sécret "}, 401),
        ({"authorization": "Bearer  sécret"}, 401),
        ({"authorization": "sécret"}, 401),
        ({"authorization": "Basic sécret"}, 401),
        ({"authorization": b"\xff\xfe"}, 401),
        ({"authorization": "Bearer sécret"}, 200),
        ({"authorization": "bearer sécret"}, 200),
    ],
    ids=str,
)
def test_the_token(given: dict[str, str | bytes], status: int) -> None:
    app, reasons = Echo(), []
    front = gate(app, token="sécret", refused=reasons.append)
    chain = Client(front, POW, **given)
    speak(chain)
    assert chain.status == status
    if status == 401:
        assert chain.headers[b"www-authenticate"] == b"Bearer"
        assert json.loads(chain.body).keys() == {"detail"}
        assert (app.bodies, reasons) == ([], ["token"])
    user, health = Client(front, USER), Client(front, OTHER)
    speak(user, health)
    assert (user.status, health.status) == (200, 200)


@pytest.mark.parametrize("token", ["abc", " abc\t", "abc\n", "\r\nabc\r\n"])
def test_blanks_around_the_token_are_no_part_of_it(token: str) -> None:
    front = gate(Echo(), token=token)
    right, wrong = Client(front, POW, authorization="Bearer abc"), Client(front, POW, authorization="Bearer ab")
    speak(right, wrong)
    assert (right.status, wrong.status) == (200, 401)


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/docs", "/another", POW])
def test_the_token_can_be_asked_for_elsewhere(path: str) -> None:
    for guard, status in ((False, 401 if path == POW else 200), (True, 401)):
        front = gate(Echo(), token="abc", guard_metrics=guard)
        stranger, scraper = Client(front, path), Client(front, path, authorization="Bearer abc")
        user, health = Client(front, USER), Client(front, OTHER)
        speak(stranger, scraper, user, health)
        assert stranger.status == status
        assert (scraper.status, user.status, health.status) == (200, 200, 200)


# ---- HEAD, and web pages of other origins ----


@pytest.mark.parametrize("path", [OTHER, "/metrics", "/v1/models", "/api/v1/pow/status"])
def test_head_is_answered_as_get_without_the_body(path: str) -> None:
    methods = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        methods.append(scope["method"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"an", "more_body": True})
        await send({"type": "http.response.body", "body": b"sw"})

    client = Client(gate(app), path)
    client.scope["method"] = "HEAD"
    speak(client)
    assert methods == ["GET"]
    assert (client.status, client.headers[b"content-length"], client.body) == (200, b"4", b"")
    assert not client.sent[-1].get("more_body", False)


def test_a_head_that_is_refused_has_no_body_either() -> None:
    client = Client(gate(Echo(), closed=lambda: CLOSED), "/v1/models")
    client.scope["method"] = "HEAD"
    speak(client)
    assert (client.status, client.headers[b"retry-after"], client.body) == (503, b"7", b"")


def preflight(front: Gate, origin: str) -> Client:
    client = Client(
        front,
        USER,
        origin=origin,
        access_control_request_method="POST",
        access_control_request_headers="authorization, content-type",
    )
    client.scope["method"] = "OPTIONS"
    speak(client)
    return client


@pytest.mark.parametrize("origin", ["https://a.example", "http://localhost:3000"])
def test_web_pages_of_allowed_origins_may_call(origin: str) -> None:
    app = Echo()
    front = gate(app, allowed_origins="https://a.example,http://localhost:3000", token="abc", closed=lambda: CLOSED)
    asked = preflight(front, origin)
    assert (asked.status, asked.headers[b"access-control-allow-origin"]) == (200, origin.encode())
    assert b"authorization" in asked.headers[b"access-control-allow-headers"]
    refused, stranger = Client(front, USER, origin=origin), Client(front, OTHER, origin="https://b.example")
    speak(refused, stranger)
    assert (refused.status, refused.headers[b"access-control-allow-origin"]) == (503, origin.encode())
    assert b"Retry-After" in refused.headers[b"access-control-expose-headers"]
    assert b"access-control-allow-origin" not in stranger.headers
    assert preflight(front, "https://b.example").status == 400


def test_all_origins_can_be_allowed_and_by_default_none_is() -> None:
    everyone = preflight(gate(Echo(), allowed_origins="*"), "https://b.example")
    assert (everyone.status, everyone.headers[b"access-control-allow-origin"]) == (200, b"*")
    app = Echo()
    nobody = preflight(gate(app), "https://b.example")
    assert b"access-control-allow-origin" not in nobody.headers
    assert app.scopes == ["http"]  # it is the app's, like every method


# ---- what is not HTTP ----


def test_the_lifespan_passes() -> None:
    app = Echo()
    client = Client(gate(app, closed=lambda: CLOSED), USER)
    client.scope = {"type": "lifespan"}
    speak(client)
    assert app.scopes == ["lifespan"]


@pytest.mark.parametrize("path", [USER, OTHER])
def test_websockets_pass(path: str) -> None:
    app = Echo()
    front = gate(app)
    client = Client(front, path)
    client.scope["type"] = "websocket"
    speak(client)
    assert (app.scopes, client.sent, front.in_flight) == (["websocket"], [], 0)


def test_websockets_of_users_are_refused_while_it_is_closed() -> None:
    app, reasons = Echo(), []
    client = Client(gate(app, closed=lambda: CLOSED, refused=reasons.append), USER)
    client.scope["type"] = "websocket"
    speak(client)
    assert client.sent == [{"type": "websocket.close", "code": 1013, "reason": CLOSED[1]}]
    assert (app.scopes, reasons) == ([], ["generating"])


# ---- another app behind it ----


def computes(scope: Any) -> bool:
    """Everything that is posted, or a websocket, except the PoC routes: of an app that computes outside /v1 too."""
    posted = scope["type"] == "websocket" or scope["method"] == "POST"
    return posted and not scope["path"].startswith("/api/v1/pow")


def test_routes_that_compute_outside_v1_are_shut_too() -> None:
    app = Echo()
    front = gate(app, rules=GateRules(is_user=computes), closed=lambda: CLOSED, max_body_bytes=10)
    computing = [Client(front, path) for path in (USER, "/invocations", "/inference/v1/generate", "/tokenize")]
    models, chain = Client(front, "/v1/models"), Client(front, POW)
    models.scope["method"] = "GET"
    speak(*computing, models, chain)
    assert [client.status for client in computing] == [503] * 4
    assert computing[1].error["code"] == "generating"
    assert (models.status, chain.status) == (200, 200)


def test_routes_that_compute_outside_v1_are_counted_and_have_the_bound_of_users_bodies() -> None:
    front = gate(Echo(), rules=GateRules(is_user=computes), max_body_bytes=10)
    large = Client(front, "/invocations", [b"x" * 11])
    speak(large)
    assert (large.status, large.error["code"]) == (413, "body_too_large")

    async def meanwhile(body: bytes) -> bytes:
        await refused.speak()
        return body

    full = gate(Echo(meanwhile), rules=GateRules(is_user=computes), max_in_flight=1)
    served, refused = Client(full, "/invocations"), Client(full, "/invocations")
    speak(served)
    assert (served.status, refused.status) == (200, 429)


@pytest.mark.parametrize("ends_streams", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        [b"data: [DONE]\n\n"],
        [b"data: [DO", b"NE]\n\n"],
        [b"data: [DONE]\n", b"\n"],
        [b"data: [DONE]\r\n\r\n"],
        [b"data:[DONE]\n\n"],
    ],
)
def test_an_app_that_ends_its_streams_gets_no_second_done(ends_streams: bool, parts: list[bytes]) -> None:
    app = answering(200, b"text/event-stream", b"data: 1\n\n", *parts)
    client = Client(gate(app, rules=GateRules(is_user=under("/v1/"), ends_streams=ends_streams)), USER)
    speak(client)
    assert client.body == b"".join([b"data: 1\n\n", *parts])


def test_an_app_that_ends_its_streams_is_left_alone() -> None:
    app = answering(200, b"text/event-stream", b"data: 1\n\n")
    client = Client(gate(app, rules=GateRules(is_user=under("/v1/"), ends_streams=True)), USER)
    speak(client)
    assert client.body == b"data: 1\n\n"


# ---- an app with bounds and routes of its own ----


def test_users_without_bounds_here_are_counted_and_their_bodies_go_as_they_come() -> None:
    entry: list[Gate] = []
    all_here = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if entry[0].in_flight == 9:
            all_here.set()
        await all_here.wait()
        parts = [await receive() for _ in range(2)]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"".join(part["body"] for part in parts)})

    unbounded = GateRules(is_user=under("/v1/"), ends_streams=True)
    entry.append(gate(app, rules=unbounded, max_in_flight=None, max_body_bytes=None, max_bodies_bytes=1))
    clients = [Client(entry[0], USER, [b"x" * 500, b"y" * 500], of="192.0.2.1") for _ in range(9)]
    speak(*clients)
    assert [client.body for client in clients] == [b"x" * 500 + b"y" * 500] * 9
    assert entry[0].in_flight == 0


def test_what_passes_is_met_by_nothing() -> None:
    met: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        met.append(scope["method"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"seen"})

    rules = GateRules(is_user=under("/v1/chat"), passes=under("/version", "/v1/models"))
    shut = gate(app, rules=rules, token="s3cret", guard_metrics=True, closed=lambda: CLOSED)
    clients = [Client(shut, path, [b"x" * 5000]) for path in ("/version", "/v1/models", USER, OTHER, "/metrics", POW)]
    clients[0].scope["method"] = "HEAD"
    speak(*clients)
    assert met == ["HEAD", "POST"]
    assert [client.status for client in clients] == [200, 200, 503, 413, 401, 401]


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("", POW, True),
        ("/node", f"/node{POW}", True),
        ("/node", POW, True),
        ("/api", f"/api{POW}", True),
        ("/api", POW, False),  # it is looked for as /v1/pow/validate
        ("/node", f"/nodes{POW}", False),
    ],
)
def test_the_token_is_asked_for_wherever_starlette_finds_the_route(root: str, path: str, found: bool) -> None:
    def computed(_: Request) -> Response:
        return Response("computed")

    app = Starlette(routes=[Route(POW, computed, methods=["POST"])])
    guarded = gate(app, token="s3cret", rules=GateRules(is_user=under("/v1/chat")))
    clients = [Client(guarded, path), Client(guarded, path, authorization="Bearer s3cret")]
    for client in clients:
        client.scope["root_path"] = root
    speak(*clients)
    assert [client.status for client in clients] == ([401, 200] if found else [404, 404])


@pytest.mark.parametrize("path", ["/node/v1/completions", "/v1/completions"])
def test_users_are_shut_out_below_a_root_path(path: str) -> None:
    client = Client(gate(Echo(), closed=lambda: CLOSED), path)
    client.scope["root_path"] = "/node"
    speak(client)
    assert client.status == 503
