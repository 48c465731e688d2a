"""The wire of today: rounds whose proofs are artifacts, and requests for nonces that need no round."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from ... import __version__
from ...protocol import PoCConfig, PoCState, RoundEndedError
from ...protocol.artifacts.form import ArtifactForm
from ...protocol.states import PHASES
from ..clients import client_of
from ..outbox import printable
from ..queue import JobState, QueueFullError, ValidationJob
from ..round_service import RoundService, told_of
from .answers import BODY_ERRORS, TOO_MANY, bad_value, refusal, shutting_down, written
from .bodies import MAX_SHOWN, Bodies, always, takes
from .current_bodies import GenerateBody, GenerationBody, Params
from .names import named

_STATES = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "running",
    JobState.DONE: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
_RETRY_SECONDS = 5
_OF_ROUND = ("public_key", "block_hash", "block_height", "node_id")
"""What callbacks say and answers do not: their clients know what they asked for."""


class CurrentWire:
    """What the routes of today do, under whatever prefix. Refusals are HTTPExceptions.

    Args:
        service: a node's rounds.
        bodies: reads bodies, one at a time for all routes: what they begin, they so begin in turn.
    """

    def __init__(self, service: RoundService, bodies: Bodies) -> None:
        self.service = service
        self._manager = service.manager
        self._bodies = bodies

    # ---- rounds ----

    def begin(self, body: GenerationBody) -> None:
        """Begin a round that generates; while one does, there is no other.

        Raises:
            HTTPException: the model is another one than that which is served.
            IllegalTransitionError, TypeError, ValueError: as `RoundService.begin`.
        """
        self._check_model(body.params)
        self._check_form(body.params)
        with named(body.keys()):
            self.service.begin(body.config(), PoCState.GENERATING, body.ignored(), replace=False)

    def status(self) -> dict[str, Any] | None:
        """Return the state, what the round runs with and how far it is; and, beside it, what the node does else.

        None while there is no round whose proofs are artifacts: it is the older wire's to tell.
        """
        progress, config = self._manager.progress(), self._manager.config
        form = self._manager.form(config)
        if config is None or not isinstance(form, ArtifactForm):
            return None
        told: dict[str, Any] = {"status": PoCState.IDLE.value, "config": None, "stats": None, "round": None}
        if progress["state"] in PHASES:
            stats = {"total_processed": progress["total_checked"], "nonces_per_second": progress["rate_per_second"]}
            told = {"status": progress["state"], **_told(config, form), "stats": stats}
        return {**told, "generation_ended": progress["generation_ended"], **self.service.workload()}

    def versions(self) -> dict[str, Any]:
        """Return what proves here."""
        return {
            "vllm_version": self.service.engine,
            "gonka_poc_version": f"poc-kernels {__version__}",
            "poc_validation_inference": True,
        }

    # ---- requests ----

    async def generate(self, request: Request) -> dict[str, Any]:
        """Queue the nonces of a body; return what came of them if it waits for that, else their id.

        They are taken at once: who leaves before the answer gets it at the url.
        """
        submitter = client_of(request.scope)

        def taken(body: GenerateBody) -> tuple[ValidationJob, bool]:
            return self._enqueue(body, submitter), body.validation is not None

        job, judging = await self._bodies.read(request, always(GenerateBody), taken)
        if job.keep:
            return {"status": "queued", "request_id": job.id, "queued_count": job.nonces}
        try:
            # Shielded: the verdict goes to the callback even if this client does not wait for it.
            verdict = await asyncio.shield(asyncio.wrap_future(job.future))
        except RoundEndedError as error:
            raise HTTPException(503, str(error)) from error
        except Exception as error:
            raise refusal(error) from error
        return await run_in_threadpool(self._completed, job, verdict, judging)

    def _enqueue(self, body: GenerateBody, submitter: str) -> ValidationJob:
        if self.service.stopping:
            raise shutting_down()
        try:
            self._check_model(body.params)
            self._check_form(body.params)
            with named(body.keys()):
                config = self.service.config(body.config())
                proof = body.proof(self._form_of(config), config)
                self._check_room(len(proof))
                return self.service.enqueue(proof, submitter, keep=not body.wait, config=config)
        except (ValueError, TypeError) as error:
            raise bad_value(error) from error
        except QueueFullError as error:
            raise self._full(str(error), error.retry_seconds) from error
        except RoundEndedError as error:
            raise HTTPException(503, str(error)) from error

    def result(self, request_id: str) -> dict[str, Any] | None:
        """Return what came of the nonces of a request that did not wait, or how far they are; None if unknown."""
        job = self.service.worker.queue.get(request_id)
        if job is None or not job.of_request:
            return None
        state = job.state  # read once, and first: it changes after the outcome is there
        if state is JobState.DONE:
            assert job.verdict is not None
            return self._completed(job, job.verdict, job.verdict.judged)
        told = {"status": _STATES[state], "request_id": job.id}
        if state in (JobState.FAILED, JobState.CANCELLED):
            assert job.error is not None
            told["error"] = str(refusal(job.error).detail)
        return told

    def _completed(self, job: ValidationJob, verdict: Any, judging: bool) -> dict[str, Any]:
        config = job.validation.config
        form = self._manager.form(config)
        if judging:
            content = form.validated_body(config, verdict)
        else:
            content = form.generated_body(config, form.valid(config, verdict)).body
        answer = {name: value for name, value in content.items() if name not in _OF_ROUND}
        return {"status": _STATES[JobState.DONE], "request_id": job.id, **answer}

    # ---- what is taken ----

    def _check_model(self, params: Params) -> None:
        models = self.service.models
        if models and params.model not in models:
            requested = {"model": printable(params.model[:MAX_SHOWN]), "seq_len": params.seq_len}
            deployed = {"model": models[0], "served_names": list(models)}
            raise HTTPException(409, {"error": "params mismatch", "requested": requested, "deployed": deployed})

    def _check_form(self, params: Params) -> None:
        forms = self._manager.prover.forms
        names = [name for name, form in forms.items() if isinstance(form, ArtifactForm)]
        if params.proof not in names:
            takes = f"one of {', '.join(names)}" if names else "a form that has artifacts, none of which is proved here"
            raise ValueError(f"params.proof must be {takes}, got {params.proof[:MAX_SHOWN]!r}")

    def _form_of(self, config: PoCConfig) -> ArtifactForm:
        form = self._manager.check(config)
        assert isinstance(form, ArtifactForm)  # its name was checked
        return form

    def _check_room(self, nonces: int) -> None:
        if nonces > self.service.settings.max_queued_nonces:
            raise self._full(f"{nonces} nonces never fit, send fewer at once", _RETRY_SECONDS)

    def _full(self, reason: str, retry_seconds: int) -> HTTPException:
        queued, limit = self.service.worker.queue.nonces, self.service.settings.max_queued_nonces
        text = f"Queue full: {queued} nonces queued, limit is {limit}: {reason}"
        return HTTPException(429, text, {"Retry-After": str(retry_seconds)})


def add_routes(router: APIRouter, wire: CurrentWire) -> None:
    """Add the routes of today that the older wire does not have."""

    @router.post("/generate", responses={**BODY_ERRORS, **TOO_MANY}, openapi_extra=takes(GenerateBody))
    async def generate(request: Request) -> Response:
        """Compute the artifacts of nonces, and compare them with what a node claims where there is a validation.

        The answer comes when that is done, or with wait false at once, with an id to ask for it later.
        """
        return await run_in_threadpool(written, await wire.generate(request))

    @router.get("/generate/{request_id}", responses={404: {"description": "There is no such request, or not any more"}})
    def generated(request_id: str) -> Response:
        """Return what came of a request that was posted with wait false, or how far it is."""
        answer = wire.result(request_id)
        if answer is None:
            raise HTTPException(404, f"Request {printable(request_id[:MAX_SHOWN])} not found")
        return written(answer)

    @router.get("/versions", response_model=dict[str, Any])
    def versions() -> Response:
        """Say what proves here, and whether users are served while proofs are validated."""
        return written(wire.versions())


def _told(config: PoCConfig, form: ArtifactForm) -> dict[str, Any]:
    """Return what anybody may know of a configuration: ``config``, as the network has it, and ours in ``round``."""
    told = told_of(config)
    known = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups", "seq_len")
    ours = ("proof", "batch_size", "use_random_projection", "stronger_rng", "callback_host")
    return {
        "config": {**{name: told[name] for name in known}, "k_dim": form.k_dim_of(config)},
        "round": {name: told[name] for name in ours},
    }
