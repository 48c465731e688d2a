"""Turns that are fair by the work of forwards, counted in positions. There is no clock in it."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping

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


class Line:
    """Those who wait for turns, the next first. Everybody gets the same in positions, however large the turns are.

    Whenever the line goes round, each has a turn, which is worth as much as the smallest forward that waits. Who is
    given a larger one owes the rest, and passes turns until that is made up for (`still_owed`). Where all forwards cost
    the same, they go round. Who is alone is always next, and owes nothing for it.

    Who comes is the last, and is owed nothing for the time before. Who leaves and owes something is remembered, and
    goes on passing turns: large forwards that are asked for one by one gain nothing.

    Args:
        max_gone: maximum number of those who are remembered; more are forgotten, who left first of all.
    """

    def __init__(self, max_gone: int) -> None:
        self._max_gone = max_gone
        self._owed: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._gone: dict[str, None] = {}  # in the order in which they left

    def __iter__(self) -> Iterator[str]:
        """Iterate over those who wait, the next first."""
        return (name for name in self._owed if name not in self._gone)

    def copy(self) -> Line:
        """Return a line that is as this one, and does not change with it."""
        copied = copy.copy(self)
        copied._owed, copied._gone = self._owed.copy(), self._gone.copy()
        return copied

    def enter(self, name: str) -> None:
        """Have somebody wait who does not, as the last."""
        self._gone.pop(name, None)
        self._owed.setdefault(name, 0)
        self._owed.move_to_end(name)

    def leave(self, name: str) -> None:
        """Have somebody wait no more."""
        if self._owed[name] == 0:
            del self._owed[name]
            return
        self._gone[name] = None
        if len(self._gone) > self._max_gone:
            self._forget(next(iter(self._gone)))

    def begin_turn(self, costs: Mapping[str, int]) -> None:
        """Have turns passed until somebody waits who owes less than one is worth: that one is first then, and charged.

        Args:
            costs: of the next forward of each who waits, in positions.
        """
        worth = min(costs.values())
        chosen = min(self, key=lambda name: self._owed[name] // worth)  # the first of several
        passed = self._owed[chosen] // worth
        before = True
        for name, owed in [*self._owed.items()]:
            before = before and name != chosen
            self._owed[name] = still_owed(owed, 0, (passed + before) * worth)
            if before:
                self._owed.move_to_end(name)
            if name in self._gone and self._owed[name] == 0:
                self._forget(name)
        self._owed[chosen] = still_owed(self._owed[chosen], costs[chosen], worth)

    def end_turn(self, name: str) -> None:
        """Have somebody who had a turn be the last, unless it waits for nothing any more."""
        if name in self._owed and name not in self._gone:
            self._owed.move_to_end(name)

    def _forget(self, name: str) -> None:
        del self._owed[name], self._gone[name]
