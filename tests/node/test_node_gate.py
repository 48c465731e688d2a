"""What users get while a node proves its compute: refused, drained, paused, served."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import torch
from nodes import Alone, Blocked, begin, checked, claim, posted, slowed, status
from served import NAME
from web import CHAT, DONE, TIMEOUT, Stream, chat, error_of, eventually, streamed, text_of

from poc_kernels.node.node import Node

pytest_plugins = ["round_fixtures"]


@pytest.fixture
def openai_client(http: httpx2.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="x", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def test_users_are_refused_while_generating(http: httpx2.Client) -> None:
    begin(http)
    for answer in (
        http.post(CHAT, json=chat()),
        http.post("/v1/completions", json={"prompt": "x"}),
        http.post("/v1/responses", json={"input": "x"}),
        http.post(CHAT, content=b"{"),
        http.get("/v1/models"),
    ):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "10"
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("server_error", "generating")
    assert http.get("/health").status_code == 200
    assert 'poc_gate_refusals_total{reason="generating"}' in http.get("/metrics").text
    posted(http, "/phase/validate")
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_a_stream_is_drained_before_the_first_nonce(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streamed(http, max_tokens=60)
    monkeypatch.setattr(node.service.worker, "_drain_seconds", TIMEOUT)
    in_flight = []
    forward = node.engine.forward

    def watched(*arguments: Any) -> torch.Tensor:
        in_flight.append(node.inference._router.in_flight())
        return forward(*arguments)

    monkeypatch.setattr(node.engine, "forward", watched)
    monkeypatch.setattr(node.inference.model, "forward", slowed(node.inference.model.forward, 0.01))
    with Stream(http, max_tokens=60) as stream:
        begin(http)
        assert in_flight == []
        assert stream.result() == expected
    checked(http, 4)
    assert set(in_flight) == {0}
    assert stream.lines[-1] == DONE


@pytest.mark.parametrize("path", ["/phase/validate", "/stop"])
def test_a_stream_beyond_the_deadline_is_paused_and_finishes_afterwards(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    expected = streamed(http, max_tokens=150)
    monkeypatch.setattr(node.inference.model, "forward", slowed(node.inference.model.forward, 0.005))
    with Stream(http, max_tokens=150) as stream:
        begin(http)
        eventually(lambda: node.turns.inference_paused)
        batching = node.inference._batching
        assert batching is not None
        eventually(lambda: batching._turn.waiting)  # the step that ran has ended
        first = checked(http, 4)["total_checked"]
        before = batching._manager.current_batch
        checked(http, first + 100)
        assert batching._manager.current_batch == before
        assert 0 < len(stream.text) < 150
        assert node.app.in_flight == node.inference._router.in_flight() == 1
        assert http.get("/health").status_code == 200
        posted(http, path)
        assert stream.result() == expected
    assert stream.lines[-1] == DONE


def test_users_are_served_while_validating(
    http: httpx2.Client, node: Node, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text_of(http.post(CHAT, json=chat(max_tokens=8)))
    begin(http, "validate")
    monkeypatch.setattr(node.engine, "forward", slowed(node.engine.forward, 0.1))
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(posted, http, "/validate", claim(range(60)))
        eventually(lambda: status(http)["queued_nonces"] > 0)
        assert text_of(http.post(CHAT, json=chat(max_tokens=8))) == expected
        assert status(http)["queued_nonces"] > 0  # meanwhile the validation goes on
        assert verdict.result(TIMEOUT)["distances"] == alone.distances(range(60))


def test_every_event_stream_ends_with_done(http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(path: str, body: dict[str, Any]) -> list[str]:
        with http.stream("POST", path, json={**body, "stream": True}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            return [line for line in stream.iter_lines() if line]

    for path, body in (
        (CHAT, chat(max_tokens=3)),
        ("/v1/completions", {"prompt": "x", "max_tokens": 3}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
    ):
        assert lines(path, body)[-1] == DONE
    assert DONE not in http.post(CHAT, json=chat(max_tokens=3)).text
    blocked = Blocked(node.inference.model.forward)
    monkeypatch.setattr(node.inference.model, "forward", blocked)
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(lines, CHAT, chat(max_tokens=2))
        assert blocked.entered.wait(TIMEOUT)
        node.inference._router.fail_all("it broke")
        blocked.release()
        *_, error, done = failing.result(TIMEOUT)
    assert done == DONE
    assert '"error"' in error


def test_too_many_users(http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.app._users._places, "maximum", 1)
    blocked = Blocked(node.inference.model.forward)
    monkeypatch.setattr(node.inference.model, "forward", blocked)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, CHAT, json=chat(max_tokens=2))
        eventually(lambda: node.app.in_flight == 1)
        refused = http.post(CHAT, json=chat())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (error_of(refused)["type"], error_of(refused)["code"]) == ("rate_limit_error", "overloaded")
        blocked.release()
        assert text_of(first.result(TIMEOUT))
    eventually(lambda: node.app.in_flight == 0)
    assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


# ---- OpenAI's client library ----


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    chosen: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "What is a proof?"}], **fields}
    return client.chat.completions.create(**chosen)


def test_openai_streams(http: httpx2.Client, openai_client: openai.OpenAI) -> None:
    expected = streamed(http, max_tokens=12)
    with ask(openai_client, max_tokens=12, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [model.id for model in openai_client.models.list()] == [NAME]


def test_openai_errors(
    http: httpx2.Client, node: Node, openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be an integer of at least 1"):
        ask(openai_client, max_tokens=0)
    with pytest.raises(openai.NotFoundError) as missing:
        ask(openai_client, model="another")
    assert missing.value.code == "model_not_found"
    with monkeypatch.context() as patch:
        patch.setattr(node.app._users._places, "maximum", 0)
        with pytest.raises(openai.RateLimitError) as limited:
            ask(openai_client)
        assert limited.value.response.headers["retry-after"] == "1"
    begin(http)
    with pytest.raises(openai.InternalServerError) as shut:
        ask(openai_client)
    assert (shut.value.status_code, shut.value.code) == (503, "generating")
    assert shut.value.response.headers["retry-after"] == "10"


def test_openai_retries_until_the_gate_opens(
    http: httpx2.Client, node: Node, openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http)
    shut = node.app._shut_users._closed
    asked = itertools.count()

    def opens_at_the_second_try() -> tuple[str, str, int] | None:
        if next(asked) == 0:
            reason = shut()
            node.service.manager.stop_round()
            assert reason is not None
            return (*reason[:2], 0)
        return shut()

    monkeypatch.setattr(node.app._shut_users, "_closed", opens_at_the_second_try)
    answer = ask(openai_client.with_options(max_retries=1), max_tokens=2)
    assert answer.choices[0].message.content
    assert next(asked) >= 2
