"""What clients and receivers can do wrong, and 200 users at once: nothing hangs, is lost, or gets a wrong distance."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from callback_receivers import OK, Receiver
from nodes import (
    CALLBACK_KEY,
    JSON,
    POW,
    ROUND,
    Alone,
    Blocked,
    begin,
    checked,
    claim,
    posted,
    running,
    slowed,
    status,
)
from web import CHAT, TIMEOUT, chat, error_of, events, eventually, pieces, text_of

from poc_kernels.node.node import Node
from poc_kernels.service.callbacks import verify

pytest_plugins = ["round_fixtures"]


def hurried(node: Node) -> None:
    """Callbacks are tried again at once."""
    node.service.callbacks._retry_seconds = (0.01, 0.05)


def received(receiver: Receiver, height: int = ROUND["block_height"]) -> list[tuple[int, float]]:
    """Nonces and distances of a block that were posted, in order."""
    batches = [batch for batch in receiver.contents(path="/generated") if batch["block_height"] == height]
    return [pair for batch in batches for pair in zip(batch["nonces"], batch["dist"], strict=True)]


# ---- receivers ----


def test_a_receiver_that_is_dead_for_the_whole_round_gets_everything_afterwards(
    http: httpx2.Client, node: Node, receiver: Receiver
) -> None:
    hurried(node)
    port = receiver.port
    receiver.stop()
    begin(http, callback_url=receiver.url)
    checked(http, 80)
    found = posted(http, "/stop")["pow_status"]
    eventually(lambda: status(http)["callbacks"]["failed_attempts"] > 0)
    assert status(http)["callbacks"]["pending_batches"] > 0
    returned = Receiver(port=port)
    try:
        eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
    finally:
        returned.stop()
    assert received(returned) == list(zip(found["valid_nonces"], found["valid_distances"], strict=True))
    assert all(verify(body, headers["X-Signature"], CALLBACK_KEY.encode()) for _, headers, body, _, _ in returned.posts)
    assert status(http)["callbacks"]["dropped_nonces"] == 0


def test_beyond_the_bound_the_drops_are_counted(model_dir: Path, receiver: Receiver) -> None:
    port = receiver.port
    receiver.stop()
    with running(model_dir, callback_nonces=6) as (node, http):
        hurried(node)
        begin(http, callback_url=receiver.url)
        checked(http, 80)
        found = posted(http, "/stop")["pow_status"]
        eventually(lambda: status(http)["callbacks"]["failed_attempts"] > 0)
        returned = Receiver(port=port)
        try:
            eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
        finally:
            returned.stop()
        pairs = list(zip(found["valid_nonces"], found["valid_distances"], strict=True))
        dropped = status(http)["callbacks"]["dropped_nonces"]
        assert 0 < dropped < len(pairs)
        assert received(returned) == pairs[dropped:]  # the oldest went
        assert f'poc_callback_dropped_nonces_total{{kind="generated"}} {dropped:.1f}' in http.get("/metrics").text


def test_a_slow_receiver_does_not_slow_the_round(http: httpx2.Client, node: Node) -> None:
    entered, answer = threading.Event(), threading.Event()

    def slow(path: str, content: Any) -> Any:
        entered.set()
        assert answer.wait(TIMEOUT)
        return OK

    receiver = Receiver(answer=slow)
    try:
        begin(http, callback_url=receiver.url)
        assert entered.wait(TIMEOUT)
        least = status(http)["total_checked"] + 100
        checked(http, least)  # while it still has not answered
        found = posted(http, "/stop")["pow_status"]
        answer.set()
        eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
    finally:
        answer.set()
        receiver.stop()
    assert received(receiver) == list(zip(found["valid_nonces"], found["valid_distances"], strict=True))


# ---- clients ----


@pytest.mark.parametrize("state", ["init", "generate"])
def test_a_client_that_leaves_mid_stream(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(node.inference.model, "forward", slowed(node.inference.model.forward, 0.01))
    with http.stream("POST", CHAT, json=chat(stream=True)) as stream:
        coming = pieces(events(stream.iter_lines()))
        next(coming)
        begin(http, state)
        if state == "generate":
            eventually(lambda: node.turns.inference_paused)
        assert node.app.in_flight == 1
    eventually(lambda: node.app.in_flight == 0)
    posted(http, "/stop")
    assert node.inference.wait_idle(TIMEOUT)
    monkeypatch.undo()
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_a_client_that_leaves_before_its_answer_frees_the_engine(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.inference.model, "forward", slowed(node.inference.model.forward, 0.02))
    with pytest.raises(httpx2.ReadTimeout):
        http.post(CHAT, json=chat(max_tokens=1000), timeout=0.3)
    eventually(lambda: node.app.in_flight == 0)
    assert node.inference.wait_idle(5)  # a thousand steps would take longer


def test_a_slow_body_does_not_delay_a_round(model_dir: Path) -> None:
    with running(model_dir, drain_seconds=2 * TIMEOUT) as (node, http):
        with socket.create_connection((http.base_url.host, http.base_url.port), TIMEOUT) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            eventually(lambda: node.app._bodies.total == 1)
            begin(http)
            checked(http, 1)
            assert (node.app._bodies.total, node.app.in_flight) == (1, 0)
        posted(http, "/stop")


def test_a_client_that_leaves_before_its_verdict(
    http: httpx2.Client, node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http, "validate", callback_url=receiver.url)
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    with pytest.raises(httpx2.ReadTimeout):
        http.post(f"{POW}/validate", json=claim([1, 2], [1.0, 1.0]), timeout=0.3)
    assert blocked.entered.wait(TIMEOUT)
    blocked.release()
    receiver.wait(1)
    assert receiver.contents(path="/validated")[0]["nonces"] == [1, 2]


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /api/v1/pow/validate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
        b"POST /api/v1/pow/validate HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999999999999999\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
    ],
    ids=lambda sent: repr(sent)[:40],
)
def test_malformed_requests(http: httpx2.Client, node: Node, sent: bytes) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), TIMEOUT) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    eventually(lambda: node.app.in_flight == 0)
    assert http.get("/health").status_code == 200


def test_requests_that_continuous_batching_would_die_of(http: httpx2.Client, node: Node) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": ""}),
        (CHAT, {"messages": []}),
        (CHAT, chat(" a" * 4000, max_tokens=1000)),
        (CHAT, chat(max_tokens=0)),
        (CHAT, chat(max_tokens=2**70)),
        (CHAT, {"messages": "x" * 5000}),
    ):
        for stream in (False, True):
            answer = http.post(path, json={**body, "stream": stream})
            assert answer.status_code in (400, 413), answer.text
            error_of(answer)
    for content in (b"[" * 5000, b"{", b"\xff", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'):
        answer = http.post(CHAT, content=content, headers=JSON)
        assert answer.status_code == 400
        error_of(answer)
    assert node.inference.restarts == 0
    assert node.inference.trouble() is None
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_prompts_larger_than_the_cache(model_dir: Path) -> None:
    with running(model_dir, kv_blocks=8, kv_block_size=32) as (node, http):
        answer = http.post(CHAT, json=chat(" a" * 500))
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
        answer = http.post(CHAT, json=chat(max_tokens=300))
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
        # More at once than the cache holds: one after the other.
        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda _: text_of(http.post(CHAT, json=chat(max_tokens=100))), range(6)))
        assert len(set(texts)) == 1
        assert node.inference.restarts == 0


def test_one_request_id_for_all(http: httpx2.Client) -> None:
    def ask(n: int) -> httpx2.Response:
        return http.post(CHAT, json=chat(f"Question {n % 2}", max_tokens=8), headers={"x-request-id": "the-same"})

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))
    assert {answer.headers["x-request-id"] for answer in answers} == {"the-same"}
    assert [text_of(answer) for answer in answers] == [text_of(ask(n)) for n in (0, 1)] * 6


# ---- all at once ----


def said(answer: httpx2.Response) -> str:
    """What a chat says, streamed or not."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return text_of(answer)
    *lines, done = [line for line in answer.text.splitlines() if line]
    assert done == "data: [DONE]"
    return "".join(pieces(events(iter(lines))))


