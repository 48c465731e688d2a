"""Connections of the server, before an app of a few lines: what clients that are slow, silent or many can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from web import TIMEOUT, eventually

from poc_kernels.node import connections as connections_module
from poc_kernels.node.connections import Connection, Connections, listener, raise_descriptors

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
LONG = 3600.0
PART = b"x" * 2**14


class App:
    """Answers /: with the body; /large: with many parts; /waits: when it is released."""

    def __init__(self, parts: int = 0) -> None:
        self.ended: list[str] = []
        self.release = threading.Event()
        self._parts = parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message, body = {"more_body": True}, b""
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.append("left")
                return
            body += message.get("body", b"")
        if scope["path"] == "/waits":
            await asyncio.to_thread(self.release.wait, TIMEOUT)
        headers = [(b"x-body", body)] + ([] if scope["path"] == "/large" else [(b"content-length", b"0")])
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(self._parts if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": PART, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.ended.append("answered")


class Served:
    """What a test sees of a server, and its clients."""

    def __init__(self, address: tuple[str, int], server: uvicorn.Server, connections: Connections) -> None:
        self.address, self.server, self.connections = address, server, connections
        self._clients = contextlib.ExitStack()

    def connect(
        self, data: bytes = b"", of: str = "127.0.0.1", read_buffer: int | None = None, seen: bool = True
    ) -> socket.socket:
        """A connection from an address of this machine; once the server has it, unless it need not be ``seen``."""
        client = self._clients.enter_context(socket.socket())
        client.settimeout(TIMEOUT)
        if read_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
        client.bind((of, 0))
        client.connect(self.address)
        client.sendall(data)
        name = client.getsockname()
        eventually(lambda: not seen or name in [each.client for each in self.open()])
        return client

    def open(self) -> list[Connection]:
        """The server's connections."""
        return [each for of_client in list(self.connections._open.values()) for each in list(of_client)]

    def close(self) -> None:
        """Close all clients."""
        self._clients.close()


@contextlib.contextmanager
def served(
    app: App, maximum: int = 100, send_seconds: float = LONG, keep_alive_seconds: float = LONG, **chosen: Any
) -> Iterator[Served]:
    """A real server of ``app`` on loopback."""
    connections = Connections(maximum)
    listening = listener("127.0.0.1", 0, send_seconds)
    options = {"connections": connections, "head_seconds": LONG, "max_unread_bytes": 2**20, **chosen}
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, **options),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=keep_alive_seconds,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    address = listening.getsockname()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    running = Served(address, server, connections)
    try:
        yield running
    finally:
        app.release.set()
        running.close()
        server.should_exit = server.force_exit = True
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    eventually(lambda: len(connections) == 0)
    assert (connections._open, connections._waiting) == ({}, {})


def answer(client: socket.socket) -> bytes:
    """The head of the answer that comes."""
    data = b""
    while b"\r\n\r\n" not in data and (part := client.recv(4096)):
        data += part
    return data


def is_cut(client: socket.socket) -> bool:
    """Whether the connection ends, once all that it has to say is read."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(2**16):
            pass
    return True


# ---- the socket ----


def test_answers_and_tokens_leave_at_once() -> None:
    with served(App(), send_seconds=7.5) as here:
        here.connect()
        (connection,) = here.open()
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7500


@pytest.mark.parametrize(("seconds", "milliseconds"), [(1e-9, 1), (0.5, 500), (1e12, 2**31 - 1)])
def test_any_time_to_send_is_one_that_the_kernel_takes(seconds: float, milliseconds: int) -> None:
    with listener("127.0.0.1", 0, seconds) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds


@pytest.mark.parametrize(
    ("limits", "wanted", "given", "set_to"),
    [
        ((1024, 4096), 2000, 2000, (2000, 4096)),
        ((1024, 4096), 8000, 4096, (4096, 4096)),
        ((64, 64), 4096, 64, None),
        ((9000, 20000), 4096, 9000, None),
        ((1024, resource.RLIM_INFINITY), 4096, 4096, (4096, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, 4096, None),
    ],
)
def test_the_limit_on_descriptors_is_raised_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, given: int, set_to: tuple[int, int] | None
) -> None:
    chosen = []
    monkeypatch.setattr(connections_module.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(connections_module.resource, "setrlimit", lambda which, values: chosen.append(values))
    assert raise_descriptors(wanted) == given
    assert chosen == ([] if set_to is None else [set_to])


# ---- heads ----


@pytest.mark.parametrize("sent", [b"", GET[:-1], GET + b"GET / HT"], ids=["nothing", "a part", "of the second"])
def test_a_head_that_does_not_come(sent: bytes) -> None:
    with served(App(), head_seconds=0.1) as here:
        assert is_cut(here.connect(sent, seen=False))


def test_a_head_that_comes_byte_by_byte_is_not_waited_for_longer() -> None:
    head = GET[:-4] + b"\r\nX-Name: " + b"a" * 10_000
    with served(App(), head_seconds=0.3) as here:
        client = here.connect()
        pause = threading.Event()
        sent = 0
        with contextlib.suppress(OSError):
            for sent in range(len(head)):  # it would take 100 s
                client.sendall(head[sent : sent + 1])
                pause.wait(0.01)
        assert 0 < sent < len(head) - 1


def test_a_request_whose_head_came_has_time() -> None:
    app = App()
    with served(app, head_seconds=2.0) as here:
        kept, slow = here.connect(GET), here.connect(POST)
        waits = here.connect(GET.replace(b"/ ", b"/waits "))
        assert answer(kept).startswith(b"HTTP/1.1 200")
        for client, seconds in ((kept, 2.5), (slow, 0.01), (waits, 0.01)):  # beyond the time for a head
            client.settimeout(seconds)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.settimeout(TIMEOUT)
        slow.sendall(b"body")
        assert b"x-body: body" in answer(slow)
        app.release.set()
        assert answer(waits).startswith(b"HTTP/1.1 200")
        kept.sendall(GET)
        assert answer(kept).startswith(b"HTTP/1.1 200")


def test_a_kept_connection_has_its_own_time() -> None:
    with served(App(), keep_alive_seconds=0.1) as here:
        client = here.connect(GET)
        assert answer(client).startswith(b"HTTP/1.1 200")
        assert is_cut(client)


# ---- how many ----


def test_one_more_ends_the_one_that_has_waited_longest() -> None:
    app = App()
    with served(app, maximum=4) as here:
        busy = here.connect(GET.replace(b"/ ", b"/waits "))
        head, kept, body = here.connect(GET[:-1]), here.connect(GET), here.connect(POST + b"bo")
        assert answer(kept).startswith(b"HTTP/1.1 200")
        waiting = [head, body, kept] if body_waits_first(here, body, kept) else [head, kept, body]
        for each in waiting:
            here.connect(GET[:-1])
            assert is_cut(each)
            assert len(here.connections) == 4
        app.release.set()
        assert answer(busy).startswith(b"HTTP/1.1 200")
        eventually(lambda: "left" in app.ended)  # the body that did not come


def body_waits_first(here: Served, body: socket.socket, kept: socket.socket) -> bool:
    """Whether the server began to wait for this body before it waited for the other's next request."""
    order = [each.client for each in here.connections._waiting["127.0.0.1"]]
    return order.index(body.getsockname()) < order.index(kept.getsockname())


