"""Checks of verdicts: honest artifacts, forged ones, and the test that tells them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .answers import Verdict
from .artifact import moved, random_artifact, scaled, with_first
from .check import Check, check
from .outcome import HoleError, SkippedError, require
from .plan import StatTest
from .session import NONCES, Session

CHAIN_TEST = StatTest(0.4, 0.1, 0.05)
"""What the chain's node sends by default."""

_FORGED = NONCES[2]


def _sent(test: StatTest) -> dict[str, float]:
    """Return a test as the chain's node sends it, and under the engines' own name of the level as well."""
    return {**test._asdict(), "p_value_threshold": test.fraud_threshold}


def _test(session: Session) -> StatTest:
    """Return the test by which most verdicts are asked for."""
    return CHAIN_TEST if session.plan.proof == "vectors" else session.plan.form.defaults


def _expect(verdict: Verdict, mismatches: list[int], test: StatTest) -> str:
    """Return what a verdict says, if it names just those nonces and its numbers follow from the test."""
    said = (
        f"{verdict.n_mismatch} of {verdict.n_total} mismatch, p {verdict.p_value:.3g}, fraud {verdict.fraud_detected}"
    )
    named = sorted(verdict.mismatch_nonces)
    require(verdict.n_excluded == 0, f"{said}: nonces {verdict.excluded_nonces} were not recomputed")
    require(verdict.n_total == len(NONCES), f"{said}: n_total must be {len(NONCES)}")
    require(named == sorted(mismatches), f"{said}: nonces {named} must be {sorted(mismatches)}")
    require(verdict.n_mismatch == len(named), f"{said}: n_mismatch must be {len(named)}")
    p_value = test.p_value(len(named), len(NONCES))
    require(math.isclose(verdict.p_value, p_value, rel_tol=1e-6), f"{said}: p must be {p_value:.6g}")
    fraud = p_value < test.fraud_threshold
    require(verdict.fraud_detected == fraud, f"{said}: fraud must be {fraud}, p below {test.fraud_threshold}")
    return said


def _judged(session: Session, artifacts: Mapping[int, str], mismatches: list[int], **changes: object) -> str:
    test = _test(session)
    return _expect(session.verdict(artifacts, _sent(test), **changes), mismatches, test)


def _replaced(session: Session, text: str) -> dict[int, str]:
    """Return the honest artifacts, with a text in place of one."""
    return {**session.honest(), _FORGED: text}


@check("verdict.honest", "verdicts", "artifacts of the endpoint itself agree: no mismatch, p 1, no fraud")
def honest(session: Session) -> str:
    """Validate honest artifacts."""
    return _judged(session, session.honest(), [])


@check("verdict.order", "verdicts", "artifacts are told apart by their nonces, whatever their order")
def order(session: Session) -> str:
    """Validate honest artifacts in another order than their nonces."""
    claimed = dict(reversed(list(session.honest().items())))
    body = {**session.claim(claimed, _sent(_test(session)), wait=True), "nonces": list(NONCES)}
    return _expect(session.endpoint.post("/generate", body).read(Verdict), [], _test(session))


@check("verdict.one_forged", "verdicts", "one forged artifact is one mismatch, which alone may be chance")
def one_forged(session: Session) -> str:
    """Validate artifacts of which one is another nonce's."""
    return _judged(session, _replaced(session, session.honest()[NONCES[0]]), [_FORGED])


@check("verdict.random", "verdicts", "artifacts that nobody computed are fraud")
def made_up(session: Session) -> str:
    """Validate artifacts that are drawn."""
    k_dim = session.plan.form.k_dim
    return _judged(session, {nonce: random_artifact(f"forged {nonce}", k_dim) for nonce in NONCES}, list(NONCES))


@check("verdict.other_nonces", "verdicts", "artifacts of other nonces are fraud")
def other_nonces(session: Session) -> str:
    """Validate artifacts that are those of the next nonce."""
    values = list(session.honest().values())
    return _judged(session, dict(zip(session.honest(), values[1:] + values[:1], strict=True)), list(NONCES))


@check("verdict.other_key", "verdicts", "artifacts of another key are fraud")
def other_key(session: Session) -> str:
    """Validate artifacts as those of somebody else."""
    return _judged(session, session.honest(), list(NONCES), public_key=session.public_key[::-1])


@check("verdict.other_block", "verdicts", "artifacts of another block are fraud")
def other_block(session: Session) -> str:
    """Validate artifacts as those of another round."""
    return _judged(session, session.honest(), list(NONCES), block_hash=session.block_hash[::-1])


def _forgery(name: str, what: str, forge: Callable[[str, int], str], *, only: str | None = None) -> Check:
    """Make the check of an artifact that is no unit vector: it is a mismatch of its nonce, and no error of others.

    Published implementations take some of these for agreeing, or fail at them: that is a hole.
    """

    @check(f"verdict.{name}", "verdicts", f"{what} is a mismatch of its nonce, and no error of the others")
    def played(session: Session) -> str:
        if only not in (None, session.plan.proof):
            raise SkippedError(f"a rule of the form {only}")
        claimed = _replaced(session, forge(session.honest()[_FORGED], session.plan.form.k_dim))
        answer = session.judge(claimed, _sent(_test(session)))
        if answer.status != 200:
            raise HoleError(f"one bad artifact fails the whole request: {answer}")
        verdict = answer.read(Verdict)
        if not verdict.mismatch_nonces:
            raise HoleError(f"it agrees: {answer}")
        return _expect(verdict, [_FORGED], _test(session))

    return played


