"""What tests of any app need: a real server, clients with time-outs, and what chats and streams say."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx2
import uvicorn

TIMEOUT = 60
"""Seconds; only against hangs."""

CHAT = "/v1/chat/completions"
DONE = "data: [DONE]"


@contextlib.contextmanager
def serving(app: Any, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """A real server of ``app`` on a free port of this machine; its URL."""
    # Idle connections are kept longer than clients keep theirs, or a request could meet one that closes.
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        log_level="error",
        lifespan=lifespan,
        timeout_keep_alive=2 * TIMEOUT,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit, server.force_exit = True, lifespan == "off"  # the end of a lifespan is waited for
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def client(url: str) -> httpx2.Client:
    """A client all of whose waits end."""
    return httpx2.Client(base_url=url, timeout=TIMEOUT)


def chat(content: str = "What is a proof?", **fields: Any) -> dict[str, Any]:
    """A body for the chat route."""
    return {"messages": [{"role": "user", "content": content}], **fields}


def text_of(answer: httpx2.Response) -> str:
    """What a chat that was not streamed says."""
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events as they come."""
    for line in lines:
        if line:
            assert line.startswith("data: "), line
            yield json.loads(line.removeprefix("data: "))


def pieces(stream: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The text of a chat's chunks as they come."""
    for event in stream:
        content = event["choices"][0]["delta"].get("content")
        if content is not None:
            yield content


class Stream:
    """A chat that is streamed in a thread; its text as it comes."""

    def __init__(self, http: httpx2.Client, **fields: Any) -> None:
        self.text: list[str] = []
        self.first = threading.Event()
        self.lines: list[str] = []
        self._http, self._fields = http, fields
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(self._read)

    def _read(self) -> str:
        with self._http.stream("POST", CHAT, json=chat(stream=True, **self._fields)) as stream:
            assert stream.status_code == 200
            for piece in pieces(events(self._before_done(stream.iter_lines()))):
                self.text.append(piece)
                self.first.set()
        return "".join(self.text)

    def _before_done(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            if line:
                self.lines.append(line)
            if line != DONE:
                yield line

    def result(self) -> str:
        """The whole text."""
        return self._result.result(TIMEOUT)

    def ended(self) -> None:
        """Wait until it is over, in order or not."""
        self._result.exception(TIMEOUT)

    def __enter__(self) -> Stream:
        assert self.first.wait(TIMEOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def streamed(http: httpx2.Client, **fields: Any) -> str:
    """The text of a chat while nothing else runs. (Those that are not streamed lack the space at their beginning.)"""
    with Stream(http, **fields) as stream:
        return stream.result()


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The OpenAI error object that an answer must be."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def eventually(condition: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    """Wait until a condition that no event announces holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
