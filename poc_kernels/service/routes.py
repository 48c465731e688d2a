"""The PoC routes of both wires, under /api/v1/pow and as an MLNode has them, and /health and /metrics.

Nothing long runs on the event loop: bodies are read into their models, and large answers written, in threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ..protocol import PoCState
from .gate import MLNODE_PREFIX, POC_PREFIX
from .round_service import RoundService
from .wires import current, mlnode, older
from .wires.answers import BODY_ERRORS, PoCRoute, written
from .wires.bodies import Bodies, document, takes
from .wires.current_bodies import GenerateBody, GenerationBody
from .wires.older_body import RoundBody
from .wires.state import State


def document_bodies(app: FastAPI) -> None:
    """Add the models of bodies, which the PoC routes read themselves, to the schemas that ``app`` documents."""
    document(app, (RoundBody, *(wire.ProofBody for wire in older.WIRES.values()), GenerationBody, GenerateBody))


def poc_router(service: RoundService) -> APIRouter:
    """Make the routes of a node's rounds."""
    bodies = Bodies()
    wire = current.CurrentWire(service, bodies)
    state = State(service, wire)
    router = APIRouter(prefix=POC_PREFIX, tags=["pow"], route_class=PoCRoute)

    def begun(body: Any) -> Response:
        if isinstance(body, GenerationBody):
            generating = {"status": PoCState.GENERATING.value}
            return written(state.changed(lambda: wire.begin(body), generating))
        return written(older.begin(state, body, PoCState.GENERATING))

    begin: dict[str, Any] = {**older.PHASE, "responses": BODY_ERRORS}

    @router.post("/init/generate", **begin, openapi_extra=takes(RoundBody, GenerationBody))
    async def init_generate(request: Request) -> Response:
        """Begin a round and look for nonces in the background. Users get 503 meanwhile.

        A body with r_target begins a round of distances, in place of the one that runs; one without begins a round
        whose proofs are artifacts, unless one generates.
        """
        return await bodies.read(request, _wire_of, begun)

    @router.get("/status", response_model=dict[str, Any])
    def status() -> Response:
        """Return state and progress of the round."""
        return written(state.status())

    @router.post("/stop", **older.PHASE)
    def stop() -> Response:
        """End the round. Requests for nonces go on."""
        return written(state.stop())

    older.add_routes(router, state, bodies)
    current.add_routes(router, wire)
    as_mlnode = APIRouter(prefix=MLNODE_PREFIX, tags=["pow"], route_class=PoCRoute)
    mlnode.add_routes(as_mlnode, state, wire, bodies)
    both = APIRouter()
    both.include_router(router)
    both.include_router(as_mlnode)
    return both


def _wire_of(content: Any) -> type[BaseModel]:
    """Return the model of a body that begins a round: what has an r_target is of the older wire."""
    return GenerationBody if isinstance(content, dict) and "r_target" not in content else RoundBody


# ---- operation ----


def operation_router(service: RoundService, others: Callable[[], bytes] = lambda: b"") -> APIRouter:
    """Make /health and /metrics.

    Args:
        others: gives further metrics, in Prometheus' text format.
    """
    router = APIRouter(tags=["operation"])

    @router.get("/health", responses={503: {"description": "Something makes no progress"}})
    def health() -> JSONResponse:
        """Say whether inference and proofs make progress."""
        troubles = service.troubles()
        content = {
            "status": "unhealthy" if troubles else "ok",
            "state": service.manager.state.value,
            "reasons": troubles,
        }
        return JSONResponse(content, 503 if troubles else 200)

    @router.get("/metrics")
    def metrics() -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(others() + service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
