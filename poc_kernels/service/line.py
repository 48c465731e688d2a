"""Turns that are fair by the work of forwards, counted in positions. There is no clock in it."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterator
from typing import NamedTuple

from ..protocol import PoCConfig

MIN_COST = 256
"""A forward of fewer positions counts as so many, since it reads all weights too. Estimated for GPUs: with 16-bit
weights an H200 multiplies 206 positions in the time in which it reads them (989e12 operations and 4.8e12 bytes/s)."""


def cost(config: PoCConfig) -> int:
    """Return what a forward of a round costs, in positions."""
    return max(config.positions, MIN_COST)


def still_owed(owed: int, had: int, worth: int) -> int:
    """Return what is owed after a turn, in positions: who owes at least what a turn is worth passes the next one.

    Args:
        owed: before it.
        had: in this turn; 0 if it was passed.
        worth: of a turn.
    """
    return max(0, owed + had - worth)


class _Turn(NamedTuple):
    """When somebody who waits is next: whose turn is due earlier, and of those due at once, who got it earlier."""

    due: int
    number: int
    name: str
    cost: int
    """Of the forward, in positions."""


class Line:
    """Those who wait for turns, the next first. Everybody gets the same in positions, however large the turns are.

    A turn is due as many positions after the time at which it is asked for as its forward has, and the earliest is
    next. Time is that of the latest turn: when it was due. Thus a forward is waited for until others have had as many
    positions each, before it is given, not afterwards: a large one gains nothing by a new name. (This is self-clocked
    fair queueing, Golestani 1994.) Where all forwards cost the same, they go round. Who is alone is always next.

    Who comes is the last of those whose forwards cost the same, and is owed nothing for the time before. Nothing is
    remembered of who leaves, who has had no more than it waited for.
    """

    def __init__(self) -> None:
        self._now = self._numbers = 0
        self._turns: dict[str, _Turn] = {}
        self._order: list[_Turn] = []  # sorted

    def __iter__(self) -> Iterator[str]:
        """Iterate over those who wait, the next first."""
        return (turn.name for turn in self._order)

    def __contains__(self, name: str) -> bool:
        """Return whether somebody waits."""
        return name in self._turns

    def copy(self) -> Line:
        """Return a line that is as this one, and does not change with it."""
        copied = copy.copy(self)
        copied._turns, copied._order = self._turns.copy(), self._order.copy()
        return copied

    def enter(self, name: str, cost: int) -> None:
        """Have somebody wait who does not, for a forward of so many positions."""
        self._numbers += 1
        self._put(_Turn(self._now + cost, self._numbers, name, cost))

    def change(self, name: str, cost: int) -> None:
        """Have somebody who waits wait for another forward, from the same time on."""
        turn = self._turns[name]
        if turn.cost != cost:
            self.leave(name)
            self._put(turn._replace(due=turn.due - turn.cost + cost, cost=cost))

    def leave(self, name: str) -> None:
        """Have somebody wait no more."""
        del self._order[bisect.bisect_left(self._order, self._turns.pop(name))]

    def begin_turn(self) -> None:
        """Give a turn to the first of those who wait, who stays the first until it ends."""
        self._now = max(self._now, self._order[0].due)

    def end_turn(self, name: str) -> None:
        """Have somebody who had a turn wait for the next one, of the same cost, unless it has left."""
        if name in self._turns:
            cost = self._turns[name].cost
            self.leave(name)
            self.enter(name, cost)

    def _put(self, turn: _Turn) -> None:
        self._turns[turn.name] = turn
        bisect.insort(self._order, turn)
