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


def line_of(costs: dict[str, int]) -> Line:
    line = Line()
    for name, each in costs.items():
        line.enter(name, each)
    return line


def turns(line: Line) -> Iterator[str]:
    """Whose turns follow, where all of them go on waiting."""
    while True:
        line.begin_turn()
        chosen = next(iter(line))
        line.end_turn(chosen)
        yield chosen


def order(line: Line, count: int) -> str:
    return "".join(itertools.islice(turns(line), count))


def positions(line: Line, costs: dict[str, int], count: int) -> collections.Counter[str]:
    had: collections.Counter[str] = collections.Counter()
    for name in itertools.islice(turns(line), count):
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
    assert order(line_of(dict.fromkeys("abc", 5)), 7) == "abcabca"


def test_a_large_turn_comes_when_others_have_had_as_much() -> None:
    assert order(line_of({"a": 8, "b": 1}), 18) == "b" * 7 + "a" + "b" * 8 + "a" + "b"
    assert order(line_of({"b": 1, "a": 8}), 18) == "b" * 7 + "a" + "b" * 8 + "a" + "b"


def test_three_of_different_costs_get_the_same() -> None:
    costs = {"a": 1024, "b": 32, "c": 96}
    had = positions(line_of(costs), costs, 4400)
    assert max(had.values()) - min(had.values()) <= 1024
    assert min(had.values()) > 90 * 1024


@given(costs=st.lists(COSTS, min_size=2, max_size=5), count=st.integers(1, 400))
def test_nobody_is_ahead_by_more_than_a_forward(costs: list[int], count: int) -> None:
    of = dict(zip("abcde", costs, strict=False))
    had = positions(line_of(of), of, count)
    assert max(had.values()) - min(had[name] for name in of) <= max(costs)


@given(costs=st.lists(COSTS, min_size=2, max_size=4), alone=st.integers(1, 500), count=st.integers(1, 300))
def test_who_joins_late_is_owed_nothing_and_owes_nothing(costs: list[int], alone: int, count: int) -> None:
    of = dict(zip("abcd", costs, strict=False))
    *first, late = of
    line = line_of({name: of[name] for name in first})
    before = positions(line, of, alone)
    line.enter(late, of[late])
    had = positions(line, of, count)
    for name in first:
        assert abs(had[late] - had[name]) <= of[late] + of[name]
    assert sum(before.values()) > 0 == before[late]


def test_who_is_alone_is_always_next_and_owes_nothing_for_it() -> None:
    line = line_of({"a": 1000})
    assert order(line, 50) == "a" * 50
    line.enter("b", 10)
    assert order(line, 203) == "b" * 99 + "a" + "b" * 100 + "ab" + "b"


def test_who_waits_for_a_large_turn_and_is_alone_then_is_next_all_the_same() -> None:
    line = line_of({"a": 1000, "b": 10})
    assert order(line, 2) == "bb"
    line.leave("b")
    assert order(line, 3) == "aaa"


def fresh_names(costs: dict[str, int], fresh: int, comers: int, count: int) -> list[str]:
    """Whose turns follow, where others come under a new name for each forward of so many positions: "new" are they."""
    line, numbers = line_of(costs), itertools.count()

    def come() -> None:
        line.enter(f"new {next(numbers)}", fresh)

    for _ in range(comers):
        come()
    had = []
    for _ in range(count):
        line.begin_turn()
        chosen = next(iter(line))
        line.end_turn(chosen)
        if chosen not in costs:
            line.leave(chosen)
            come()
        had.append(chosen.split()[0])
    assert len([*line]) == len(costs) + comers
    return had


@pytest.mark.parametrize("fresh", [256, 8192, 65536])
@pytest.mark.parametrize("comers", [1, 2, 5])
@pytest.mark.parametrize("honest", [256, 8192, 65536])
def test_new_names_gain_nothing(fresh: int, comers: int, honest: int) -> None:
    """Each that waits gets as much as any other, whatever the size of its forward, and nobody starves."""
    had = collections.Counter(fresh_names({"one": honest, "two": honest}, fresh, comers, 4000))
    each = honest * had["one"], honest * had["two"], fresh * had["new"] / comers
    assert min(each) > 0
    assert max(each) - min(each) <= max(honest, fresh)


