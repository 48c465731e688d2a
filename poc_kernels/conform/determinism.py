"""Checks that an artifact is a function of block, key and nonce, whatever else is computed, before or beside it."""

from __future__ import annotations

import statistics

from .answers import Artifacts
from .check import check
from .outcome import SkippedError, require
from .session import NONCES, Session, by_nonce

_DIFFERENT = 0.7
"""Half of the median distance of unrelated unit vectors: less in the median, and they are not unrelated."""

_LEAST_SEQ_LEN = 16
"""Of fingerprints."""


def _same(session: Session, found: dict[int, str]) -> str:
    """Compare artifacts with those of the first request; return how far apart they are, if it is within the bound."""
    distances = session.apart(found, session.honest())
    far, bound = max(distances), session.plan.form.bound
    exact = sum(distance == 0 for distance in distances)
    text = f"{exact} of {len(distances)} bit-identical, at most {far:.2g} apart"
    require(far <= bound, f"{text}, which is more than {bound}")
    return text


def _different(distances: list[float], what: str) -> str:
    """Return how far artifacts of different things are apart, if they are."""
    middle, nearest = statistics.median(distances), min(distances)
    text = f"{what}: {middle:.2f} apart in the median, at least {nearest:.2g}"
    require(middle >= _DIFFERENT and nearest > 0, f"{text}: they are not unrelated")
    return text


@check("determinism.repeated", "determinism", "the same request gives the same artifacts")
def repeated(session: Session) -> str:
    """Repeat a request."""
    return _same(session, session.compute(NONCES))


@check("determinism.alone", "determinism", "a nonce gives the same artifact alone")
def alone(session: Session) -> str:
    """Have nonces computed one by one."""
    return _same(session, {nonce: session.compute([nonce])[nonce] for nonce in NONCES[:3]})


@check("determinism.permuted", "determinism", "a nonce gives the same artifact in any place of a request")
def permuted(session: Session) -> str:
    """Have nonces computed in another order, with others between them."""
    others = [nonce + 1_000_000 for nonce in NONCES[:3]]
    return _same(session, session.compute([*others[:2], *NONCES[::-1], *others[2:]]))


@check("determinism.beside_others", "determinism", "requests of other keys and blocks at the same time change nothing")
def beside_others(session: Session) -> str:
    """Queue requests whose nonces may share forwards."""
    key, block = session.public_key[::-1], session.block_hash[::-1]
    bodies = [session.request_body(NONCES, **changes) for changes in ({"public_key": key}, {}, {"block_hash": block})]
    queued = [session.queue(body) for body in bodies]
    _, found, _ = (by_nonce(session.result(each.request_id, Artifacts), NONCES) for each in queued)
    return _same(session, found)


@check(
    "determinism.batch_size", "determinism", "another batch_size may change bits, and no more than a validator allows"
)
def batch_size(session: Session) -> str:
    """Have nonces computed in forwards of other shapes."""
    sizes = sorted({1, session.plan.batch_size + 3})
    return "; ".join(f"{size} rows: {_same(session, session.compute(NONCES, batch_size=size))}" for size in sizes)


@check("determinism.after_a_round", "determinism", "a round of another block changes no artifact of this one")
def after_a_round(session: Session) -> str:
    """Have nonces computed again after a round."""
    session.honest()
    with session.round(block_hash=session.block_hash[::-1]):
        pass
    return _same(session, session.compute(NONCES))


@check("determinism.nonces", "determinism", "artifacts of different nonces are unrelated")
def nonces_differ(session: Session) -> str:
    """Compare nonces."""
    honest = session.honest()
    pairs = [(one, other) for place, one in enumerate(NONCES) for other in NONCES[:place]]
    return _different([session.apart({0: honest[one]}, {0: honest[other]})[0] for one, other in pairs], "nonces")


@check(
    "determinism.keys_and_blocks", "determinism", "artifacts of different keys, and of different blocks, are unrelated"
)
def keys_and_blocks_differ(session: Session) -> str:
    """Compare keys, and blocks."""
    honest = session.honest()
    others = {
        "keys": session.compute(NONCES, public_key=session.public_key[::-1]),
        "blocks": session.compute(NONCES, block_hash=session.block_hash[::-1]),
    }
    return "; ".join(_different(session.apart(honest, found), what) for what, found in others.items())


@check("determinism.seq_len", "determinism", "another seq_len gives other artifacts: all positions are computed")
def seq_len_counts(session: Session) -> str:
    """Have nonces computed with fewer positions, or with more where fewer are too few for a form."""
    asked = session.plan.seq_len
    other = asked // 2 if asked // 2 >= _LEAST_SEQ_LEN else asked + 2
    answer = session.endpoint.post(
        "/generate", session.request_body(NONCES, wait=True, params=session.params(seq_len=other))
    )
    if answer.status in (400, 409):
        raise SkippedError(f"seq_len {other} is refused: {answer}")
    found = by_nonce(answer.read(Artifacts), NONCES)
    same = [nonce for nonce, text in found.items() if text == session.honest()[nonce]]
    require(not same, f"the same artifacts with {other} positions as with {asked}, of nonces {same}")
    return f"{len(found)} other artifacts with {other} positions than with {asked}"


CHECKS = (
    repeated,
    alone,
    permuted,
    beside_others,
    batch_size,
    after_a_round,
    nonces_differ,
    keys_and_blocks_differ,
    seq_len_counts,
)
