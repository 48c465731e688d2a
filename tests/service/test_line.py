"""Turns that are fair by positions: counted, in every order of coming and going."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poc_kernels.protocol import PoCConfig
from poc_kernels.service.line import MIN_COST, Line, cost, still_owed

COSTS = st.sampled_from([1, 2, 3, 7, 32, 100])


def line_of(names: str, max_gone: int = 100) -> Line:
    line = Line(max_gone)
    for name in names:
        line.enter(name)
    return line


def turns(line: Line, costs: dict[str, int]) -> Iterator[str]:
    """Whose turns follow, where all of them go on waiting."""
    while True:
        line.begin_turn({name: costs[name] for name in line})
        chosen = next(iter(line))
        line.end_turn(chosen)
        yield chosen


def order(line: Line, costs: dict[str, int], count: int) -> str:
    return "".join(itertools.islice(turns(line, costs), count))


def positions(line: Line, costs: dict[str, int], count: int) -> collections.Counter[str]:
    had: collections.Counter[str] = collections.Counter()
    for name in itertools.islice(turns(line, costs), count):
        had[name] += costs[name]
    return had


@pytest.mark.parametrize(("batch_size", "seq_len", "expected"), [(32, 256, 8192), (1, 1, MIN_COST), (1, 300, 300)])
def test_what_a_forward_costs(batch_size: int, seq_len: int, expected: int) -> None:
    """Rows that are missing are computed too, and a small forward reads all weights."""
    assert cost(PoCConfig("block", 1, "key", batch_size=batch_size, seq_len=seq_len)) == expected


@pytest.mark.parametrize(
    ("owed", "had", "worth", "expected"), [(0, 8, 8, 0), (0, 20, 8, 12), (12, 0, 8, 4), (4, 0, 8, 0), (4, 6, 8, 2)]
)
def test_what_is_owed_after_a_turn(owed: int, had: int, worth: int, expected: int) -> None:
    assert still_owed(owed, had, worth) == expected


def test_turns_of_equal_costs_go_round() -> None:
    assert order(line_of("abc"), dict.fromkeys("abc", 5), 7) == "abcabca"


def test_small_turns_come_between_large_ones_until_they_have_as_much() -> None:
    costs = {"a": 8, "b": 1}
    assert order(line_of("ab"), costs, 19) == "a" + "b" * 8 + "a" + "b" * 8 + "a"
    assert order(line_of("ba"), costs, 19) == "ba" + "b" * 8 + "a" + "b" * 8


def test_three_of_different_costs_get_the_same() -> None:
    costs = {"a": 1024, "b": 32, "c": 96}
    had = positions(line_of("abc"), costs, 4400)
    assert max(had.values()) - min(had.values()) <= 1024 + 32
    assert min(had.values()) > 90 * 1024


@given(costs=st.lists(COSTS, min_size=2, max_size=5), count=st.integers(1, 400))
def test_nobody_is_ahead_by_more_than_a_forward_and_a_turn(costs: list[int], count: int) -> None:
    of = dict(zip("abcde", costs, strict=False))
    had = positions(line_of("".join(of)), of, count)
    assert max(had.values()) - min(had[name] for name in of) <= max(costs) + min(costs)


@given(costs=st.lists(COSTS, min_size=2, max_size=4), alone=st.integers(1, 500), count=st.integers(1, 300))
def test_who_joins_late_is_owed_nothing_and_owes_nothing(costs: list[int], alone: int, count: int) -> None:
    of = dict(zip("abcd", costs, strict=False))
    first, late = "".join(of)[:-1], "".join(of)[-1]
    line = line_of(first)
    before = positions(line, of, alone)
    line.enter(late)
    had = positions(line, of, count)
    assert had[late] - min(had[name] for name in first) <= max(costs) + min(costs)
    assert max(had[name] for name in first) - had[late] <= max(costs) + min(costs)
    assert sum(before.values()) > 0 == before[late]


def test_who_is_alone_is_always_next_and_owes_nothing_for_it() -> None:
    line = line_of("a")
    assert order(line, {"a": 1000}, 50) == "a" * 50
    line.enter("b")
    assert order(line, {"a": 1000, "b": 10}, 103) == "a" + "b" * 100 + "ab"


def test_who_owes_and_is_alone_then_is_next_all_the_same() -> None:
    line = line_of("ab")
    assert order(line, {"a": 1000, "b": 10}, 2) == "ab"
    line.leave("b")
    assert order(line, {"a": 1000}, 3) == "aaa"


@pytest.mark.parametrize("comers", [1, 3])
def test_whoever_comes_again_and_again_starves_nobody(comers: int) -> None:
    """New names have no turns behind, but those who owe pass turns of theirs as the line goes round."""
    costs = {"large": 64, **{f"new {number}": 1 for number in range(1000)}}
    line = line_of("")
    line.enter("large")
    numbers = itertools.count()
    since, longest = 0, 0
    for name in [f"new {next(numbers)}" for _ in range(comers)]:
        line.enter(name)
    for _ in range(900):
        line.begin_turn({name: costs[name] for name in line})
        chosen = next(iter(line))
        line.end_turn(chosen)
        since = 0 if chosen == "large" else since + 1
        longest = max(longest, since)
        if chosen != "large":
            line.leave(chosen)
            line.enter(f"new {next(numbers)}")
    assert longest == 64 * comers


def test_who_leaves_and_comes_again_still_owes() -> None:
    """Else one large forward at a time would be given in turn with each small one."""
    line = line_of("ab")
    costs = {"a": 100, "b": 1}
    had: collections.Counter[str] = collections.Counter()
    for _ in range(2000):
        line.begin_turn({name: costs[name] for name in line})
        chosen = next(iter(line))
        had[chosen] += costs[chosen]
        line.end_turn(chosen)
        if chosen == "a":
            line.leave("a")
        elif "a" not in line:
            line.enter("a")
    assert had["a"] > 0
    assert abs(had["a"] - had["b"]) <= 101


def test_those_who_left_are_forgotten_when_they_owe_nothing() -> None:
    line = line_of("ab")
    costs = {"a": 3, "b": 1}
    assert order(line, costs, 1) == "a"
    line.leave("a")
    assert order(line, {"b": 1}, 4) == "bbbb"
    assert [*line._owed] == ["b"]
    assert not line._gone
    line.leave("b")
    assert not line._owed


def test_no_more_are_remembered_than_the_bound() -> None:
    line = line_of("x", max_gone=3)
    for number in range(50):
        name = f"large {number}"
        line.enter(name)
        costs = {"x": 1, name: 1000}
        while next(iter(line)) != name:
            line.begin_turn(costs)
            line.end_turn(next(iter(line)))
        line.begin_turn(costs)
        line.end_turn(name)
        line.leave(name)
        assert len(line._owed) <= 1 + 3
    assert [*line._gone] == ["large 47", "large 48", "large 49"]


def test_a_copy_is_of_its_own() -> None:
    line = line_of("ab")
    costs = {"a": 4, "b": 1}
    copied = line.copy()
    ahead = order(copied, costs, 12)
    copied.leave("b")
    assert order(line, costs, 12) == ahead


class Visits:
    """The same turn by turn, as it is said: whoever is first takes a turn or passes it, and is the last then."""

    def __init__(self) -> None:
        self.line: list[str] = []
        self.owed: dict[str, int] = {}
        self.gone: set[str] = set()

    def enter(self, name: str) -> None:
        if name in self.line:
            self.line.remove(name)
        self.gone.discard(name)
        self.line.append(name)
        self.owed.setdefault(name, 0)

    def leave(self, name: str) -> None:
        self.gone.add(name)
        self.drop()

    def drop(self) -> None:
        for name in [name for name in self.gone if self.owed[name] == 0]:
            self.gone.remove(name)
            self.line.remove(name)
            del self.owed[name]

    def begin_turn(self, costs: dict[str, int]) -> None:
        worth = min(costs.values())
        while (first := self.line[0]) in self.gone or self.owed[first] >= worth:
            self.owed[first] = max(0, self.owed[first] - worth)
            self.line.append(self.line.pop(0))
            self.drop()
        self.owed[first] += costs[first] - worth

    def end_turn(self, name: str) -> None:
        if name in self.line and name not in self.gone:
            self.line.remove(name)
            self.line.append(name)


@settings(max_examples=300)
@given(
    acts=st.lists(
        st.one_of(st.tuples(st.just("turn"), st.lists(COSTS, min_size=4, max_size=4)), st.sampled_from("abcd")),
        max_size=60,
    )
)
def test_passed_turns_are_those_of_one_visit_after_the_other(acts: list[Any]) -> None:
    line, visits = Line(100), Visits()
    for act in acts:
        waiting = [*line]
        if isinstance(act, tuple):
            costs = {name: each for name, each in zip("abcd", act[1], strict=True) if name in waiting}
            if costs:
                line.begin_turn(costs)
                visits.begin_turn(costs)
                chosen = next(iter(line))
                line.end_turn(chosen)
                visits.end_turn(chosen)
        elif act in waiting:
            line.leave(act)
            visits.leave(act)
        else:
            line.enter(act)
            visits.enter(act)
        assert [*line] == [name for name in visits.line if name not in visits.gone]
        assert line._owed == visits.owed
        assert set(line._gone) == visits.gone
