"""A vLLM server with rounds, as its users and its operator see it."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx2
from callback_receivers import Receiver
from nodes import POW, Alone, begin, checked, claim, posted, queued, status
from served import NAME
from vllm_server import SLOW, VllmProcess, idle
from web import CHAT, DONE, TIMEOUT, Stream, chat, error_of, events, eventually, pieces, streamed, text_of

from poc_kernels.service.gate import MLNODE_PREFIX

pytest_plugins = ["vllm_server"]

LONG = {"max_tokens": 800, "ignore_eos": True}


@pytest.fixture(scope="module")
def long_text(idle_http: httpx2.Client) -> str:
    return streamed(idle_http, **LONG)


def standing(http: httpx2.Client, stream: Stream) -> int:
    """How much of its text has come, once no more comes while nonces are tried: the engine may be ahead of clients."""
    tried, count = status(http)["total_checked"], -1
    while count != len(stream.text):
        count = len(stream.text)
        tried = checked(http, tried + 200)["total_checked"]
    return count


def test_every_route_that_computes_is_shut_while_generating_and_no_other(
    http: httpx2.Client, server: VllmProcess
) -> None:
    told = re.findall(r"Route: (\S+), Methods: (.*)", "".join(server.log))  # vLLM logs all that its app has
    found = [(method, path) for path, methods in told for method in methods.strip().split(", ")]
    of_rounds = (POW, MLNODE_PREFIX)
    computing = [each for each in found if each[0] not in ("GET", "HEAD") and not each[1].startswith(of_rounds)]
    telling = [path for method, path in found if method == "GET" and "{" not in path]
    assert {("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/inference/v1/generate")} <= set(computing)
    assert {"/health", "/metrics", "/version", "/v1/models", f"{POW}/status"} <= set(telling)
    begin(http)
    for method, path in computing:
        answer = http.request(method, path, content=b"{")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10"), path
        assert (error_of(answer)["type"], error_of(answer)["code"]) == ("server_error", "generating")
    for path in telling:
        assert http.get(path).status_code == 200, path
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [NAME]
    posted(http, "/phase/validate")
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


@pytest.mark.parametrize("path", ["/phase/validate", "/stop"])
def test_a_stream_is_paused_while_generating_and_has_the_same_text(
    http: httpx2.Client, long_text: str, path: str
) -> None:
    with Stream(http, **LONG, **SLOW) as stream:
        begin(http)
        checked(http, 4)  # users were paused before
        before = standing(http, stream)
        checked(http, status(http)["total_checked"] + 200)
        assert len(stream.text) == before
        assert DONE not in stream.lines
        assert http.get("/health").status_code == 200
        posted(http, path)
        assert stream.result() == long_text
    assert stream.lines[-1] == DONE
    assert stream.lines.count(DONE) == 1


def test_a_distance_has_the_same_bits_however_it_comes(http: httpx2.Client) -> None:
    begin(http, use_random_projection=True)
    found = checked(http, 60)
    posted(http, "/phase/validate")
    generated = dict(zip(found["valid_nonces"], found["valid_distances"], strict=True))
    nonces = list(generated)[:24]
    expected = [generated[nonce] for nonce in nonces]

    def computed(nonces: list[int]) -> list[float]:
        return posted(http, "/validate", claim(nonces))["distances"]

    assert computed(nonces) == expected
    assert computed(nonces[::-1]) == expected[::-1]
    assert [computed([nonce]) for nonce in nonces[:5]] == [[distance] for distance in expected[:5]]
    with ThreadPoolExecutor(2) as pool:
        beside = [pool.submit(computed, nonces[start::2]) for start in (0, 1)]
        with Stream(http, max_tokens=200, ignore_eos=True) as stream:
            assert computed(nonces[::3]) == expected[::3]
            stream.result()
        assert [answer.result(TIMEOUT) for answer in beside] == [expected[0::2], expected[1::2]]


def test_users_and_validation_do_not_change_each_other(http: httpx2.Client, alone: Alone) -> None:
    bodies = [chat(f"What is {n} times 7?", max_tokens=40, ignore_eos=True) for n in range(4)]
    expected = [text_of(http.post(CHAT, json=body)) for body in bodies]
    begin(http, "validate")
    with ThreadPoolExecutor(5) as pool:
        verdicts = [pool.submit(posted, http, "/validate", claim(range(60))) for _ in range(1)]
        for _ in range(3):
            texts = [text_of(answer) for answer in pool.map(lambda body: http.post(CHAT, json=body), bodies)]
            assert texts == expected
        assert [verdict.result(TIMEOUT)["distances"] for verdict in verdicts] == [alone.distances(range(60))]


def test_metrics_and_health(http: httpx2.Client) -> None:
    posted(http, "/stop")  # whatever went before
    text_of(http.post(CHAT, json=chat(max_tokens=2)))
    assert http.get("/health").json() == {"status": "ok", "state": "STOPPED", "reasons": []}
    names = {line.partition("{")[0] for line in http.get("/metrics").text.splitlines()}
    assert {"vllm:num_requests_running", "vllm:generation_tokens_total", "poc_nonces_checked_total"} <= names


def test_users_have_vllm_s_own_bounds(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x" * 2**21})
    assert answer.status_code == 400
    assert "4096" in error_of(answer)["message"]


# ---- clients that leave ----


def test_a_client_that_leaves_mid_stream(http: httpx2.Client) -> None:
    with http.stream("POST", CHAT, json=chat(stream=True, **LONG, **SLOW)) as stream:
        next(pieces(events(stream.iter_lines())))
    eventually(lambda: idle(http))


def test_a_client_that_leaves_while_its_answer_is_paused(http: httpx2.Client) -> None:
    with http.stream("POST", CHAT, json=chat(stream=True, **LONG, **SLOW)) as stream:
        next(pieces(events(stream.iter_lines())))
        begin(http)
        checked(http, 40)
    eventually(lambda: idle(http))
    posted(http, "/stop")
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_a_client_that_leaves_before_its_answer_frees_the_engine(http: httpx2.Client, metrics: Any) -> None:
    before = metrics("vllm:generation_tokens_total")
    with pytest.raises(httpx2.ReadTimeout):
        http.post(CHAT, json=chat(**LONG, **SLOW), timeout=0.2)
    eventually(lambda: idle(http))
    assert metrics("vllm:generation_tokens_total") < before + LONG["max_tokens"]  # it did not just come to its end


def test_a_client_that_leaves_before_its_verdict(http: httpx2.Client, alone: Alone, receiver: Receiver) -> None:
    begin(http, "validate", callback_url=receiver.url)
    queued(http, claim(range(30)))
    body = json.dumps(claim([1, 2], [1.0, 1.0])).encode()
    head = f"POST {POW}/validate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((http.base_url.host, http.base_url.port), TIMEOUT) as connection:
        connection.sendall(head + body)
        eventually(lambda: status(http)["validation"]["queued_batches"] != 1)
    receiver.wait(1)
    (told,) = receiver.contents(path="/validated")
    assert (told["nonces"], told["dist"]) == ([1, 2], alone.distances([1, 2]))


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /api/v1/pow/validate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
    ],
    ids=lambda sent: repr(sent)[:40],
)
def test_malformed_requests(http: httpx2.Client, sent: bytes) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), TIMEOUT) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert http.get("/health").status_code == 200
