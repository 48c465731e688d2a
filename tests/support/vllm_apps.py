"""What of vLLM's API server a plugin meets: an engine client, and an app with routes of every kind."""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from tiny_service import TinyProver

from poc_kernels.protocol import Outcomes, PoCConfig, Row
from poc_kernels.protocol.engine import never

STREAM = 'data: {"choices": []}\n\ndata: [DONE]\n\n'


class Client:
    """An engine client that computes nothing: what it is asked, in order."""

    vllm_config: Any = None

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.at_shutdown: Callable[[], object] = lambda: None
        self.errored = False
        self.unfinished = 0
        self.steps = 0

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished

    def shutdown(self, timeout: float | None = None) -> None:
        self.calls.append(f"shutdown {timeout}")
        self.at_shutdown()
        self.errored = True

    async def count_steps(self) -> int:
        await asyncio.sleep(0)
        return self.steps


class BlockedProver(TinyProver):
    """A prover whose forwards wait until they may go on; then they pause once."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def prove(
        self, config: PoCConfig, rows: Sequence[Row], pause: Any = never, then: Sequence[Sequence[Row]] = ()
    ) -> Outcomes:
        self.entered.set()
        while not self.released.wait(0.01):
            pause()
        return super().prove(config, rows, pause)


def app() -> FastAPI:
    """Routes that compute, in a mount too, routes that tell, and /health and /metrics that are to be replaced."""
    app = FastAPI()
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/invocations"),
        ("PUT", "/v1/adapters/{name}"),
        ("DELETE", "/v1/responses/{name}"),
        ("PATCH", "/inference/v1/generate"),
    ):
        app.add_api_route(path, lambda: "computed", methods=[method])
    for path in ("/v1/models", "/version", "/v1/responses/{name}"):
        app.add_api_route(path, lambda: "told", methods=["GET"])
    for path in ("/health", "/metrics"):
        app.add_api_route(path, lambda: PlainTextResponse("vLLM's"), methods=["GET"])
    mounted = FastAPI()
    mounted.add_api_route("/generate", lambda: "computed", methods=["POST"])
    app.mount("/mounted", mounted)
    app.mount("/metrics", PlainTextResponse("vLLM's"))  # whatever the method, as an app of Prometheus'

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        def lines() -> Iterator[str]:
            yield STREAM

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.post("/v1/slow")
    async def slow(request: Request) -> str:
        """As vLLM's handlers: what is served goes on when the handler is cancelled, and ends when the client leaves."""

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        async def serve() -> None:
            app.state.slow.append("begun")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                app.state.slow.append("ended")
                raise

        await request.body()
        tasks = [asyncio.create_task(serve()), asyncio.create_task(leaves())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        return "computed"

    app.state.slow = []

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    return app


def arguments(**changes: Any) -> argparse.Namespace:
    """Of `vllm serve`."""
    return argparse.Namespace(**{"host": "127.0.0.1", "uds": None, "model": "m", **changes})