@pytest.mark.parametrize("comers", [1, 3])
def test_whoever_comes_again_and_again_starves_nobody(comers: int) -> None:
    had = "".join(name[0] for name in fresh_names({"large": 64}, 1, comers, 900))
    assert max(len(between) for between in had.split("l")) == 64 * comers


def test_who_leaves_and_comes_again_has_no_more_than_who_stays() -> None:
    """Else one large forward at a time would be given in turn with each small one."""
    costs = {"a": 100, "b": 1}
    line = line_of(costs)
    had: collections.Counter[str] = collections.Counter()
    for _ in range(2000):
        line.begin_turn()
        chosen = next(iter(line))
        had[chosen] += costs[chosen]
        line.end_turn(chosen)
        if chosen == "a":
            line.leave("a")
        elif "a" not in line:
            line.enter("a", 100)
    assert had["a"] > 0
    assert abs(had["a"] - had["b"]) <= 101


def test_nothing_is_remembered_of_those_who_left() -> None:
    line = line_of({"a": 3, "b": 1})
    assert order(line, 3) == "bba"
    line.leave("a")
    assert [*line] == [*line._turns] == ["b"]
    line.leave("b")
    assert "a" not in line
    assert not line._turns
    assert not line._order


def test_another_forward_is_waited_for_from_the_same_time_on() -> None:
    line = line_of({"a": 9, "b": 2, "c": 2})
    assert order(line, 3) == "bcb"
    line.change("a", 5)  # as b and c would have it: 5 positions of each after its coming
    assert order(line, 3) == "cab"
    line.change("c", 100)
    line.change("b", 2)
    assert order(line, 3) == "bab"


def test_who_waited_for_more_than_it_is_given_has_no_advantage_after_that() -> None:
    line = line_of({"a": 1000, "b": 10})
    order(line, 90)
    line.change("a", 10)
    assert order(line, 5) == "ababa"


def test_whoever_has_a_turn_stays_the_first_until_it_ends() -> None:
    line = line_of({"a": 5})
    line.begin_turn()
    line.enter("b", 1)
    line.enter("c", 1)
    assert [*line] == ["a", "b", "c"]
    line.end_turn("a")
    assert [*line] == ["b", "c", "a"]


def test_who_left_during_its_turn_and_came_again_waits_as_any_other() -> None:
    line = line_of({"a": 5, "b": 5})
    line.begin_turn()
    line.leave("a")
    line.end_turn("a")
    assert [*line] == ["b"]
    line.enter("a", 5)
    line.end_turn("a")
    assert [*line] == ["b", "a"]


def test_a_copy_is_of_its_own() -> None:
    line = line_of({"a": 4, "b": 1})
    copied = line.copy()
    ahead = order(copied, 12)
    copied.leave("b")
    assert order(line, 12) == ahead


class Visits:
    """The same by looking at all who wait: since when, for what, and in which order they came to it."""

    def __init__(self) -> None:
        self.now = 0
        self.since: dict[str, int] = {}
        self.costs: dict[str, int] = {}

    def enter(self, name: str, cost: int) -> None:
        self.since[name], self.costs[name] = self.now, cost

    def leave(self, name: str) -> None:
        del self.since[name], self.costs[name]

    def due(self, name: str) -> int:
        return self.since[name] + self.costs[name]

    def names(self) -> list[str]:
        return sorted(self.since, key=self.due)  # stable: who came first

    def take_turn(self) -> str:
        first = min(self.since, key=self.due)
        self.now = max(self.now, self.due(first))
        cost = self.costs[first]
        self.leave(first)
        self.enter(first, cost)
        return first


@settings(max_examples=300)
@given(
    acts=st.lists(
        st.one_of(
            st.just("turn"),
            st.tuples(st.sampled_from("abcd"), COSTS),
            st.sampled_from("abcd"),
        ),
        max_size=80,
    )
)
def test_any_order_of_coming_and_going(acts: list[Any]) -> None:
    line, visits = Line(), Visits()
    for act in acts:
        if act == "turn":
            if visits.since:
                line.begin_turn()
                chosen = next(iter(line))
                line.end_turn(chosen)
                assert chosen == visits.take_turn()
        elif isinstance(act, tuple):
            name, each = act
            if name in line:
                line.change(name, each)
                visits.costs[name] = each
            else:
                line.enter(name, each)
                visits.enter(name, each)
        elif act in line:
            line.leave(act)
            visits.leave(act)
        assert [*line] == visits.names()