FORGERIES = (
    _forgery("nan", "a vector with a NaN", lambda text, k_dim: with_first(text, k_dim, math.nan)),
    _forgery("inf", "a vector with an infinity", lambda text, k_dim: with_first(text, k_dim, math.inf)),
    _forgery("short", "a vector of k_dim - 1 numbers", lambda text, k_dim: random_artifact("short", k_dim - 1)),
    _forgery("long", "a vector of k_dim + 1 numbers", lambda text, k_dim: random_artifact("long", k_dim + 1)),
    _forgery("empty", "an empty text", lambda text, k_dim: ""),
    _forgery("not_base64", "a text that is not base64", lambda text, k_dim: f"!{text[1:]}"),
    _forgery("norm", "a norm of 1.05", lambda text, k_dim: scaled(text, k_dim, 1.05), only="fingerprint"),
)


@check("stat_test.dist_threshold", "verdicts", "dist_threshold says how far apart artifacts may be that agree")
def dist_threshold(session: Session) -> str:
    """Validate an artifact that is 0.2 off, by two thresholds."""
    claimed = _replaced(session, moved(session.honest()[_FORGED], session.plan.form.k_dim, 0.2))
    near, far = (CHAIN_TEST._replace(dist_threshold=threshold) for threshold in (0.1, 0.3))
    _expect(session.verdict(claimed, _sent(far)), [], far)
    return _expect(session.verdict(claimed, _sent(near)), [_FORGED], near)


@check("stat_test.defaults", "verdicts", "a request without a stat_test is judged by the form's own")
def defaults(session: Session) -> str:
    """Validate an artifact that is within the default threshold, and one that is beyond it."""
    form = session.plan.form
    text, threshold = session.honest()[_FORGED], form.defaults.dist_threshold
    noise = max(session.apart(session.honest(), session.compute(NONCES)))
    beyond = _replaced(session, moved(text, form.k_dim, 1.5 * threshold + noise))
    said = _expect(session.verdict(beyond), [_FORGED], form.defaults)
    if noise < threshold / 4:
        within = _replaced(session, moved(text, form.k_dim, 0.5 * threshold))
        _expect(session.verdict(within), [], form.defaults)
    return f"{said}, by {form.defaults}"


@check("stat_test.partial", "verdicts", "what a stat_test does not say is the form's own")
def partial(session: Session) -> str:
    """Validate with one value of the test, and with null for it."""
    test = session.plan.form.defaults._replace(p_mismatch=0.3)
    claimed = _replaced(session, random_artifact("forged", session.plan.form.k_dim))
    _expect(session.verdict(claimed, stat_test=None), [_FORGED], session.plan.form.defaults)
    return _expect(session.verdict(claimed, {"p_mismatch": 0.3}), [_FORGED], test)


def _level(session: Session, name: str) -> tuple[bool, bool]:
    """Return whether a batch is fraud by a level above its p_value, and by one below it."""
    claimed = _replaced(session, random_artifact("forged", session.plan.form.k_dim))
    p_value = CHAIN_TEST.p_value(1, len(NONCES))
    common = {"dist_threshold": CHAIN_TEST.dist_threshold, "p_mismatch": CHAIN_TEST.p_mismatch}
    above, below = (session.verdict(claimed, {**common, name: p_value * factor}) for factor in (1.1, 0.9))
    return above.fraud_detected, below.fraud_detected


@check("stat_test.fraud_threshold", "verdicts", "a batch is fraud if its p_value is below fraud_threshold")
def fraud_threshold(session: Session) -> str:
    """Validate by levels above and below what a batch gives."""
    found = _level(session, "fraud_threshold")
    require(found == (True, False), f"fraud by a level above the p_value and by one below it: {found}")
    return "fraud by a level above its p_value, none by one below it"


@check("stat_test.p_value_threshold", "verdicts", "p_value_threshold, as the chain's node sends it, is the same")
def p_value_threshold(session: Session) -> str:
    """Validate by levels under the chain's name."""
    found = _level(session, "p_value_threshold")
    if found[0] == found[1] and _level(session, "fraud_threshold") == (True, False):
        raise HoleError("it has no effect: batches are judged by the endpoint's own level, and not by the chain's")
    require(found == (True, False), f"fraud by a level above the p_value and by one below it: {found}")
    return "fraud by a level above its p_value, none by one below it"


CHECKS = (
    honest,
    order,
    one_forged,
    made_up,
    other_nonces,
    other_key,
    other_block,
    *FORGERIES,
    dist_threshold,
    defaults,
    partial,
    fraud_threshold,
    p_value_threshold,
)
