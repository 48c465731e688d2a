"""Checks of callbacks: what is posted to {url}/generated and {url}/validated, again and again until it is taken."""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

from .answers import BeganOnBackends, Generated, Judged, Validated, Verdict
from .artifact import decode
from .check import check
from .outcome import FailedError, require
from .receiver import Mailbox, Post
from .session import NONCES, Session

GENERATED, VALIDATED = "/generated", "/validated"
_MAX_INT32 = 2**31 - 1
_SETTLE_SECONDS = 0.5
"""For callbacks that are under way when a round ends: of several at once, a later one may come first."""
_QUIET_SECONDS = 0.5
"""Without a callback after a round has ended: as long as it had for two forwards, but no less."""


class _Round(NamedTuple):
    """What came of a round."""

    node_id: int
    node_count: int
    group_id: int
    n_groups: int
    posts: list[Post]
    seconds: float
    """That it took for two forwards."""
    mailbox: Mailbox

    @property
    def bodies(self) -> list[Generated]:
        return [post.read(Generated) for post in self.posts]

    @property
    def nonces(self) -> list[int]:
        return [artifact.nonce for body in self.bodies for artifact in body.artifacts]


def _taken(mailbox: Mailbox) -> int:
    """Return how many artifacts of a round were taken."""
    return sum(len(post.read(Generated).artifacts) for post in mailbox.posts if post.accepted)


def _generation(session: Session) -> _Round:
    """Play a round as node 3 of 5, in the third of four groups, until there are two forwards' artifacts."""
    return session.once("the callbacks of a round", lambda: _generate(session))


def _generate(session: Session) -> _Round:
    mailbox = session.receiver.mailbox()
    groups = {} if session.plan.is_mlnode else {"group_id": 2, "n_groups": 4}
    wanted = 2 * session.plan.batch_size
    began = time.monotonic()
    with session.round(url=mailbox.url, node_id=3, node_count=5, **groups) as answer:
        patience = session.endpoint.seconds_left()
        mailbox.wait_for(lambda: _taken(mailbox) >= wanted, patience)
        seconds = time.monotonic() - began
    if not mailbox.posts:
        raise FailedError(f"no callback in {patience:.0f} s to {mailbox.url}{GENERATED}")
    n_groups = answer.read(BeganOnBackends).n_groups if session.plan.is_mlnode else 4
    mailbox.wait_for(lambda: False, _SETTLE_SECONDS)
    return _Round(3, 5, groups.get("group_id", 0), n_groups, mailbox.posts, seconds, mailbox)


@check("generated.body", "callbacks", "a round posts artifacts to {url}/generated, with its block, key and node")
def generated_body(session: Session) -> str:
    """Read what a round posted."""
    found = _generation(session)
    paths = {post.path for post in found.posts}
    require(paths == {GENERATED}, f"posted to {sorted(paths)} of the url")
    sent = session.round_body(node_id=found.node_id)
    for body in found.bodies:
        _same_round(body, sent)
        require(body.encoding.k_dim == session.plan.form.k_dim, f"encoding is {body.encoding}")
    return f"{len(found.nonces)} artifacts in {len(found.posts)} callbacks"


@check("generated.nonces", "callbacks", "its nonces are node_id + group_id * node_count + i * node_count * n_groups")
def generated_nonces(session: Session) -> str:
    """Look at the nonces of a round."""
    found = _generation(session)
    nonces, step = found.nonces, found.node_count * found.n_groups
    repeated = [nonce for nonce, count in Counter(nonces).items() if count > 1]
    require(not repeated, f"posted again although they were taken: {repeated[:10]}")
    require(max(nonces) <= _MAX_INT32, f"{max(nonces)} is no int32")
    groups = range(found.n_groups) if session.plan.is_mlnode else (found.group_id,)
    expected = set[int]()
    for group in groups:
        first = found.node_id + group * found.node_count
        count = sum(nonce % step == first % step for nonce in nonces)
        expected |= {first + place * step for place in range(count)}
    wrong, gaps = sorted(set(nonces) - expected), sorted(expected - set(nonces))
    require(not wrong, f"not among the first of the node: {wrong[:10]}; left out: {gaps[:10]}")
    return f"{sorted(nonces)[:4]} ... {max(nonces)}, without gaps"


@check("generated.artifacts", "callbacks", "its artifacts are those that /generate gives for the same nonces")
def generated_artifacts(session: Session) -> str:
    """Have some nonces of a round computed again."""
    posted = {
        artifact.nonce: artifact.vector_b64 for body in _generation(session).bodies for artifact in body.artifacts
    }
    some = dict(list(posted.items())[: len(NONCES)])
    for text in some.values():
        decode(text, session.plan.form.k_dim)
    far = max(session.apart(some, session.compute(some)))
    require(far <= session.plan.form.bound, f"{far:.3f} apart")
    return f"{len(some)} nonces, at most {far:.2g} apart"


