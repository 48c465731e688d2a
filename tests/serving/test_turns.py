"""Turns: one at a time, both sides served, holding, cancelling, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from poc_kernels.serving.turns import Turn, Turns, TurnsClosed

TIMEOUT = 10


class Party:
    """A thread that takes a turn, notes it, waits until it may go on, and gives the turn back."""

    def __init__(self, turn: Turn, name: str, log: list[str]) -> None:
        self.turn = turn
        self.entered = threading.Event()
        self.may_end = threading.Event()
        self.error: BaseException | None = None
        self._name, self._log = name, log
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.turn:
                self._log.append(self._name)
                self.entered.set()
                assert self.may_end.wait(TIMEOUT)
        except BaseException as error:
            self.error = error

    def wait_until_waiting(self) -> Party:
        eventually(lambda: self.turn.waiting)
        return self

    def join(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until a condition that no event announces holds."""
    tick = threading.Event()
    for _ in range(TIMEOUT * 1000):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("it never came")


def finish(parties: list[Party]) -> None:
    for party in parties:
        party.may_end.set()
    for party in parties:
        party.join()


def test_one_at_a_time() -> None:
    turns = Turns()
    inside = 0
    most = 0

    def work(make: Callable[[], Turn]) -> None:
        nonlocal inside, most
        turn = make()
        for _ in range(200):
            with turn:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work, args=(make,)) for make in (turns.inference, turns.proof) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert (most, inside) == (1, 0)


def test_sides_alternate_while_both_wait() -> None:
    turns, log = Turns(), list[str]()
    first = Party(turns.proof(), "proof 0", log)
    assert first.entered.wait(TIMEOUT)
    waiting = [
        Party(make(), name, log).wait_until_waiting()
        for make, name in [
            (turns.proof, "proof 1"),
            (turns.proof, "proof 2"),
            (turns.inference, "inference 1"),
            (turns.proof, "proof 3"),
            (turns.inference, "inference 2"),
        ]
    ]
    finish([first, *waiting])
    assert log == ["proof 0", "inference 1", "proof 1", "inference 2", "proof 2", "proof 3"]


@pytest.mark.parametrize("greedy", ["inference", "proof"])
def test_a_greedy_side_does_not_starve_the_other(greedy: str) -> None:
    turns = Turns()
    stop = threading.Event()
    greedy_turn = getattr(turns, greedy)

    def take_again_and_again() -> None:
        turn = greedy_turn()
        while not stop.is_set():
            with turn:
                pass

    threads = [threading.Thread(target=take_again_and_again, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    other = getattr(turns, "proof" if greedy == "inference" else "inference")()
    served = threading.Event()

    def take_some() -> None:
        for _ in range(50):
            with other:
                pass
        served.set()

    threads.append(threading.Thread(target=take_some, daemon=True))
    threads[-1].start()
    assert served.wait(TIMEOUT)
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)


def test_holding_lets_a_step_end_and_none_begin() -> None:
    turns, log = Turns(), list[str]()
    running = Party(turns.inference(), "running", log)
    assert running.entered.wait(TIMEOUT)
    turns.hold_inference()
    turns.hold_inference()
    assert turns.inference_held
    waiting = Party(turns.inference(), "waiting", log).wait_until_waiting()
    proof = Party(turns.proof(), "proof", log).wait_until_waiting()
    finish([running, proof])
    assert log == ["running", "proof"]
    assert waiting.turn.waiting
    turns.release_inference()
    assert not turns.inference_held
    finish([waiting])
    assert log == ["running", "proof", "waiting"]


def test_closing_wakes_waiters_and_refuses_later_ones() -> None:
    turns, log = Turns(), list[str]()
    running = Party(turns.proof(), "running", log)
    assert running.entered.wait(TIMEOUT)
    turns.hold_inference()
    waiting = [Party(make(), "no", log).wait_until_waiting() for make in (turns.proof, turns.inference)]
    assert not turns.closed
    turns.close()
    turns.close()
    assert turns.closed
    for party in waiting:
        party.join()
        assert isinstance(party.error, TurnsClosed)
    with pytest.raises(TurnsClosed, match="closed"), turns.inference():
        pass
    finish([running])
    assert running.error is None
    assert log == ["running"]


def test_cancelling_wakes_the_waiter_alone() -> None:
    turns, log = Turns(), list[str]()
    running = Party(turns.proof(), "running", log)
    assert running.entered.wait(TIMEOUT)
    cancelled = Party(turns.inference(), "cancelled", log).wait_until_waiting()
    other = Party(turns.inference(), "other", log).wait_until_waiting()
    cancelled.turn.cancel()
    cancelled.join()
    assert isinstance(cancelled.error, TurnsClosed)
    with pytest.raises(TurnsClosed, match="cancelled"), cancelled.turn:
        pass
    finish([running, other])
    assert log == ["running", "other"]


def test_a_turn_that_hangs_can_be_ended_by_another_thread() -> None:
    turns, log = Turns(), list[str]()
    hanging = Party(turns.inference(), "hanging", log)
    assert hanging.entered.wait(TIMEOUT)
    hanging.turn.end()
    hanging.turn.end()
    following = Party(turns.proof(), "following", log)
    assert following.entered.wait(TIMEOUT)
    # Its own late end takes nothing from who computes now.
    finish([hanging])
    third = Party(turns.proof(), "third", log).wait_until_waiting()
    assert not third.entered.is_set()
    finish([following, third])
    assert log == ["hanging", "following", "third"]


def test_a_turn_is_not_taken_twice() -> None:
    turns = Turns()
    turn = turns.inference()
    with turn, pytest.raises(RuntimeError, match="taken already"), turn:
        pass
    with turns.proof():
        pass


def test_an_error_inside_gives_the_device_back() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.inference():
        raise KeyError
    with turns.proof():
        pass
