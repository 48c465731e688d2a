"""A watchdog's clock counts the time in which the process ran, and no other."""

from __future__ import annotations

import types

import pytest
from web import eventually

from poc_kernels.scheduling import AwakeClock, awake


class Machine:
    """Stands in for `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(awake, "time", types.SimpleNamespace(monotonic=lambda: self.now))


def test_it_counts_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    clock = AwakeClock()
    for _ in range(40):
        machine.now += 0.25
        clock.now()
    assert clock.now() == pytest.approx(10.0)


@pytest.mark.parametrize("seconds", [2.0, 3600.0, 1e9])
def test_standing_still_is_not_counted(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    machine = Machine(monkeypatch)
    clock = AwakeClock()
    machine.now += 1.0
    assert clock.now() == pytest.approx(1.0)
    machine.now += seconds
    assert clock.now() == pytest.approx(1.1)
    machine.now += 0.5
    assert clock.now() == pytest.approx(1.6)


def test_a_thread_keeps_it_going_until_it_is_stopped() -> None:
    clock = AwakeClock()
    clock.start()
    eventually(lambda: clock._seconds > 0.0)  # nobody else reads it
    clock.stop()
    clock.stop()
    stopped = clock._seconds
    assert not clock._thread.is_alive()  # type: ignore[union-attr]
    assert clock.now() >= stopped


def test_a_clock_that_was_not_started_can_be_stopped() -> None:
    AwakeClock().stop()
