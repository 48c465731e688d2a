"""Two priorities on one device: inference high, validation the lowest.

On a GPU they are those of two streams, neither of them the default stream; on a processor, those of threads.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_LOWEST_PRIORITY = 19


class PriorityLanes:
    """The two streams of a device, and how tensors pass between them. A processor has none: see `lower_thread`.

    A priority decides whose blocks a free multiprocessor takes next; blocks that run are not interrupted. Graphs keep
    the priorities of the stream that they are captured on, so enter `inference` or `validation` before a capture.

    Args:
        device: where both run.
        validation_sms: keep validation to so many multiprocessors (a CUDA green context), besides; what
            torch and the driver make of the number is theirs to round.

    Raises:
        ValueError: validation_sms is not between 1 and what the device has, or nothing here can do it.
    """

    def __init__(self, device: torch.device | str, *, validation_sms: int | None = None) -> None:
        self.device = torch.device(device)
        self._inference: Any = None
        self._validation: Any = None
        self._green_context: Any = None
        self._lowers_threads = threads_have_priorities(self.device)
        if self.device.type != "cuda":
            if validation_sms is not None:
                raise ValueError(f"validation_sms needs a CUDA device, got {self.device}")
            return
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        least, greatest = _priority_range()
        with torch.cuda.device(self.device):
            self._inference = torch.cuda.Stream(self.device, priority=greatest)  # type: ignore[no-untyped-call]
            if validation_sms is None:
                self._validation = torch.cuda.Stream(self.device, priority=least)  # type: ignore[no-untyped-call]
            else:
                self._green_context, self._validation = _green_stream(self.device, validation_sms)
        self.begin()

    @property
    def inference_stream(self) -> Any:
        """The stream of inference; None on a processor."""
        return self._inference

    @property
    def validation_stream(self) -> Any:
        """The stream of validation; None on a processor."""
        return self._validation

    def begin(self) -> None:
        """Let both streams wait for what the current stream has been given so far: weights that were loaded there."""
        if self._inference is not None:
            current = torch.cuda.current_stream(self.device)
            self._inference.wait_stream(current)
            self._validation.wait_stream(current)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """The current stream of this thread is that of inference inside the block."""
        with self._on(self._inference):
            yield

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """The current stream of this thread is that of validation inside the block."""
        with self._on(self._validation):
            yield

    @property
    def lowers_threads(self) -> bool:
        """Whether `lower_thread` does something (`threads_have_priorities`)."""
        return self._lowers_threads

    def lower_thread(self) -> bool:
        """Give the calling thread, one of validation, the lowest priority of a processor, and whoever it starts.

        Call it before the thread computes: OpenMP starts the threads that help a thread at its first parallel call, and
        they inherit. Where cores are wanted the thread then has about 1/70 of a core beside each thread of inference
        (nice 19). It cannot be raised again without privileges, so it is to be a thread of its own.

        Returns:
            Whether it was lowered; never on a GPU.
        """
        return self.lowers_threads and _lower_thread()

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield

    def hand_over(self, tensor: Tensor, *, to_inference: bool = False) -> Tensor:
        """Let the other side use ``tensor``, made on the current stream.

        What the other side does next waits until it is made, and its memory is not reused before that is done.

        Args:
            to_inference: to the stream of inference; else to that of validation.

        Returns:
            ``tensor`` itself.
        """
        stream = self._inference if to_inference else self._validation
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
            tensor.record_stream(stream)
        return tensor

    def prioritise_streams(self, owner: object) -> int:
        """Replace every stream that ``owner`` keeps in an attribute, and what it owns keeps, by one of high priority.

        For a stack that makes its own streams of priority 0. The first is replaced by the stream of inference, each
        other one by a stream of its own. Call it before anything was captured or launched on them.

        Args:
            owner: searched through attributes, lists, tuples and dicts, as far as the package that its class is from.

        Returns:
            How many places there were.
        """
        if self._inference is None:
            return 0
        raised: dict[int, Any] = {}

        def replace(stream: Any) -> Any:
            if id(stream) not in raised:
                new = self._inference
                if raised:
                    new = torch.cuda.Stream(self.device, priority=_priority_range()[1])  # type: ignore[no-untyped-call]
                raised[id(stream)] = stream, new  # the old one lives, or its id could come again
            return raised[id(stream)][1]

        return _replace_streams(owner, replace, type(owner).__module__.rpartition(".")[0], set())


def threads_have_priorities(device: torch.device) -> bool:
    """Whether a thread that computes on ``device`` can be given a priority of its own: on a processor under Linux.

    Nobody needs a privilege to lower one, but a sandbox may refuse it: a thread that ends at once tries.
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
    """Bounds what a thread has given to the device and not seen done. On a processor nothing is in flight.

    Args:
        device: whose current stream is watched.
        most: slices that may be in flight, at least 1.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self._device, self._most = device, most
        self._events: collections.deque[Any] = collections.deque()

    def mark(self) -> None:
        """End a slice; wait on the host, without spinning, until less than the most are in flight."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        while len(self._events) >= self._most:
            self._events.popleft().synchronize()


def _priority_range() -> tuple[int, int]:
    """Least and greatest priority; the lower the number, the greater."""
    range_of = getattr(torch.cuda.Stream, "priority_range", None)
    least, greatest = range_of() if range_of is not None else (0, -1)
    return least, greatest


def _green_stream(device: torch.device, multiprocessors: int) -> tuple[Any, Any]:
    there = torch.cuda.get_device_properties(device).multi_processor_count
    if not 1 <= multiprocessors < there:
        raise ValueError(f"validation_sms must be in [1, {there}) on this device, got {multiprocessors}")
    make = getattr(torch.cuda, "GreenContext", None)
    if make is None:
        raise ValueError("validation_sms needs a torch with green contexts (2.9 on), this one has none")
    try:
        context = make.create(num_sms=multiprocessors, device_id=device.index)
        return context, context.Stream()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"validation_sms needs green contexts, which fail here: {error}") from error


def _replace_streams(owner: Any, replace: Callable[[Any], Any], package: str, seen: set[int]) -> int:
    if id(owner) in seen:
        return 0
    seen.add(id(owner))
    if isinstance(owner, dict):
        items: list[tuple[Any, Any]] = list(owner.items())
    elif isinstance(owner, list):
        items = list(enumerate(owner))
    elif isinstance(owner, tuple):
        return sum(_replace_streams(value, replace, package, seen) for value in owner)
    elif type(owner).__module__.startswith(package) and hasattr(owner, "__dict__"):
        items = list(vars(owner).items())
    else:
        return 0
    replaced = 0
    for key, value in items:
        if isinstance(value, torch.Stream):
            if isinstance(owner, (dict, list)):
                owner[key] = replace(value)
            else:
                setattr(owner, key, replace(value))
            replaced += 1
        else:
            replaced += _replace_streams(value, replace, package, seen)
    return replaced
