"""Checks of requests for nonces: POST /generate, and GET /generate/{request_id}."""

from __future__ import annotations

import uuid
from typing import Any

from .answers import Artifacts, Progress, Refusal
from .artifact import decode
from .check import check
from .outcome import FailedError, SkippedError, require
from .session import NONCES, Session, by_nonce

_MAX_NONCE = 2**31 - 1


@check("generate.waits", "requests", "POST /generate with wait true answers with an artifact for each nonce")
def waits(session: Session) -> str:
    """Have nonces computed."""
    artifacts = session.honest()
    return f"{len(artifacts)} artifacts; nonce {NONCES[0]}: {artifacts[NONCES[0]][:40]}"


@check("generate.encoding", "artifacts", "an artifact is the base64 of k_dim float16, finite and of norm 1")
def encoding(session: Session) -> str:
    """Read artifacts."""
    k_dim = session.plan.form.k_dim
    answer = session.endpoint.post("/generate", session.request_body(NONCES[:2], wait=True)).read(Artifacts)
    require(answer.encoding.k_dim == k_dim, f"asked for k_dim {k_dim}, got {answer.encoding.k_dim}")
    for artifact in answer.artifacts:
        decode(artifact.vector_b64, k_dim)
    return f"{2 * k_dim} bytes, {answer.encoding.model_dump()}"


@check(
    "generate.queues", "requests", "with wait false it answers queued and an id, by which the artifacts are asked for"
)
def queues(session: Session) -> str:
    """Queue nonces, and ask for what came of them."""
    queued = session.queue(session.request_body(NONCES))
    require(queued.queued_count == len(NONCES), f"queued {len(NONCES)} nonces, got {queued}")
    port, _, name = queued.request_id.rpartition(":")
    require(port.isdecimal() if session.plan.is_mlnode else not port, f"request_id is {queued.request_id!r}")
    try:
        uuid.UUID(name)
    except ValueError:
        raise FailedError(f"request_id has no UUID: {queued.request_id!r}") from None
    found = by_nonce(session.result(queued.request_id, Artifacts), NONCES)
    far = max(session.apart(found, session.honest()))
    require(far <= session.plan.form.bound, f"{far:.3f} apart from the artifacts of wait true")
    return f"{queued.request_id}: {len(found)} artifacts, at most {far:.2g} apart from those of wait true"


@check("generate.wait_is_false", "requests", "a body that says nothing of wait is queued")
def wait_is_false(session: Session) -> str:
    """Queue a nonce without wait."""
    body = session.request_body(NONCES[:1])
    answer = session.endpoint.post("/generate", body).expect(200)
    progress = answer.read(Progress)
    require(progress.status == "queued", f"expected queued, got {answer}")
    session.result(progress.request_id, Artifacts)
    return str(answer)


@check("generate.unknown_id", "requests", "an id that nobody has is 404")
def unknown_id(session: Session) -> str:
    """Ask for a request that was never posted."""
    name = str(uuid.uuid4())
    answer = session.endpoint.get(
        f"/generate/{session.port()}:{name}" if session.plan.is_mlnode else f"/generate/{name}"
    )
    answer.read(Refusal, 404)
    return str(answer)


@check("generate.unknown_keys", "requests", "keys of a body that nobody knows are ignored")
def unknown_keys(session: Session) -> str:
    """Have a nonce computed with a key too many."""
    return f"{len(session.compute(NONCES[:1], a_key_that_nobody_knows=1))} artifact"


@check("generate.params_forbid", "requests", "params with a key that nobody knows are refused: 422")
def params_forbid(session: Session) -> str:
    """Have a nonce computed with a parameter too many."""
    body = session.request_body(NONCES[:1], wait=True, params=session.params(a_key_that_nobody_knows=1))
    answer = session.endpoint.post("/generate", body)
    answer.read(Refusal, 422)
    return str(answer)


