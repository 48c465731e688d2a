"""Clients of a node: one whose waits are measured, and those that stand in its way."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

HOST = "127.0.0.1"
_OTHERS = "127.0.0.2"
"""The address of those that stand in the way: another client's."""
_TIMEOUT = 120.0
CHAT = "/v1/chat/completions"


@dataclass
class Waits:
    """What one client waited for, in seconds, and how often it was refused or cut off."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    failed: int = 0

    def figures(self) -> dict[str, float]:
        """Return medians, 99th percentiles and the largest, in milliseconds."""
        return {
            "first_p50_ms": _percentile(self.first, 50),
            "between_p50_ms": _percentile(self.between, 50),
            "between_p99_ms": _percentile(self.between, 99),
            "health_p50_ms": _percentile(self.health, 50),
            "health_max_ms": 1e3 * max(self.health),
            "failed": self.failed,
        }


def _percentile(seconds: list[float], percent: int) -> float:
    return 1e3 * (statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1])


def _body(tokens: int, stream: bool, content: str = "What is a proof?") -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "stream": stream}
    ).encode()


class Client:
    """A client on a kept connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection(HOST, port, timeout=_TIMEOUT)

    def health(self, waits: Waits) -> None:
        """Ask for the node's health."""
        began = time.perf_counter()
        self.connection.request("GET", "/health")
        self.connection.getresponse().read()
        waits.health.append(time.perf_counter() - began)

    def answer(self, tokens: int) -> int:
        """Ask for an answer that is not streamed; its status."""
        self.connection.request("POST", CHAT, _body(tokens, False), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def stream(self, waits: Waits, tokens: int) -> None:
        """Ask for an answer that is streamed, and take each token's time."""
        began = time.perf_counter()
        self.connection.request("POST", CHAT, _body(tokens, True), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        times = [time.perf_counter() for line in iter(answer.readline, b"") if b'"content"' in line]
        if answer.status != 200 or not times:
            waits.failed += 1
            return
        waits.first.append(times[0] - began)
        waits.between.extend(later - earlier for earlier, later in itertools.pairwise(times))


def requests_per_second(port: int, clients: int, seconds: float) -> float:
    """Return how many answers of one token a closed loop of clients gets, each on a kept connection."""
    deadline, counts = time.monotonic() + seconds, [0] * clients

    def run(index: int) -> None:
        client = Client(port)
        while time.monotonic() < deadline:
            client.answer(1)
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def waits_of_a_client(port: int, streams: int, tokens: int) -> Waits:
    """Return what a client waits that comes anew for each stream, and asks for the health before it."""
    waits = Waits()
    for _ in range(streams):
        client = Client(port)
        try:
            client.health(waits)
            client.stream(waits, tokens)
        except (OSError, http.client.HTTPException):
            waits.failed += 1
        client.connection.close()
    return waits


@contextlib.contextmanager
def never_reading(port: int, count: int, tokens: int) -> Iterator[None]:
    """Have clients ask for streams that they never read."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            _send(client, port, _posted(_body(tokens, True)))
        yield


@contextlib.contextmanager
def silent(port: int, count: int) -> Iterator[None]:
    """Have clients connect that send half a head."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            _send(stack.enter_context(socket.socket()), port, b"GET /health HTTP/1.1\r\nHost: x")
        yield


@contextlib.contextmanager
def long_prompts(port: int, count: int, size: int) -> Iterator[None]:
    """Have clients post prompts of ``size`` bytes."""
    prompt = ("proof " * (size // 6))[: size - 200]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            _send(stack.enter_context(socket.socket()), port, _posted(_body(1, False, prompt)))
        yield


def _send(client: socket.socket, port: int, data: bytes) -> None:
    client.settimeout(_TIMEOUT)
    client.bind((_OTHERS, 0))
    with contextlib.suppress(ConnectionError):  # the node may end a connection of which there are too many
        client.connect((HOST, port))
        client.sendall(data)


def _posted(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
