"""Slots for posts: how many are under way at once, and whose."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import NamedTuple

_MAX_REMEMBERED = 1024


class _Standing(IntEnum):
    """What is known of a receiver, from the best to the worst."""

    ANSWERS = 0
    UNKNOWN = 1
    SILENT = 2


_PARTS = {_Standing.ANSWERS: 1.0, _Standing.UNKNOWN: 0.75, _Standing.SILENT: 0.5}
"""Of all slots, those for receivers that stand so or worse."""


class _Claim(NamedTuple):
    receiver: str
    standing: _Standing


class Slots:
    """Lets posts begin in order, and keeps room for receivers that answer.

    At most max_posts are under way. A quarter of them may go to one receiver, half to receivers that did not answer the
    last time, three quarters to these and to those that nothing is known of: whatever receivers do that are dead, slow
    or new, a post to one that answers finds a slot. Used from one event loop.

    Args:
        max_posts: slots in all; each of the parts has at least one.
    """

    def __init__(self, max_posts: int) -> None:
        self._max_posts = max_posts
        self._of_receiver: Counter[str] = Counter()  # posts under way
        self._as_bad: Counter[_Standing] = Counter()  # posts under way to receivers that stand so or worse
        self._waiting: dict[asyncio.Future[None], _Claim] = {}  # in order
        self._answered: OrderedDict[str, bool] = OrderedDict()  # by receiver, the last one last

    @asynccontextmanager
    async def one(self, receiver: str) -> AsyncIterator[None]:
        """Wait for a slot for a post to a receiver, and have it."""
        known = self._answered.get(receiver)
        claim = _Claim(
            receiver, _Standing.UNKNOWN if known is None else _Standing.ANSWERS if known else _Standing.SILENT
        )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = claim
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if self._waiting.pop(turn, None) is None:
                self._end(claim)  # it was given meanwhile
            raise
        try:
            yield
        finally:
            self._end(claim)

    def note(self, receiver: str, answered: bool) -> None:
        """Remember whether a receiver answered, whatever it said."""
        self._answered[receiver] = answered
        self._answered.move_to_end(receiver)
        if len(self._answered) > _MAX_REMEMBERED:
            self._answered.popitem(last=False)

    def _begin(self, claim: _Claim) -> None:
        self._of_receiver[claim.receiver] += 1
        self._as_bad.update(_from_best_to(claim.standing))

    def _end(self, claim: _Claim) -> None:
        self._of_receiver[claim.receiver] -= 1
        if self._of_receiver[claim.receiver] == 0:
            del self._of_receiver[claim.receiver]
        self._as_bad.subtract(_from_best_to(claim.standing))
        self._give()

    def _give(self) -> None:
        """Give slots to those that wait, in order; whoever may have none lets the others pass."""
        for turn, claim in list(self._waiting.items()):
            if not turn.done() and self._fits(claim):
                del self._waiting[turn]
                self._begin(claim)
                turn.set_result(None)

    def _fits(self, claim: _Claim) -> bool:
        return self._of_receiver[claim.receiver] < max(1, self._max_posts // 4) and all(
            self._as_bad[standing] < max(1, int(self._max_posts * _PARTS[standing]))
            for standing in _from_best_to(claim.standing)
        )


def _from_best_to(standing: _Standing) -> list[_Standing]:
    return [each for each in _Standing if each <= standing]
