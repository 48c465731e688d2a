"""The clock of the GPU benchmark: what it enqueues, and when it believes a round."""

import types

import pytest
import torch

from bench.projection import gpu_clock


class Device:
    """Stands in for torch.cuda: a queue that is late as long as the wait before a round is short."""

    def __init__(self, enough):
        self.enough, self.waits, self.log = enough, [], []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.at = None

            def record(self):
                self.at = len(device.log)
                device.log.append("event")

            def query(self):
                """Whether the GPU has come to it while others were still being enqueued."""
                return device.waits[-1] < device.enough

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        self.Event = Event

    def _sleep(self, cycles):
        self.waits.append(cycles)
        self.log.append("wait")

    def synchronize(self, device):
        self.log.append("synchronize")


@pytest.fixture
def clock_on(monkeypatch):
    def make(device):
        clock = gpu_clock.Clock(torch.device("cpu"))
        monkeypatch.setattr(gpu_clock, "torch", types.SimpleNamespace(cuda=device))
        clock._flush = types.SimpleNamespace(zero_=lambda: device.log.append("flush"))
        return clock

    return make


def test_a_round_is_enqueued_behind_a_wait(clock_on):
    device = Device(enough=0)
    clock = clock_on(device)
    calls = [lambda: device.log.append("a"), lambda: device.log.append("b")]
    assert clock._once(calls, cold=False) == [2.0, 2.0]
    assert device.log == ["wait", "event", "a", "event", "event", "b", "event", "synchronize"]
    device.log.clear()
    clock._once(calls, cold=True)
    assert device.log == ["wait", "flush", "event", "a", "event", "flush", "event", "b", "event", "synchronize"]


def test_a_round_that_began_before_all_of_it_was_enqueued_is_taken_again_after_a_longer_wait(clock_on):
    device = Device(enough=2**22)
    clock = clock_on(device)
    assert clock._once([lambda: device.log.append("a")], cold=False) == [2.0]
    assert device.waits == [2**20, 2**21, 2**22]
    clock._once([lambda: None], cold=False)
    assert device.waits[3:] == [2**22], "kept for the next round"


def test_the_wait_has_an_end(clock_on):
    device = Device(enough=2**60)
    clock = clock_on(device)
    clock._once([lambda: None], cold=False)
    assert device.waits[-1] == gpu_clock._MAX_WAIT


def test_calls_take_turns():
    ran = []
    clock = gpu_clock.Clock(torch.device("cpu"))
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = clock.interleaved(calls, 0.0, min_rounds=3, max_rounds=9, cold=False)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab", "a first round that is not counted"
    assert {name: len(samples) for name, samples in times.items()} == {"a": 3, "b": 3, "c": 3}