class Crowd:
    """Users that ask without end, in a thread with an event loop, until they are told to stop.

    Each answer must be the right one, or a clean refusal.
    """

    def __init__(self, url: str, asked: list[tuple[dict[str, Any], str]], users: int) -> None:
        self._url, self._asked, self._users = url, asked, users
        self._outcomes: Counter[str] = Counter()
        self._over = False
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Crowd:
        self._end = self._pool.submit(asyncio.run, self._all())
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        try:
            self._end.result(2 * TIMEOUT)
        finally:
            self._pool.shutdown()

    def outcomes(self) -> Counter[str]:
        """How many were served, and how many refused with each code, until now."""
        if self._end.done():
            self._end.result()  # raises what went wrong
        return Counter(self._outcomes)

    async def _all(self) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits) as http:
            await asyncio.gather(*(self._ask(http, user) for user in range(self._users)))

    async def _ask(self, http: httpx2.AsyncClient, user: int) -> None:
        body, expected = self._asked[user % len(self._asked)]
        while not self._over:
            answer = await http.post(CHAT, json=body)
            if answer.status_code == 200:
                assert said(answer) == expected
                self._outcomes["served"] += 1
            else:
                assert answer.status_code in (429, 503), answer.text
                assert int(answer.headers["retry-after"]) > 0
                self._outcomes[str(error_of(answer)["code"])] += 1
                await asyncio.sleep(0.4)  # sooner than it was told to


