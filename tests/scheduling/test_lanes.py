"""PriorityLanes on a CPU, and on stand-ins for a GPU; streams that others made; slices in flight."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python

from poc_kernels.scheduling import InFlight, PriorityLanes
from poc_kernels.scheduling import lanes as lanes_module

CUDA = torch.device("cuda", 0)


# ---- a CPU ----


def test_on_a_cpu_there_are_no_streams() -> None:
    lanes = PriorityLanes("cpu")
    assert lanes.device == torch.device("cpu")
    assert lanes.inference_stream is lanes.validation_stream is None
    lanes.wait_for_current_stream()
    with lanes.inference(), lanes.validation():
        pass
    assert lanes.prioritise_streams(types.SimpleNamespace()) == 0
    in_flight = InFlight(torch.device("cpu"), 1)
    for _ in range(5):
        assert in_flight.has_room()
        in_flight.mark()
        in_flight.mark(wait=False)


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")


LOWERED = """
import os, threading, torch
from concurrent.futures import ThreadPoolExecutor
from poc_kernels.scheduling import PriorityLanes

def priority():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def lower():
    lowered = PriorityLanes("cpu").lower_thread()
    before = set(os.listdir("/proc/self/task"))
    torch.set_num_threads(2)
    torch.randn(2**22).add_(1)  # starts OpenMP's own threads
    started = set(os.listdir("/proc/self/task")) - before
    return lowered, priority(), {os.getpriority(os.PRIO_PROCESS, int(task)) for task in started}

usual = priority()
with ThreadPoolExecutor(1) as pool:
    assert PriorityLanes("cpu").lowers_threads
    print(pool.submit(lower).result())
assert priority() == usual
"""


@ON_LINUX
def test_a_thread_of_validation_has_the_lowest_priority_and_so_do_those_it_starts(tmp_path: Path) -> None:
    assert run_python(LOWERED, tmp_path) == "(True, 19, {19})"


def test_where_threads_have_no_priorities_nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "setpriority", None)
    lanes = PriorityLanes("cpu")
    assert not lanes.lowers_threads
    assert not lanes.lower_thread()


@ON_LINUX
def test_a_system_that_refuses_a_lower_priority_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert not PriorityLanes("cpu").lowers_threads
    assert not PriorityLanes("cpu").lower_thread()


def test_errors_inside_go_through() -> None:
    lanes = PriorityLanes("cpu")
    for enter in (lanes.inference, lanes.validation):
        with pytest.raises(KeyError), enter():
            raise KeyError


def test_a_cpu_has_no_sms() -> None:
    with pytest.raises(ValueError, match="validation_sms needs a CUDA device, got cpu"):
        PriorityLanes("cpu", validation_sms=4)


@pytest.mark.parametrize("max_slices", [0, -1])
def test_something_must_be_in_flight(max_slices: int) -> None:
    with pytest.raises(ValueError, match=f"max_slices must be at least 1, got {max_slices}"):
        InFlight(torch.device("cpu"), max_slices)


# ---- stand-ins for a device ----


class Stream:
    """A stream without a device."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options, self.waited = name, options, list[Any]()

    def wait_stream(self, stream: Any) -> None:
        self.waited.append(stream)

    def __repr__(self) -> str:
        return self.name


