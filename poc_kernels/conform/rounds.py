"""Checks of rounds: how they begin, what is told of them, how they end, and what is refused."""

from __future__ import annotations

from typing import Any

from .answers import (
    BackendsStatus,
    Began,
    BeganOnBackends,
    Ended,
    EndedOnBackends,
    GeneratingStatus,
    IdleStatus,
    ParamsMismatch,
    Refusal,
    Versions,
)
from .check import check
from .endpoint import Answer
from .outcome import SkippedError, require
from .session import Session

_UNKNOWN_KEY = {"a_key_that_nobody_knows": {"nested": [1, 2]}}


def _codes(session: Session, status: int) -> tuple[int, ...]:
    """Return the statuses of a refusal: an MLNode none of whose engines began a round may say 502."""
    return (status, 502) if session.plan.is_mlnode else (status,)


@check("health", "rounds", "GET /health is 200 while the engine serves: an MLNode asks for it every few seconds")
def health(session: Session) -> str:
    """Ask an engine for its health."""
    if session.plan.is_mlnode:
        raise SkippedError("an MLNode asks its engines")
    return str(session.endpoint.get_root("/health").expect(200).status)


@check("versions", "rounds", "GET /versions has vllm_version, gonka_poc_version and poc_validation_inference")
def versions(session: Session) -> str:
    """Ask an engine for its versions."""
    if session.plan.is_mlnode:
        raise SkippedError("a route of engines")
    told = session.endpoint.get("/versions").read(Versions)
    disturbs = "does not disturb" if told.poc_validation_inference else "disturbs"
    return f"{told.vllm_version!r}, {told.gonka_poc_version!r}; validation {disturbs} inference"


@check("init.starts", "rounds", "POST /init/generate begins a round: 200 with status OK and GENERATING")
def starts(session: Session) -> str:
    """Begin a round."""
    with session.round() as answer:
        return _began(session, answer)


def _began(session: Session, answer: Answer) -> str:
    if session.plan.is_mlnode:
        told = answer.read(BeganOnBackends)
        require(0 < len(told.results) <= told.backends, f"results are not one for each engine: {answer}")
    else:
        answer.read(Began)
    return str(answer)


@check("init.unknown_keys", "rounds", "keys of a body that nobody knows are ignored")
def unknown_keys(session: Session) -> str:
    """Begin a round with a key too many."""
    with session.round(**_UNKNOWN_KEY) as answer:
        return _began(session, answer)


@check("status.generating", "rounds", "GET /status of a round is GENERATING, its config and stats")
def status_generating(session: Session) -> str:
    """Ask for the status in a round, which has every value of its own."""
    place = {"node_id": 3, "node_count": 5}
    groups = {} if session.plan.is_mlnode else {"group_id": 2, "n_groups": 4}
    with session.round(**place, **groups):
        answer = session.endpoint.get("/status")
        if session.plan.is_mlnode:
            status = answer.read(BackendsStatus)
            require(status.status == "GENERATING" and bool(status.backends), f"got {answer}")
            return str(answer)
        told = answer.read(GeneratingStatus)
    names = ("block_hash", "block_height", "public_key")
    sizes = {"seq_len": session.plan.seq_len, "k_dim": session.plan.form.k_dim}
    expected = {**{name: session.round_body()[name] for name in names}, **place, **groups, **sizes}
    wrong = {name: value for name, value in told.config.model_dump().items() if value != expected[name]}
    require(not wrong, f"config is not the round's: {wrong}")
    return f"{told.stats.total_processed} nonces, {told.stats.nonces_per_second:.1f} per second"


@check("init.already_generating", "rounds", "while a round generates, another is refused: 409 Already generating")
def already_generating(session: Session) -> str:
    """Begin a round in a round: the same, and that of another block."""
    with session.round():
        for block_hash in (session.block_hash, session.block_hash[::-1]):
            answer = session.endpoint.post("/init/generate", session.round_body(block_hash=block_hash))
            answer.expect(*_codes(session, 409))
            require("already generating" in str(answer).lower(), f"the reason is not told: {answer}")
    return str(answer)


@check("init.other_model", "rounds", "a model that is not served is refused: 409, params mismatch")
def other_model(session: Session) -> str:
    """Begin a round of another model."""
    body = session.round_body(params=session.params(model=f"not-{session.model}"))
    answer = session.refused(*_codes(session, 409), body=body)
    if not session.plan.is_mlnode:  # which quotes its engines
        answer.read(ParamsMismatch, 409)
    return str(answer)


@check("init.params_forbid", "rounds", "params with a key that nobody knows are refused: 422")
def params_forbid(session: Session) -> str:
    """Begin a round with a parameter too many."""
    body = session.round_body(params=session.params(**_UNKNOWN_KEY))
    answer = session.refused(*_codes(session, 422), body=body)
    answer.read(Refusal, answer.status)
    return str(answer)


@check("init.malformed", "rounds", "a body that is no JSON, lacks a field or has a wrong type is refused: 422")
def malformed(session: Session) -> str:
    """Begin rounds with bodies that are none."""
    whole = session.round_body()
    bodies: dict[str, Any] = {
        "no JSON": b"{",
        "a list": [],
        **{f"no {name}": {key: whole[key] for key in whole if key != name} for name in ("block_hash", "params")},
        "node_id a text": {**whole, "node_id": "first"},
        "seq_len a text": {**whole, "params": session.params(seq_len="long")},
    }
    for what, body in bodies.items():
        answer = session.refused(422, body=body)
        require(b'"detail"' in answer.content, f"{what}: no detail in {answer}")
    return f"422: {', '.join(bodies)}"


@check("stop.stops", "rounds", "POST /stop ends a round: 200 with status OK and STOPPED; then /status is IDLE")
def stops(session: Session) -> str:
    """End a round, and ask for the status."""
    with session.round():
        answer = session.stop()
        answer.read(EndedOnBackends if session.plan.is_mlnode else Ended)
    return f"{answer}; then {_idle(session)}"


@check("stop.again", "rounds", "POST /stop is answered the same where nothing runs: it is called on every node")
def stops_again(session: Session) -> str:
    """End what is ended."""
    for _ in range(2):
        answer = session.stop()
        answer.read(EndedOnBackends if session.plan.is_mlnode else Ended)
    return str(answer)


@check("left_idle", "rounds", "what was played leaves nothing that generates")
def left_idle(session: Session) -> str:
    """Leave the endpoint as it was."""
    session.stop().expect(200)
    return _idle(session)


def _idle(session: Session) -> str:
    answer = session.endpoint.get("/status")
    if session.plan.is_mlnode:
        require(answer.read(BackendsStatus).status == "IDLE", f"expected IDLE, got {answer}")
    else:
        answer.read(IdleStatus)
    return str(answer)


CHECKS = (
    health,
    versions,
    starts,
    unknown_keys,
    status_generating,
    already_generating,
    other_model,
    params_forbid,
    malformed,
    stops,
    stops_again,
)
