"""The older wire, of distances: a round is begun, goes through phases, and validates proofs of its own block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ...protocol import FORMS, IllegalTransitionError, PoCConfig, PoCState, RoundEndedError
from ..clients import client_of
from ..gate import POC_PREFIX
from ..queue import QueueFullError, ValidationJob
from .answers import BODY_ERRORS, ERRORS, TOO_MANY, bad_value, refusal, shutting_down, written
from .bodies import MAX_SHOWN, Bodies, always, takes
from .names import named
from .older_body import RoundBody
from .state import State

WIRES = {name: wire for name, entry in FORMS.items() if (wire := entry.load_wire()) is not None}
"""How a proof form is told in HTTP that this wire has: a module with ProofBody and ValidateAnswer."""


class PhaseAnswer(BaseModel):
    """Answer of the routes that change the state."""

    status: str
    pow_status: dict[str, Any]


class WaitingAnswer(BaseModel):
    """Answer of /validate?wait=false, and of /validate/{id} until there is a verdict."""

    status: Literal["QUEUED", "RUNNING"]
    id: str
    nonces_done: int
    nonces: int


_WAITING: dict[int | str, dict[str, Any]] = {202: {"description": "No verdict yet", "model": WaitingAnswer}}
PHASE: dict[str, Any] = {"response_model": PhaseAnswer, "responses": ERRORS}
"""What OpenAPI says of the routes that change the state."""


def begin(state: State, body: RoundBody, first: PoCState) -> dict[str, Any]:
    """Begin a round in a state, in place of the one that runs; return the answer."""

    def change() -> None:
        with named(body.keys()):
            state.service.begin(body.config(), first, body.ignored())

    return state.changed(change)


def add_routes(router: APIRouter, state: State, bodies: Bodies) -> None:
    """Add the routes that are of this wire alone."""
    service = state.service
    manager = service.manager
    wire = WIRES.get(manager.form(None).name, WIRES[PoCConfig.proof])
    init_options: dict[str, Any] = {**PHASE, "responses": BODY_ERRORS, "openapi_extra": takes(RoundBody)}

    def changed(change: Callable[[], None]) -> Response:
        return written(state.changed(change))

    async def begun(request: Request, first: PoCState) -> Response:
        return await bodies.read(request, always(RoundBody), lambda body: written(begin(state, body, first)))

    @router.post("/init", **init_options)
    async def init(request: Request) -> Response:
        """Begin a round; no phase runs yet."""
        return await begun(request, PoCState.IDLE)

    @router.post("/init/validate", **init_options)
    async def init_validate(request: Request) -> Response:
        """Begin a round and validate the proofs that come. Users are served meanwhile."""
        return await begun(request, PoCState.VALIDATING)

    @router.post("/phase/generate", **PHASE)
    def phase_generate() -> Response:
        """Look for nonces in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.GENERATING))

    @router.post("/phase/validate", **PHASE)
    def phase_validate() -> Response:
        """Validate proofs in the round that was begun."""
        return changed(lambda: manager.set_phase(PoCState.VALIDATING))

    def enqueued(body: Any, submitter: str, keep: bool) -> ValidationJob:
        if service.stopping:
            raise shutting_down()
        try:
            return service.enqueue(body.proof(), submitter, keep)
        except (ValueError, TypeError) as error:
            raise bad_value(error) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_seconds)}) from error
        except IllegalTransitionError as error:
            raise state.not_allowed(error) from error
        except RoundEndedError as error:
            raise HTTPException(409, str(error)) from error

    def answered(verdict: Any) -> Response:
        return Response(wire.ValidateAnswer.of(verdict).model_dump_json(), media_type="application/json")

    @router.post(
        "/validate",
        response_model=wire.ValidateAnswer,
        responses={**BODY_ERRORS, **_WAITING, **TOO_MANY},
        openapi_extra=takes(wire.ProofBody),
    )
    async def validate(request: Request, wait: Literal["true", "false"] = "true") -> Response:
        """Recompute the distances of a proof batch, and judge it if it has distances.

        The batch is taken at once: who leaves before the answer gets the verdict at the callback_url. With wait=false
        the answer comes at once: its Location has the verdict later. A batch without nonces is judged at once.
        """
        submitter, keep = client_of(request.scope), wait == "false"
        job = await bodies.read(request, always(wire.ProofBody), lambda body: enqueued(body, submitter, keep))
        if job.keep:
            return _waiting(job, {"Location": f"{POC_PREFIX}/validate/{job.id}"})
        try:
            # Shielded: the verdict goes to the callback even if this client does not wait for it.
            verdict = await asyncio.shield(asyncio.wrap_future(job.future))
        except Exception as error:
            raise refusal(error) from error
        return await run_in_threadpool(answered, verdict)

    @router.get(
        "/validate/{job_id}",
        response_model=wire.ValidateAnswer,
        responses={
            **_WAITING,
            404: {"description": "There is no such job, or not any more"},
            409: {"description": "The round ended before there was a verdict"},
            503: ERRORS[503],
        },
    )
    def validated(job_id: str) -> Response:
        """Return the verdict on a batch that was posted with wait=false."""
        job = service.worker.queue.get(job_id)
        if job is None or job.of_request:
            got = repr(job_id[:MAX_SHOWN])
            raise HTTPException(404, f"id must be of a batch posted with wait=false and kept still, got {got}")
        if job.error is not None:
            raise refusal(job.error)
        return _waiting(job) if job.verdict is None else answered(job.verdict)


def _waiting(job: ValidationJob, headers: dict[str, str] | None = None) -> Response:
    begun = job.started is not None
    answer = WaitingAnswer(
        status="RUNNING" if begun else "QUEUED", id=job.id, nonces_done=job.nonces_done, nonces=job.nonces
    )
    return JSONResponse(answer.model_dump(), 202, headers)
