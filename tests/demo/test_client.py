"""The clients of the demonstration, against an application whose answers are known."""

from __future__ import annotations

import itertools
import json
import socket
import threading

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from poc_kernels.demo.client import Chatter, NodeClient, chatting


def chunk(text: str | None) -> str:
    delta = {"role": "assistant"} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return "data: " + json.dumps({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "demo",
                                  "choices": [choice]}) + "\n\n"  # fmt: skip


def application() -> FastAPI:
    app = FastAPI()
    app.state.seen = []

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        question = body["messages"][0]["content"]
        if question == "busy":
            error = {"error": {"message": "come back later", "type": "server_error"}}
            return JSONResponse(error, 503, {"Retry-After": "10"})
        pieces = [chunk(None), chunk("Hello"), chunk(" you"), chunk("")]
        if question == "fails":
            pieces.append('data: {"error": {"message": "the engine failed"}}\n\n')
        assert body["stream"] is True
        return StreamingResponse(iter([*pieces, "data: [DONE]\n\n"]), media_type="text/event-stream")

    @app.get("/metrics")
    def metrics():
        lines = [
            "# TYPE poc_part_seconds counter",
            'poc_part_seconds_total{part="inputs"} 0.5',
            'poc_part_seconds_total{part="forward"} 2.0',
            "# TYPE poc_other gauge",
            "poc_other 3.0",
            "",
        ]
        return Response("\n".join(lines), media_type="text/plain; version=0.0.4")

    @app.api_route("/api/v1/pow/{path:path}", methods=["GET", "POST"])
    async def pow_route(path: str, request: Request):
        body = await request.body()
        app.state.seen.append((request.method, path, json.loads(body) if body else None))
        if path == "validate" and json.loads(body).get("block_hash") == "wrong":
            return JSONResponse({"detail": "block_hash must be the round's"}, 400)
        return {"state": "IDLE", "path": path}

    return app


@pytest.fixture(scope="module")
def served():
    app = application()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield app, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def chatter(served):
    ticks = itertools.count()
    user = Chatter(served[1], "demo", lambda: float(next(ticks)), max_tokens=8)
    yield user
    user.close()


def test_pieces_of_a_streamed_answer_are_timed(chatter):
    chat = chatter.ask("hi", "IDLE")
    assert chat.served
    assert chat.text == "Hello you"
    # The clock is read at the question, once per piece of text, and at the end.
    assert (chat.began, chat.arrivals, chat.ended) == (0.0, (1.0, 2.0), 3.0)


def test_a_refusal_is_a_record_and_is_not_retried(chatter):
    chat = chatter.ask("busy", "GENERATING")
    assert not chat.served
    assert (chat.state, chat.status, chat.retry_after) == ("GENERATING", 503, "10")
    assert "come back later" in chat.error
    assert (chat.began, chat.ended) == (0.0, 1.0)


def test_an_error_within_a_stream_is_a_record(chatter):
    chat = chatter.ask("fails", "IDLE")
    assert not chat.served
    assert (chat.status, chat.text, chat.error) == (0, "Hello you", "the engine failed")


def test_no_answer_is_a_record():
    user = Chatter("http://127.0.0.1:1", "demo", lambda: 0.0, max_tokens=8)
    chat = user.ask("hi", "IDLE")
    user.close()
    assert (chat.served, chat.status) == (False, 0)
    assert chat.error


def test_users_chat_while_the_block_runs(served):
    users = [Chatter(served[1], "demo", lambda: 0.0, max_tokens=8) for _ in range(2)]
    chats = []
    arrived = threading.Event()

    class Watched(list):
        def append(self, chat):
            super().append(chat)
            if len(self) >= 5:
                arrived.set()

    chats = Watched()
    with chatting(users, "VALIDATING", chats):
        assert arrived.wait(30)
    count = len(chats)
    assert all(chat.served and chat.state == "VALIDATING" for chat in chats)
    assert len(chats) == count
    for user in users:
        user.close()


def test_users_stop_when_the_block_raises(served):
    user = Chatter(served[1], "demo", lambda: 0.0, max_tokens=8)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="over"), chatting([user], "IDLE", []):
        raise RuntimeError("over")
    assert threading.active_count() == before
    user.close()


def test_routes_of_a_round(served):
    app, url = served
    app.state.seen.clear()
    node = NodeClient(url)
    config, batch = {"block_hash": "a"}, {"block_hash": "a", "nonces": [1], "dist": []}
    assert node.status()["state"] == "IDLE"
    node.begin("generate", config)
    node.phase("validate")
    assert node.validate(batch)["path"] == "validate"
    node.stop()
    assert app.state.seen == [
        ("GET", "status", None),
        ("POST", "init/generate", config),
        ("POST", "phase/validate", None),
        ("POST", "validate", batch),
        ("POST", "stop", None),
    ]
    wrong = {**batch, "block_hash": "wrong"}
    assert node.refusal(wrong) == (400, "block_hash must be the round's")
    with pytest.raises(httpx2.HTTPStatusError):
        node.validate(wrong)
    node.close()


def test_metrics_by_label(served):
    node = NodeClient(served[1])
    assert node.metrics("poc_part_seconds_total") == {"inputs": 0.5, "forward": 2.0}
    assert node.metrics("poc_other") == {"": 3.0}
    assert node.metrics("poc_nothing") == {}
    node.close()
