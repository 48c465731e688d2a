"""The search runs every order of threads once, and finds what is broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from interleaving import Deadlock, Endless, Instruments, World, explore, simulate


@pytest.mark.parametrize("operations", [(1, 1), (2, 2), (3, 2), (2, 2, 1)])
def test_every_order_of_operations_on_one_object_is_run_once(
    instruments: Instruments, operations: tuple[int, ...]
) -> None:
    seen = []

    def scenario(world: World) -> Callable[[], None]:
        order: list[str] = []

        def work(name: str, count: int) -> None:
            for _ in range(count):
                world.at("shared")
                order.append(name)

        for place, count in enumerate(operations):
            world.spawn(str(place), lambda name=str(place), count=count: work(name, count))
        return lambda: seen.append(tuple(order))

    explore(instruments, scenario)
    names = [str(place) for place, count in enumerate(operations) for _ in range(count)]
    assert sorted(seen) == sorted(set(itertools.permutations(names)))


def test_operations_on_different_objects_are_run_in_one_order(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        for name in ("a", "b", "c"):
            world.spawn(name, lambda name=name: [world.at(name) for _ in range(3)])
        return lambda: None

    assert explore(instruments, scenario) == 1


def test_an_update_without_a_lock_is_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        total = 0

        def add() -> None:
            nonlocal total
            world.at("total")
            read = total
            world.at("total")
            total = read + 1

        for name in ("a", "b"):
            world.spawn(name, add)

        def check() -> None:
            assert total == 2

        return check

    with pytest.raises(AssertionError, match="1 == 2"):
        explore(instruments, scenario)


def test_locks_in_two_orders_are_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        one, other = instruments.Lock(), instruments.Lock()

        def both(first: object, second: object) -> None:
            with first, second:  # type: ignore[attr-defined]
                pass

        world.spawn("a", lambda: both(one, other))
        world.spawn("b", lambda: both(other, one))
        return lambda: None

    with pytest.raises(Deadlock, match="a: acquire lock 2; b: acquire lock 1"):
        explore(instruments, scenario)


def test_time_passes_when_nobody_can_run_or_as_an_alternative(instruments: Instruments) -> None:
    woken = set()

    def scenario(world: World) -> Callable[[], None]:
        condition = instruments.Condition()

        def wait() -> None:
            with condition:
                woken.add((condition.wait(5.0), instruments.monotonic()))

        def notify() -> None:
            with condition:
                condition.notify_all()

        world.spawn("wait", wait)
        world.spawn("notify", notify)
        return lambda: None

    explore(instruments, scenario)
    assert woken == {(True, 0.0), (False, 5.0)}
    woken.clear()
    explore(instruments, scenario, early_ticks=1)
    assert woken == {(True, 0.0), (True, 5.0), (False, 5.0)}


def test_a_wait_that_times_out_takes_nobody_from_those_who_are_notified(instruments: Instruments) -> None:
    woken = []

    def scenario(world: World) -> Callable[[], None]:
        condition = instruments.Condition()

        def wait(seconds: float | None) -> None:
            with condition:
                woken.append(condition.wait(seconds))

        def notify() -> None:
            world.sleep(2.0)
            with condition:
                condition.notify_all()

        world.spawn("patient", lambda: wait(None))
        world.spawn("impatient", lambda: wait(1.0))
        world.spawn("notify", notify)
        return lambda: None

    simulate(instruments, scenario)
    assert woken == [False, True]


def test_threads_that_never_end_are_found(instruments: Instruments) -> None:
    def scenario(world: World) -> Callable[[], None]:
        def spin() -> None:
            while True:
                world.at("shared")

        world.spawn("spin", spin)
        return lambda: None

    with pytest.raises(Endless, match="for ever"):
        explore(instruments, scenario)