def test_it_is_one_of_the_client_that_has_most() -> None:
    with served(App(), maximum=4) as here:
        first = here.connect(GET, of="127.0.0.2")
        assert answer(first).startswith(b"HTTP/1.1 200")
        many = [here.connect(GET[:-1]) for _ in range(20)]
        assert all(map(is_cut, many[:-3]))
        first.sendall(GET)
        assert answer(first).startswith(b"HTTP/1.1 200")


def test_where_all_are_served_one_more_is_refused() -> None:
    app = App()
    with served(app, maximum=2) as here:
        busy = [here.connect(GET.replace(b"/ ", b"/waits ")) for _ in range(2)]
        with socket.create_connection(here.address, TIMEOUT) as refused:
            assert is_cut(refused)
        app.release.set()
        assert all(answer(each).startswith(b"HTTP/1.1 200") for each in busy)


def test_a_client_with_more_than_half_of_them_gives_up_one_that_is_served() -> None:
    app = App()
    waits = GET.replace(b"/ ", b"/waits ")
    with served(app, maximum=4) as here:
        other = here.connect(GET, of="127.0.0.2")
        assert answer(other).startswith(b"HTTP/1.1 200")
        many = [here.connect(waits) for _ in range(3)]
        late = here.connect(waits, of="127.0.0.2")
        assert is_cut(many[0])
        fair = here.connect(waits, of="127.0.0.3")  # half of them is not too much: one that waits ends
        assert is_cut(other)
        app.release.set()
        assert all(answer(each).startswith(b"HTTP/1.1 200") for each in [*many[1:], late, fair])


def test_where_all_are_served_a_client_with_most_gives_one_up_for_one_with_fewer() -> None:
    app = App()
    waits = GET.replace(b"/ ", b"/waits ")
    with served(app, maximum=4) as here:
        busy = [here.connect(waits, of=f"127.0.0.{number}") for number in (2, 2, 3, 3)]
        late = here.connect(waits, of="127.0.0.4")
        assert is_cut(busy[0])
        most = here.connect(seen=False, of="127.0.0.3")
        assert is_cut(most)
        app.release.set()
        assert all(answer(each).startswith(b"HTTP/1.1 200") for each in [*busy[1:], late])


def test_a_client_is_served_beside_hundreds_that_say_nothing() -> None:
    with served(App(), maximum=50) as here:
        client = here.connect(GET, of="127.0.0.2")
        assert answer(client).startswith(b"HTTP/1.1 200")
        silent = [socket.create_connection(here.address, TIMEOUT) for _ in range(300)]
        try:
            for _ in range(3):
                client.sendall(GET)
                assert answer(client).startswith(b"HTTP/1.1 200")
                fresh = http.client.HTTPConnection(*here.address, timeout=TIMEOUT)
                fresh.request("GET", "/")
                assert fresh.getresponse().status == 200
                fresh.close()
            eventually(lambda: len(here.connections) <= 50)
        finally:
            for each in silent:
                each.close()


# ---- answers that nobody takes ----


def test_an_app_ends_although_its_answer_is_not_taken_and_the_connection_is_cut() -> None:
    app = App(parts=20)  # 320 KiB
    with served(app, send_seconds=1.0) as here:
        here.connect(GET.replace(b"/ ", b"/large "), read_buffer=2304)
        eventually(lambda: app.ended == ["answered"])
        eventually(lambda: here.open() == [])


def test_an_app_waits_for_a_client_only_beyond_the_bound_and_not_for_ever() -> None:
    app = App(parts=2000)  # 31 MiB: more than sockets hold
    with served(app, send_seconds=1.0, max_unread_bytes=2**16) as here:
        client = here.connect(GET.replace(b"/ ", b"/large "), read_buffer=2304)
        eventually(lambda: any(each.flow.write_paused for each in here.open()))
        (connection,) = here.open()
        assert connection.transport.get_write_buffer_size() <= 2**16 + 2 * len(PART)
        assert app.ended == []
        eventually(lambda: here.open() == [])
        eventually(lambda: app.ended == ["answered"])  # into nothing
        assert is_cut(client)