class Device:
    """What `PriorityLanes` and `InFlight` ask of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Stream] = []
        self.current = Stream("current")
        self.properties = types.SimpleNamespace(multi_processor_count=8)
        for name in ("Stream", "current_stream", "device", "stream", "get_device_properties", "current_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.delattr(torch.cuda, "GreenContext", raising=False)

    def _Stream(self, device: torch.device, priority: int) -> Stream:  # noqa: N802
        self.made.append(Stream(f"priority {priority}", device=device, priority=priority))
        return self.made[-1]

    def _current_stream(self, _: torch.device) -> Stream:
        return self.current

    def _current_device(self) -> int:
        return 0

    def _device(self, _: torch.device) -> Any:
        return contextlib.nullcontext()

    def _get_device_properties(self, _: torch.device) -> Any:
        return self.properties

    def _stream(self, stream: Stream) -> Any:
        @contextlib.contextmanager
        def on() -> Any:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        return on()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_two_streams_of_two_priorities_that_wait_for_what_was_before(cuda: Device) -> None:
    lanes = PriorityLanes("cuda")
    assert lanes.device == CUDA
    inference, validation = lanes.inference_stream, lanes.validation_stream
    assert cuda.made == [inference, validation]
    assert not lanes.lower_thread()  # streams have priorities there
    assert inference.options["priority"] < validation.options["priority"]  # the lower the number, the greater
    assert inference.waited == validation.waited == [cuda.current]
    before = cuda.current
    with lanes.validation():
        assert cuda.current is validation
        with lanes.inference():
            assert cuda.current is inference
        assert cuda.current is validation
    assert cuda.current is before


def test_the_range_of_priorities_is_asked_for(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(device: torch.device, priority: int) -> Stream:
        return cuda._Stream(device, priority)

    make.priority_range = lambda: (0, -5)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "Stream", make)
    PriorityLanes("cuda:0")
    assert [stream.options["priority"] for stream in cuda.made] == [-5, 0]


@pytest.mark.parametrize("count", [0, 8, 100, -1])
def test_more_sms_than_there_are(cuda: Device, count: int) -> None:
    with pytest.raises(ValueError, match=rf"validation_sms must be in \[1, 8\) on this device, got {count}"):
        PriorityLanes("cuda", validation_sms=count)


def test_a_torch_without_green_contexts(cuda: Device) -> None:
    with pytest.raises(ValueError, match="needs a torch with green contexts"):
        PriorityLanes("cuda", validation_sms=2)


def test_a_driver_without_green_contexts(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**_: Any) -> Any:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "GreenContext", types.SimpleNamespace(create=create), raising=False)
    with pytest.raises(ValueError, match="green contexts, which fail here: driver too old"):
        PriorityLanes("cuda", validation_sms=2)


def test_a_green_context_has_validation_s_stream(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    green = Stream("green")

    def create(*, num_sms: int, device_id: int) -> Any:
        asked.append((num_sms, device_id))
        return types.SimpleNamespace(Stream=lambda: green)

    monkeypatch.setattr(torch.cuda, "GreenContext", types.SimpleNamespace(create=create), raising=False)
    lanes = PriorityLanes("cuda", validation_sms=2)
    assert asked == [(2, 0)]
    assert lanes.validation_stream is green
    assert cuda.made == [lanes.inference_stream]


# ---- streams that others made ----


class Owned:
    """An object of this package."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Foreign:
    """An object of another package."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


Owned.__module__, Foreign.__module__ = "stack.batching.inner", "elsewhere.batching"


def test_streams_are_found_wherever_a_stack_keeps_them(cuda: Device) -> None:
    lanes = PriorityLanes("cuda")
    foreign = Foreign(stream=Stream("foreign"))
    inner = Owned(stream=Stream("inner"))
    compute = Stream("compute")
    owner = Owned(
        compute=compute,
        compute_again=[compute],
        pairs=[Stream("in a list"), {"copy": Stream("in a dict")}],
        several=(inner, [Stream("in a list in a tuple")]),
        number=3,
        none=None,
        foreign=foreign,
    )
    inner.owner = owner  # a cycle
    owner.again = inner
    assert lanes.prioritise_streams(owner) == 6
    high = lanes.inference_stream
    assert owner.compute is owner.compute_again[0] is high
    others = [owner.pairs[0], owner.pairs[1]["copy"], inner.stream, owner.several[1][0]]
    assert others == cuda.made[2:], "one for each, and no stream for two"
    assert all(each.options == high.options for each in others)
    assert foreign.stream.name == "foreign"
    assert (owner.number, owner.none, inner.owner) == (3, None, owner)


def test_a_stack_without_streams(cuda: Device) -> None:
    assert PriorityLanes("cuda").prioritise_streams(Owned(a=[], b={})) == 0


# ---- in flight ----


@pytest.mark.parametrize("max_slices", [1, 2, 3])
def test_never_more_than_the_maximum_in_flight(cuda: Device, monkeypatch: pytest.MonkeyPatch, max_slices: int) -> None:
    made: list[Event] = []

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            assert blocking, "waiting would spin on a core that inference needs"
            self.recorded: Any = None
            self.seen_done = False
            made.append(self)

        def record(self, stream: Any) -> None:
            self.recorded = stream

        def synchronize(self) -> None:
            assert all(event.seen_done for event in made[: made.index(self)]), "oldest first"
            self.seen_done = True

        def query(self) -> bool:
            return self.seen_done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    in_flight = InFlight(CUDA, max_slices)
    for marked in range(1, 10):
        in_flight.mark()
        assert len(made) == marked
        assert made[-1].recorded is cuda.current
        # One more slice may be launched now, and then the maximum is in flight.
        assert sum(not event.seen_done for event in made) == min(marked, max_slices - 1)
    # Or whoever may not wait looks whether there is room.
    assert in_flight.has_room()
    in_flight.mark(wait=False)
    assert not in_flight.has_room()
    made[-max_slices].seen_done = True
    assert in_flight.has_room()


def test_the_priorities_of_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", object)
    assert lanes_module._priority_range() == (0, -1)
