"""The routes of the network's MLNode, in front of one engine: this one.

The chain's node calls an MLNode, which calls its engines. Who gives the chain's node this server in place of an MLNode
needs none: answers are those of an MLNode that has one engine, at the port at which this server listens.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from ...protocol import PoCState
from .answers import BODY_ERRORS, TOO_MANY, shutting_down, written
from .bodies import Bodies, always, takes
from .current import CurrentWire
from .current_bodies import GenerateBody, GenerationBody
from .state import State

_TOGETHER = {
    PoCState.STOPPED.value: "IDLE",
    **{state.value: state.value for state in (PoCState.GENERATING, PoCState.IDLE)},
}
"""What an MLNode says of an engine in a state: of one whose round of the older wire was stopped, that it is idle."""


def add_routes(router: APIRouter, state: State, current: CurrentWire, bodies: Bodies) -> None:
    """Add an MLNode's routes to ``router``, which has their prefix."""

    @router.post(
        "/init/generate",
        responses={**BODY_ERRORS, 502: {"description": "The engine refused it"}},
        openapi_extra=takes(GenerationBody),
    )
    async def init_generate(request: Request) -> Response:
        """Begin a round that generates."""
        port = _port(request)

        def begin(body: GenerationBody) -> Response:
            if state.service.stopping:
                raise shutting_down()
            alone = body.model_copy(update={"group_id": 0, "n_groups": 1})
            try:
                state.changed(lambda: current.begin(alone))
            except HTTPException as error:
                raise HTTPException(502, {"errors": [{"port": port, "error": _text(error)}]}) from error
            answer = {"status": "OK", "backends": 1, "n_groups": 1}
            return written({**answer, "results": [{"port": port, "status": "OK"}], "errors": None})

        return await bodies.read(request, always(GenerationBody), begin)

    @router.post("/generate", responses={**BODY_ERRORS, **TOO_MANY}, openapi_extra=takes(GenerateBody))
    async def generate(request: Request) -> Response:
        """Compute the artifacts of nonces: ids of requests have the port before them."""
        try:
            answer = await current.generate(request)
        except HTTPException as error:
            raise HTTPException(error.status_code, _text(error), error.headers) from error
        if answer["status"] == "queued":
            answer["request_id"] = f"{_port(request)}:{answer['request_id']}"
        return await run_in_threadpool(written, answer)

    @router.get(
        "/generate/{request_id:path}",
        responses={
            400: {"description": "An id without a port"},
            404: {"description": "There is no such request, or not any more"},
        },
    )
    def generated(request: Request, request_id: str) -> Response:
        """Return what came of a request that was posted with wait false, or how far it is."""
        port, colon, id_there = request_id.partition(":")
        if not colon:
            raise HTTPException(400, "Invalid request_id format (expected port:uuid)")
        if not port.isdecimal():
            raise HTTPException(400, "Invalid port in request_id")
        answer = current.result(id_there) if port == str(_port(request)) else None
        if answer is None:
            raise HTTPException(404, "Request not found")
        return written({**answer, "request_id": request_id})

    @router.get("/status", response_model=dict[str, Any])
    def status(request: Request) -> Response:
        """Return the state of the engine, and that of all engines together."""
        if state.service.stopping:
            return written({"status": "NO_BACKENDS", "backends": []})
        told = state.status()
        together = _TOGETHER.get(told["status"], "MIXED")
        return written({"status": together, "backends": [{"port": _port(request), **told}]})

    @router.post("/stop", response_model=dict[str, Any])
    def stop(request: Request) -> Response:
        """End the round."""
        if state.service.stopping:
            return written({"status": "OK", "message": "No backends to stop"})
        state.stop()
        return written({"status": "OK", "results": [{"port": _port(request), "status": "stopped"}], "errors": None})

    @router.get("/versions", response_model=dict[str, Any])
    def versions() -> Response:
        """Say what proves here, and whether users are served while proofs are validated."""
        return written(current.versions())


def _port(request: Request) -> int:
    """Return the port at which the server listens; 0 at a socket that has none."""
    server = request.scope.get("server")
    return 0 if server is None or server[1] is None else int(server[1])


def _text(error: HTTPException) -> str:
    """Return the body of the engine's answer, as an MLNode quotes it."""
    return json.dumps({"detail": error.detail})
