"""The OpenAI routes on a real, tiny model."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import torch
from fastapi import FastAPI
from served import MAX_NEW, NAME
from starlette.testclient import TestClient
from web import CHAT, TIMEOUT, chat, error_of, events, eventually, pieces, text_of

from poc_kernels.engines.transformers import handlers
from poc_kernels.engines.transformers.answers import ChatAnswer
from poc_kernels.engines.transformers.generation import Generation
from poc_kernels.engines.transformers.inference import Inference

pytestmark = pytest.mark.usefixtures("nothing_stays_in_flight")


def test_chat(http: httpx2.Client) -> None:
    answer = http.post(CHAT, json=chat(max_tokens=8)).json()
    assert answer["model"] == NAME
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    with http.stream("POST", CHAT, json=chat(max_tokens=8, stream=True)) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        chunks = list(events(stream.iter_lines()))
    assert "".join(pieces(iter(chunks))) == answer["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"] == answer["usage"]
    assert {chunk["model"] for chunk in chunks} == {NAME}


def test_completions(http: httpx2.Client) -> None:
    body = {"prompt": "A proof is", "max_tokens": 8, "model": NAME}
    answer = http.post("/v1/completions", json=body).json()
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        streamed = "".join(event["choices"][0]["text"] for event in events(stream.iter_lines()))
    assert streamed == answer["choices"][0]["text"]


def test_responses(http: httpx2.Client) -> None:
    body = {"input": "What is a proof?", "instructions": "Be brief.", "max_output_tokens": 8}
    answer = http.post("/v1/responses", json=body).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][-1]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 8
    assert (answer["model"], answer["object"]) == (NAME, "response")
    with http.stream("POST", "/v1/responses", json={**body, "stream": True}) as stream:
        told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["incomplete_details"] == answer["incomplete_details"]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    streamed = "".join(event["delta"] for event in told if event["type"] == "response.output_text.delta")
    assert streamed == answer["output"][0]["content"][0]["text"]


def test_openai_client(http: httpx2.Client) -> None:
    user = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0)
    messages: Any = [{"role": "user", "content": "What is a proof?"}]
    whole = user.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=8)
    chunks = user.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert user.responses.create(model=NAME, input="Hello", max_output_tokens=4).output_text
    assert [model.id for model in user.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError) as caught:
        user.chat.completions.create(model="another", messages=messages)
    assert caught.value.code == "model_not_found"


def test_the_same_text_in_a_batch_and_alone(http: httpx2.Client) -> None:
    prompts = [f"Number {n}: {'what is a proof? ' * n}" for n in range(1, 9)]
    alone = [text_of(http.post(CHAT, json=chat(prompt, max_tokens=24))) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = pool.map(lambda prompt: text_of(http.post(CHAT, json=chat(prompt, max_tokens=24))), prompts)
        assert list(together) == alone
    assert len(set(alone)) == len(alone)


def test_no_number_of_tokens_means_as_many_as_may_be(http: httpx2.Client) -> None:
    answer = http.post(CHAT, json=chat()).json()
    assert answer["usage"]["completion_tokens"] == MAX_NEW
    assert answer["choices"][0]["finish_reason"] == "length"
    nearly_full = {"prompt": " a" * 4090}
    usage = http.post("/v1/completions", json=nearly_full).json()["usage"]
    assert usage["total_tokens"] == 4096
    assert usage["completion_tokens"] < MAX_NEW


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (chat(max_tokens=0), "max_tokens", None),
        (chat(max_tokens=MAX_NEW + 1), "max_tokens", None),
        (chat(max_completion_tokens=MAX_NEW + 1), "max_completion_tokens", None),
        (chat("a " * 5000), None, "context_length_exceeded"),
        (chat(" a" * 4040, max_tokens=MAX_NEW), "max_tokens", "context_length_exceeded"),
        (chat(no_such_field=1), "no_such_field", None),
        ({"messages": []}, "messages", None),
        (chat(generation_config='{"max_length": 5}'), "generation_config", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(http: httpx2.Client, body: dict[str, Any], param: str | None, code: str | None) -> None:
    answer = http.post(CHAT, json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_an_empty_prompt_is_refused(http: httpx2.Client) -> None:
    for stream in (False, True):
        answer = http.post("/v1/completions", json={"prompt": "", "stream": stream})
        assert (answer.status_code, "empty" in error_of(answer)["message"]) == (400, True)


def test_token_ids_beyond_the_model_are_refused(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "vocabulary", 1)
    answer = http.post("/v1/completions", json={"prompt": "hello"})
    assert (answer.status_code, "outside [0, 1)" in error_of(answer)["message"]) == (400, True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b'"x"', b"\xff", b'{"messages": [{"content": "\\ud800"}]}']
)
@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
def test_bodies_that_are_no_object_of_ours(http: httpx2.Client, route: str, content: bytes) -> None:
    answer = http.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_only_these_routes(http: httpx2.Client, app: FastAPI) -> None:
    assert set(app.openapi()["paths"]) == {CHAT, "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/{model}"}
    for path in ("/reset", "/load_model", "/v1/audio/transcriptions", "/v1/systemone"):
        assert http.post(path, json={}).status_code == 404
    for path in ("/health", "/docs", "/redoc"):
        assert http.get(path).status_code == 404
    assert error_of(http.get("/v1/nothing"))["message"] == "Not Found"
    assert error_of(http.get(CHAT))["message"] == "Method Not Allowed"
    assert http.get("/nothing").json() == {"detail": "Not Found"}


def test_models(http: httpx2.Client) -> None:
    models = http.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [NAME]
    assert http.get(f"/v1/models/{NAME}").json() == models["data"][0]
    missing = http.get("/v1/models/tiny")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    other = http.post(CHAT, json=chat(model="other"))
    assert (other.status_code, error_of(other)["code"], error_of(other)["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("sent", "comes_back"), [("my-id 1", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("é", False)]
)
def test_request_ids(http: httpx2.Client, sent: str, comes_back: bool) -> None:
    answer = http.post(CHAT, json=chat(max_tokens=1), headers={"x-request-id": sent.encode()})
    assert (answer.headers["x-request-id"] == sent) is comes_back
    assert answer.json()["id"] != sent
    assert comes_back or answer.headers["x-request-id"] == answer.json()["id"]


def test_one_request_id_in_flight_many_times(http: httpx2.Client) -> None:
    def ask(n: int) -> httpx2.Response:
        return http.post(CHAT, json=chat(f"Question {n}", max_tokens=8), headers={"x-request-id": "the-same"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    assert [answer.headers["x-request-id"] for answer in answers] == ["the-same"] * 16
    assert [text_of(answer) for answer in answers] == [text_of(ask(n)) for n in range(16)]


def test_streams_that_end_in_their_first_step(http: httpx2.Client) -> None:
    def ask(_: int) -> list[dict[str, Any]]:
        with http.stream("POST", CHAT, json=chat(max_tokens=1, stream=True)) as stream:
            return list(events(stream.iter_lines()))

    with ThreadPoolExecutor(4) as pool:
        for chunks in pool.map(ask, range(100)):
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def pause_in_step(inference: Inference, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have inference paused while it computes its ``step``-th step from now."""
    forward, steps = inference.model.forward, itertools.count(1)

    def pausing_forward(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == step:
            inference._turns.pause_inference()
        return forward(*args, **kwargs)

    monkeypatch.setattr(inference.model, "forward", pausing_forward)


def slow_down(inference: Inference, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, pause = inference.model.forward, threading.Event()

    def slow_forward(*args: Any, **kwargs: Any) -> Any:
        pause.wait(0.1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(inference.model, "forward", slow_forward)


@pytest.mark.parametrize("paused", [False, True])
def test_a_client_that_leaves_mid_stream_is_cancelled(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    turns = inference._turns
    if paused:
        pause_in_step(inference, monkeypatch, 4)
    else:
        slow_down(inference, monkeypatch)
    with http.stream("POST", CHAT, json=chat(stream=True)) as stream:
        coming = pieces(events(stream.iter_lines()))  # kept: an iterator that is dropped closes the connection
        next(coming)
        if paused:
            eventually(lambda: turns.inference_paused)
        assert inference._router.in_flight() == 1
    try:
        assert inference.wait_idle(TIMEOUT)
    finally:
        turns.resume_inference()
    monkeypatch.undo()
    processor = inference._batching._manager.batch_processor  # type: ignore[union-attr]
    eventually(lambda: not processor.has_pending_requests())
    text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_a_request_whose_handler_is_cancelled_leaves(app: FastAPI, inference: Inference) -> None:
    async def ask_and_leave() -> None:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=TIMEOUT) as http:
            asking = asyncio.create_task(http.post(CHAT, json=chat()))
            while inference._router.in_flight() == 0:
                await asyncio.sleep(0.005)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    inference._turns.pause_inference()
    try:
        asyncio.run(asyncio.wait_for(ask_and_leave(), TIMEOUT))
        assert inference.wait_idle(TIMEOUT)
    finally:
        inference._turns.resume_inference()


def test_paused_inference_stops_and_goes_on_with_the_same_text(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text_of(http.post(CHAT, json=chat(max_tokens=32)))
    turns = inference._turns
    pause_in_step(inference, monkeypatch, 4)
    with http.stream("POST", CHAT, json=chat(max_tokens=32, stream=True)) as stream, ThreadPoolExecutor(1) as pool:
        coming = pieces(events(stream.iter_lines()))
        said = [next(coming)]
        eventually(lambda: turns.inference_paused)
        with turns.proof(), turns.alone():  # the step that ran has ended
            steps = inference._batching._manager.current_batch  # type: ignore[union-attr]
        queued = pool.submit(http.post, CHAT, json=chat(max_tokens=32))
        eventually(lambda: inference._router.in_flight() == 2)
        for _ in range(20):
            with turns.proof():
                pass
        assert not inference.wait_idle(0.05)
        assert inference._batching._manager.current_batch <= steps + 1  # type: ignore[union-attr]
        assert inference.trouble() is None
        turns.resume_inference()
        said += coming
        assert text_of(queued.result(TIMEOUT)) == expected
    assert "".join(said) == expected


def test_tools_and_earlier_tool_calls(http: httpx2.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "max_tokens": 4,
    }
    text_of(http.post(CHAT, json=body))


def test_a_template_that_refuses_is_the_clients_fault(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    answer = http.post(CHAT, json=chat())
    assert (answer.status_code, error_of(answer)["param"]) == (400, "messages")
    assert "roles must alternate" in error_of(answer)["message"]


def test_a_fault_of_the_server_is_an_error_object_without_internals(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(inference, "submit", fail)
    answer = http.post(CHAT, json=chat())
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "secret" not in answer.text
    monkeypatch.undo()
    text_of(http.post(CHAT, json=chat(max_tokens=1)))


def test_a_seed_does_not_touch_the_generators_of_the_process(http: httpx2.Client) -> None:
    before = torch.random.get_rng_state()
    text_of(http.post(CHAT, json=chat(max_tokens=1, seed=1, temperature=2.0, stop="a")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_output_that_cannot_be_told_ends_its_stream_and_its_request(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError('it says "no"\n\n')

    monkeypatch.setattr(Generation, "_decoded", fail)
    with http.stream("POST", CHAT, json=chat(stream=True)) as stream:
        chunks = list(events(stream.iter_lines()))
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "no" not in chunks[-1]["error"]["code"]
    assert inference.wait_idle(TIMEOUT)


def test_a_stream_that_fails_in_its_handler_ends_with_an_error_object(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise ValueError("a secret")

    monkeypatch.setattr(ChatAnswer, "last", fail)
    with http.stream("POST", CHAT, json=chat(max_tokens=2, stream=True)) as stream:
        chunks = list(events(stream.iter_lines()))
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "secret" not in str(chunks[-1])


def test_requests_of_several_event_loops_are_served_side_by_side(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """As starlette's TestClient sends them, each in a loop of its own: also more than are prepared at once."""
    client, count = TestClient(app), 2 * handlers._OTHERS_AT_ONCE
    begun, release, parse = threading.Semaphore(0), threading.Event(), handlers.parse

    def slowly(*arguments: Any) -> Any:
        begun.release()
        assert release.wait(TIMEOUT)
        return parse(*arguments)

    monkeypatch.setattr(handlers, "parse", slowly)
    with ThreadPoolExecutor(count) as threads:
        posts = [threads.submit(client.post, CHAT, json=chat(max_tokens=1)) for _ in range(count)]
        assert all(begun.acquire(timeout=TIMEOUT) for _ in range(handlers._OTHERS_AT_ONCE))
        release.set()
        assert [post.result(TIMEOUT).status_code for post in posts] == [200] * count