@check("generate.malformed", "requests", "a body that is no JSON, lacks a field or has a wrong type is refused: 422")
def malformed(session: Session) -> str:
    """Post bodies that are none."""
    whole = session.request_body(NONCES[:1], wait=True)
    bodies: dict[str, Any] = {
        "no JSON": b"{",
        **{f"no {name}": {key: whole[key] for key in whole if key != name} for name in ("public_key", "nonces")},
        "nonces a text": {**whole, "nonces": "three"},
        "a nonce a text": {**whole, "nonces": ["three"]},
    }
    for what, body in bodies.items():
        answer = session.endpoint.post("/generate", body)
        require(answer.status == 422, f"{what}: expected 422, got {answer}")
        answer.read(Refusal, 422)
    return f"422: {', '.join(bodies)}"


@check("generate.int32", "requests", f"nonces go to {_MAX_NONCE}: they are stored as int32")
def int32(session: Session) -> str:
    """Have the largest nonce computed."""
    return f"{_MAX_NONCE}: {session.compute([_MAX_NONCE])[_MAX_NONCE][:40]}"


@check("generate.unequal_claims", "requests", "a validation must have artifacts of just the nonces: else 400")
def unequal_claims(session: Session) -> str:
    """Claim artifacts of too few, too many and other nonces."""
    claimed = session.honest()
    first, last = NONCES[0], NONCES[-1]
    others = {
        "one is missing": [nonce for nonce in NONCES if nonce != first],
        "one too many": [*NONCES, last + 1],
        "another one": [*NONCES[:-1], last + 1],
    }
    for what, nonces in others.items():
        listed = [{"nonce": nonce, "vector_b64": claimed.get(nonce, claimed[last])} for nonce in nonces]
        answer = session.endpoint.post(
            "/generate", session.request_body(NONCES, wait=True, validation={"artifacts": listed})
        )
        require(answer.status == 400, f"{what}: expected 400, got {answer}")
        answer.read(Refusal, 400)
    return f"400: {', '.join(others)}"


@check("generate.stronger_rng", "requests", "poc_stronger_rng draws other inputs, so other artifacts")
def stronger_rng(session: Session) -> str:
    """Have nonces computed from inputs that are drawn otherwise."""
    if session.plan.proof != "vectors":
        raise SkippedError("a parameter of vectors")
    found = session.compute(NONCES, poc_stronger_rng=True)
    for text in found.values():
        decode(text, session.plan.form.k_dim)
    near = [nonce for nonce, text in found.items() if text == session.honest()[nonce]]
    require(not near, f"the same artifacts as without it, of nonces {near}")
    return f"{len(found)} other artifacts"


@check("generate.in_a_round", "requests", "a request is queued while a round generates")
def in_a_round(session: Session) -> str:
    """Queue a nonce in a round; what comes of it after /stop differs between implementations."""
    with session.round():
        queued = session.queue(session.request_body(NONCES[:1]))
    answer = session.endpoint.get(f"/generate/{queued.request_id}")
    if answer.status == 404:
        return "queued; /stop loses it"
    session.result(queued.request_id, Progress)
    return "queued; /stop keeps it"


@check("generate.queue_full", "requests", "more nonces than the queue takes are refused: 429 Queue full")
def queue_full(session: Session) -> str:
    """Queue more nonces than may wait."""
    limit = session.plan.queue_limit
    if limit is None:
        raise SkippedError("--queue-limit does not say how many nonces may wait; what is not refused would be computed")
    answer = session.endpoint.post("/generate", session.request_body(range(limit + 1)))
    answer.read(Refusal, 429)
    require("queue full" in str(answer).lower(), f"the reason is not told: {answer}")
    return f"{answer}, Retry-After {answer.headers.get('retry-after', 'not there')}"


CHECKS = (
    waits,
    encoding,
    queues,
    wait_is_false,
    unknown_id,
    unknown_keys,
    params_forbid,
    malformed,
    int32,
    unequal_claims,
    stronger_rng,
    in_a_round,
    queue_full,
)
