"""What the device of vLLM's API server takes of users, and how long calls of proofs are by that."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("greenlet")

from poc_kernels.engines.vllm import remote
from poc_kernels.engines.vllm.remote import RemoteDevice


class Clock:
    """Time that passes where somebody sleeps, and a link whose users are chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.in_engine, self.cancelled = 1000.0, 0, False
        monkeypatch.setattr(remote, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def users(self) -> int:
        return self.in_engine

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def waited(self, device: RemoteDevice) -> float:
        """How long the device waits for users before it makes another call."""
        began = self.now
        device.wait_for_users()
        return self.now - began


def test_no_call_precedes_the_first_step_of_whoever_has_just_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, arrivals = Clock(monkeypatch), types.SimpleNamespace(count=0)
    device = RemoteDevice(clock, share=0.1, arrivals=arrivals)  # type: ignore[arg-type]
    clock.sleep(10.0)
    assert (clock.waited(device), device.budget()["alone"]) == (0.0, True)
    arrivals.count = 1  # and not yet in the engine
    assert clock.waited(device) == pytest.approx(0.02, abs=0.002)
    assert not device.budget()["alone"]
    clock.in_engine = 1
    assert clock.waited(device) == pytest.approx(0.02, abs=0.002)
    clock.in_engine = arrivals.count = 0
    assert (clock.waited(device), device.budget()["alone"]) == (0.0, True)


def test_users_who_never_reach_the_engine_keep_proofs_for_a_moment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, arrivals = Clock(monkeypatch), types.SimpleNamespace(count=0)
    device = RemoteDevice(clock, share=0.1, arrivals=arrivals)  # type: ignore[arg-type]
    arrivals.count = 1
    waited = [clock.waited(device) for _ in range(100)]
    assert 0.2 < sum(waited) < 0.3
    assert waited[-1] == 0.0
    arrivals.count = 2  # one who is there already does not make another one wait
    assert clock.waited(device) == 0.0


def test_users_who_were_served_while_nothing_was_proven_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    device = RemoteDevice(clock, share=0.1)  # type: ignore[arg-type]
    clock.in_engine = 1
    assert not device.budget()["alone"]
    clock.sleep(5.0)  # nobody looks; whether they had steps is not known
    assert not device.budget()["alone"]
    for _ in range(30):
        clock.waited(device)
    assert device.budget()["alone"]  # without one, as it told all the time


def test_a_call_is_long_only_where_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, arrivals = Clock(monkeypatch), types.SimpleNamespace(count=0)
    device = RemoteDevice(clock, share=0.1, arrivals=arrivals)  # type: ignore[arg-type]
    assert device.budget()["seconds_without_users"] > device.budget()["seconds"] > 0
    for arrivals.count, clock.in_engine in ((1, 0), (0, 1)):  # the second: in the engine after its answer
        assert device.budget()["seconds_without_users"] == 0


def test_requests_that_have_not_reached_the_engine_are_drained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, arrivals = Clock(monkeypatch), types.SimpleNamespace(count=1)
    device = RemoteDevice(clock, share=0.1, arrivals=arrivals)  # type: ignore[arg-type]
    assert not device.drain_users(0.5)
    arrivals.count = 0
    assert device.drain_users(0.5)