@check("generated.stops", "callbacks", "after /stop a round posts what it has computed by then, and no more")
def generated_stops(session: Session) -> str:
    """Wait twice as long as the round had for two forwards; one may have been computed when it ended."""
    found = _generation(session)
    at_stop = len(found.nonces)
    found.mailbox.wait_for(lambda: False, max(_QUIET_SECONDS, min(2 * found.seconds, session.endpoint.seconds_left())))
    before = _taken(found.mailbox)
    later = found.mailbox.wait_for(lambda: _taken(found.mailbox) > before, max(_QUIET_SECONDS, found.seconds))
    require(not later, f"still posted long after: {_taken(found.mailbox) - at_stop} more artifacts than at its end")
    return f"{before - at_stop} artifacts after its end, then none"


@check("generated.again", "callbacks", "a callback that is answered 503 is posted again until it is taken")
def generated_again(session: Session) -> str:
    """Refuse a callback of a round."""
    mailbox = session.receiver.mailbox(refuse=1)

    def lost() -> set[int]:
        refused, taken = set[int](), set[int]()
        for post in mailbox.posts:
            (taken if post.accepted else refused).update(each.nonce for each in post.read(Generated).artifacts)
        return refused - taken

    with session.round(url=mailbox.url):
        patience = session.endpoint.seconds_left()
        done = mailbox.wait_for(lambda: bool(mailbox.posts) and not lost(), patience)
    require(bool(mailbox.posts), f"no callback in {patience:.0f} s to {mailbox.url}{GENERATED}")
    require(done, f"not posted again in {patience:.0f} s: nonces {sorted(lost())[:10]}")
    return f"taken in {len(mailbox.posts)} callbacks"


@check(
    "generated.of_request",
    "callbacks",
    "a queued request without a validation posts its artifacts, with its request_id",
)
def generated_of_request(session: Session) -> str:
    """Queue nonces with a url."""
    mailbox = session.receiver.mailbox()
    queued = session.queue(session.request_body(NONCES, url=mailbox.url))
    patience = session.endpoint.seconds_left()
    mailbox.wait_for(lambda: _taken(mailbox) >= len(NONCES), patience)
    require(bool(mailbox.posts), f"no callback in {patience:.0f} s to {mailbox.url}{GENERATED}")
    nonces = []
    for post in mailbox.posts:
        require(post.path == GENERATED, f"posted to {post.path} of the url")
        body = post.read(Generated)
        _same_round(body, session.request_body(NONCES))
        session.expect_id(body.request_id, queued.request_id)
        nonces += [artifact.nonce for artifact in body.artifacts]
    require(sorted(nonces) == sorted(NONCES), f"queued nonces {NONCES}, got callbacks of {nonces[:20]}")
    return f"{len(nonces)} artifacts in {len(mailbox.posts)} callbacks"


@check(
    "validated.body",
    "callbacks",
    "a queued validation posts its verdict to {url}/validated, with the key of the prover",
)
def validated_body(session: Session) -> str:
    """Queue a validation with a url."""
    return _validated(session, refuse=0)


@check("validated.honest", "callbacks", "a verdict that finds nothing is posted as well: it is a vote too")
def validated_honest(session: Session) -> str:
    """Queue a validation of honest artifacts with a url."""
    return _validated(session, refuse=0, forges=False)


@check("validated.again", "callbacks", "a verdict that is answered 503 is posted again until it is taken")
def validated_again(session: Session) -> str:
    """Refuse a verdict."""
    return _validated(session, refuse=1)


def _validated(session: Session, refuse: int, forges: bool = True) -> str:
    mailbox = session.receiver.mailbox(refuse)
    forged = {NONCES[2]: session.honest()[NONCES[1]]} if forges else {}
    claimed = {**session.honest(), **forged}
    body = session.claim(claimed, None, url=mailbox.url, node_id=4)
    queued = session.queue(body)
    patience = session.endpoint.seconds_left()
    mailbox.wait_for(lambda: any(post.accepted for post in mailbox.posts), patience)
    taken = [post for post in mailbox.posts if post.accepted]
    require(bool(taken), f"not taken in {patience:.0f} s at {mailbox.url}{VALIDATED}: {len(mailbox.posts)} callbacks")
    require(taken[0].path == VALIDATED, f"posted to {taken[0].path} of the url")
    told = taken[0].read(Validated)
    _same_round(told, body)
    session.expect_id(told.request_id, queued.request_id)
    answered = session.result(queued.request_id, Verdict)
    differs = [name for name in Judged.model_fields if getattr(told, name) != getattr(answered, name)]
    require(not differs, f"{', '.join(differs)} differ between the callback and the answer: {told} and {answered}")
    require(told.mismatch_nonces == list(forged), f"forged nonces {list(forged)}, got {told}")
    return f"{len(mailbox.posts)} callbacks, n_mismatch {told.n_mismatch} of {told.n_total}"


def _same_round(body: Generated | Validated, sent: dict[str, object]) -> None:
    names = ("public_key", "block_hash", "block_height", "node_id")
    wrong = {name: getattr(body, name) for name in names if getattr(body, name) != sent[name]}
    require(not wrong, f"the callback has not what was sent: {wrong}")


CHECKS = (
    generated_body,
    generated_nonces,
    generated_artifacts,
    generated_stops,
    generated_again,
    generated_of_request,
    validated_body,
    validated_honest,
    validated_again,
)