def test_200_users_through_all_states(model_dir: Path, alone: Alone, receiver: Receiver) -> None:
    with running(model_dir, max_in_flight=300, callback_key=CALLBACK_KEY, drain_seconds=0.05) as (node, http):
        bodies = [chat(f"What is {n // 2} times 7?", max_tokens=8, stream=n % 2 == 0) for n in range(8)]
        asked = [(body, said(http.post(CHAT, json=body))) for body in bodies]
        found = {}
        with Crowd(str(http.base_url), asked, 200) as crowd, ThreadPoolExecutor(3) as validators:
            eventually(lambda: crowd.outcomes()["served"] > 50)
            for number in range(2):
                block = {"block_height": number, "block_hash": f"block {number}"}
                changes = {**block, "use_random_projection": number != 1}
                begin(http, callback_url=receiver.url, **changes)
                checked(http, 40)
                posted(http, "/phase/validate")
                served = crowd.outcomes()["served"]
                parts = [range(13), range(7, 30), [50, 3, 11]]
                verdicts = [validators.submit(posted, http, "/validate", claim(part, **block)) for part in parts]
                for part, verdict in zip(parts, verdicts, strict=True):
                    assert verdict.result(TIMEOUT)["distances"] == alone.distances(part, **changes)
                eventually(lambda least=served: crowd.outcomes()["served"] > least)
                posted(http, "/phase/generate")
                checked(http, status(http)["total_checked"] + 20)
                found[number] = (changes, posted(http, "/stop")["pow_status"])
        outcomes = crowd.outcomes()
        assert outcomes["generating"] > 0
        assert set(outcomes) <= {"served", "generating", "overloaded"}
        eventually(lambda: status(http)["callbacks"]["pending_batches"] == 0)
        assert http.get("/health").status_code == 200
        assert node.inference.restarts == 0
    for number, (changes, result) in found.items():
        pairs = list(zip(result["valid_nonces"], result["valid_distances"], strict=True))
        assert received(receiver, number) == pairs
        assert alone.distances(result["valid_nonces"], **changes) == result["valid_distances"]
