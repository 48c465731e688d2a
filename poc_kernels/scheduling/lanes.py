"""Two priorities on one device: high for inference, the lowest for validation.

On a GPU they are the priorities of two streams, neither of which is the default stream; on a CPU, those of threads.
"""

from __future__ import annotations

import collections
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_LOWEST_PRIORITY = 19


class PriorityLanes:
    """The stream of inference and the stream of validation on a device. A CPU has none: see `lower_thread`.

    A priority decides whose blocks a free SM takes next; blocks that run are not interrupted. A graph keeps the
    priority of the stream that it is captured on, so enter `inference` or `validation` before a capture.

    Args:
        device: where both run.
        validation_sms: how many SMs validation may use (a CUDA green context); torch and the driver may round it.

    Attributes:
        inference_stream, validation_stream: the two streams; None on a CPU.
        lowers_threads: whether `lower_thread` does something (`threads_have_priorities`).

    Raises:
        ValueError: validation_sms is not less than the number of SMs of the device and at least 1, or torch, the
            driver or the device has no green contexts.
    """

    def __init__(self, device: torch.device | str, *, validation_sms: int | None = None) -> None:
        self.device = torch.device(device)
        self.inference_stream: Any = None
        self.validation_stream: Any = None
        self.lowers_threads = threads_have_priorities(self.device)
        if self.device.type != "cuda":
            if validation_sms is not None:
                raise ValueError(f"validation_sms needs a CUDA device, got {self.device}")
            return
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        lowest, highest = _priority_range()
        with torch.cuda.device(self.device):
            self.inference_stream = _stream(self.device, highest)
            if validation_sms is None:
                self.validation_stream = _stream(self.device, lowest)
            else:
                self._green_context, self.validation_stream = _green_stream(self.device, validation_sms)
        self.wait_for_current_stream()

    def wait_for_current_stream(self) -> None:
        """Let both streams wait for what the current stream was given so far, such as the loading of weights."""
        if self.inference_stream is not None:
            current = torch.cuda.current_stream(self.device)
            self.inference_stream.wait_stream(current)
            self.validation_stream.wait_stream(current)

    def inference(self) -> AbstractContextManager[None]:
        """Make the stream of inference the current stream of this thread inside the block."""
        return _on(self.inference_stream)

    def validation(self) -> AbstractContextManager[None]:
        """Make the stream of validation the current stream of this thread inside the block."""
        return _on(self.validation_stream)

    def lower_thread(self) -> bool:
        """Give the calling thread, which computes validation, and the threads that it starts the lowest CPU priority.

        Call it before the thread computes: OpenMP starts the threads that help a thread at its first parallel call, and
        they inherit its priority. Where cores are contended, the thread then gets about 1/70 of a core beside each
        thread of inference (nice 19). Raising it again takes a privilege: use a thread that does nothing else.

        Returns:
            Whether the priority was lowered; never on a GPU.
        """
        return self.lowers_threads and _lower_thread()

    def prioritise_streams(self, owner: object) -> int:
        """Replace every stream that ``owner``, or what it owns, keeps in an attribute by one of high priority.

        For a stack that makes streams of priority 0 of its own. The first is replaced by the stream of inference, each
        other one by a new stream. Call it before anything is captured or launched on them.

        Args:
            owner: searched through attributes, lists, tuples and dicts, but not into objects whose class is from
                another package.

        Returns:
            How many references were replaced.
        """
        if self.inference_stream is None:
            return 0
        replaced: dict[int, Any] = {}

        def replace(stream: Any) -> Any:
            if id(stream) not in replaced:
                new = _stream(self.device, _priority_range()[1]) if replaced else self.inference_stream
                replaced[id(stream)] = stream, new  # keeps the old one alive, or its id could be used again
            return replaced[id(stream)][1]

        return _replace_streams(owner, replace, type(owner).__module__.rpartition(".")[0], set())


def threads_have_priorities(device: torch.device) -> bool:
    """Return whether a thread that computes on ``device`` can be given a lower priority: on a CPU under Linux.

    Lowering takes no privilege, but a sandbox may refuse it: it is tried in a thread that ends at once.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_lower_thread).result()


def _lower_thread() -> bool:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    except OSError:
        return False
    return True


class InFlight:
    """Bounds the slices that a thread has launched and that are not known to be done. On a CPU there are none.

    Args:
        device: whose current stream is watched.
        max_slices: at most this many are in flight; at least 1.

    Raises:
        ValueError: max_slices is less than 1.
    """

    def __init__(self, device: torch.device, max_slices: int) -> None:
        if max_slices < 1:
            raise ValueError(f"max_slices must be at least 1, got {max_slices}")
        self._device, self._max_slices = device, max_slices
        self._events: collections.deque[Any] = collections.deque()

    def mark(self, wait: bool = True) -> None:
        """End a slice; wait on the host, without spinning, until fewer than max_slices are in flight.

        Args:
            wait: whether to; else ask `has_room` before the next slice.
        """
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        while wait and len(self._events) >= self._max_slices:
            self._events.popleft().synchronize()

    def has_room(self) -> bool:
        """Tell whether fewer than max_slices are in flight, without waiting for one."""
        while self._events and self._events[0].query():
            self._events.popleft()
        return len(self._events) < self._max_slices


def _priority_range() -> tuple[int, int]:
    """Return the lowest and the highest priority of a stream: the lower the number, the higher the priority."""
    range_of = getattr(torch.cuda.Stream, "priority_range", None)
    lowest, highest = range_of() if range_of is not None else (0, -1)
    return lowest, highest


def _on(stream: Any) -> AbstractContextManager[None]:
    # Entered, a stream makes its device the current one, too.
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _stream(device: torch.device, priority: int) -> Any:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


def _green_stream(device: torch.device, sms: int) -> tuple[Any, Any]:
    there = torch.cuda.get_device_properties(device).multi_processor_count
    if not 1 <= sms < there:
        raise ValueError(f"validation_sms must be in [1, {there}) on this device, got {sms}")
    make = getattr(torch.cuda, "GreenContext", None)
    if make is None:
        raise ValueError("validation_sms needs a torch with green contexts (2.9 on), this one has none")
    try:
        context = make.create(num_sms=sms, device_id=device.index)
        return context, context.Stream()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"validation_sms needs green contexts, which fail here: {error}") from error


def _replace_streams(owner: Any, replace: Callable[[Any], Any], package: str, seen: set[int]) -> int:
    if id(owner) in seen:
        return 0
    seen.add(id(owner))
    if isinstance(owner, tuple):
        return sum(_replace_streams(value, replace, package, seen) for value in owner)
    if not isinstance(owner, (dict, list)):
        if not (type(owner).__module__.startswith(package) and hasattr(owner, "__dict__")):
            return 0
        owner = vars(owner)
    replaced = 0
    for key, value in list(owner.items() if isinstance(owner, dict) else enumerate(owner)):
        if isinstance(value, torch.Stream):
            owner[key] = replace(value)
            replaced += 1
        else:
            replaced += _replace_streams(value, replace, package, seen)
    return replaced
