"""Plays the checks against an endpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timezone

from pydantic import BaseModel

from . import rounds
from .check import Check, check
from .checks import CHECKS
from .endpoint import Endpoint
from .outcome import CheckError, NoAnswerError, Outcome, Result, fit, require
from .plan import Plan
from .receiver import receiving
from .report import Report
from .session import Session

_GOODBYE_SECONDS = 30.0
"""For ending a round after the time for everything is over."""
_MAX_SEEN = 1000
"""Characters of what a check saw: it may quote names, ids and paths of the endpoint's."""


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _State(BaseModel):
    status: str


@check("idle_before", "rounds", "GET /status is answered; nothing is played where a round runs, which is somebody's")
def idle_before(session: Session) -> str:
    """Look whether anything runs."""
    answer = session.endpoint.get("/status")
    state = answer.read(_State).status
    require(state not in ("GENERATING", "VALIDATING", "MIXED"), f"a round runs here: {answer}")
    return str(answer)


NAMES = tuple(each.name for each in CHECKS)


@check("model", "rounds", "GET /v1/models names the served model")
def model_found(session: Session) -> str:
    """Ask for the served model, and play with it."""
    models = session.endpoint.get_root("/v1/models").read(_Models).data
    require(bool(models), "no model is served")
    session.model = models[0].id
    return session.model


ALL = (idle_before, model_found, *CHECKS, rounds.left_idle)
"""All checks, with those that are played before and after the others."""


def conform(plan: Plan, only: Collection[str] = (), tell: Callable[[Result], None] = lambda result: None) -> Report:
    """Play the checks, and leave the endpoint idle.

    Args:
        plan: what is played.
        only: names of the checks that are played; empty for all. What these need is played as well.
        tell: called with each result as it is there.

    Raises:
        OSError: no socket can listen for callbacks.
        ValueError: only has a name that no check has.
    """
    if unknown := set(only) - set(NAMES):
        raise ValueError(f"only must be names of checks ({', '.join(NAMES)}), got {', '.join(sorted(unknown))}")
    began, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    chosen = [each for each in CHECKS if not only or each.name in only]
    results: list[Result] = []
    endpoint = Endpoint(plan.url, plan.prefix, plan.token, plan.timeout_seconds, start + plan.max_seconds)
    with contextlib.closing(endpoint), receiving(plan) as receiver:
        session = Session(plan, endpoint, receiver, plan.model or "")
        for result in _results(session, chosen):
            results.append(result)
            tell(result)
    return Report(plan, session.model, began, time.monotonic() - start, results)


def _results(session: Session, chosen: list[Check]) -> Iterator[Result]:
    first = _played(idle_before, session)
    yield first
    trouble = None if first.outcome is Outcome.PASS else "the endpoint cannot be played with"
    if trouble is None and not session.model:
        found = _played(model_found, session)
        yield found
        trouble = None if found.outcome is Outcome.PASS else "needs --model"
    for each in chosen:
        if trouble is not None:
            yield Result(each.name, each.section, each.says, Outcome.SKIPPED, trouble, 0.0)
            continue
        result = _played(each, session)
        yield result
        if result.outcome is Outcome.FAIL:
            trouble = _lost(session)
    if first.outcome is Outcome.PASS:
        session.endpoint.extend(_GOODBYE_SECONDS)
        yield _played(rounds.left_idle, session)


def _played(each: Check, session: Session) -> Result:
    start = time.monotonic()
    try:
        outcome, seen = Outcome.PASS, each.play(session)
    except CheckError as error:
        outcome, seen = error.outcome, str(error)
    except Exception as error:  # an endpoint may answer anything, and the other checks are still of interest
        outcome, seen = Outcome.FAIL, f"unexpected {type(error).__name__}: {error}"
    return Result(each.name, each.section, each.says, outcome, fit(seen, _MAX_SEEN), time.monotonic() - start)


def _lost(session: Session) -> str | None:
    """Return why no more checks can be played, if that is so."""
    try:
        session.endpoint.get("/status")
    except NoAnswerError as error:
        return f"the endpoint is lost: {error}"
    return None
