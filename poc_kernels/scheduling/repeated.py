"""A model's forward, computed again and again in one shape: in slices, which a GPU replays as captured graphs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .slices import Pause, SlicedForward, Slices

logger = logging.getLogger("poc_kernels")

_MAX_KINDS = 8
"""The slices of this many kinds of forwards are remembered."""


class CapturedForward(NamedTuple):
    """A forward of one shape: its slices as CUDA graphs, and the memory that they read and write."""

    graphs: list[Any]
    static_input: Tensor
    static_output: Tensor

    def replay(self, inputs: Tensor, pause: Pause) -> Tensor:
        """Run the graphs on ``inputs``, with ``pause`` called between them; the next replay overwrites the result."""
        self.static_input.copy_(inputs)
        for place, graph in enumerate(self.graphs):
            if place > 0:
                pause()
            graph.replay()
        return self.static_output


_Kind = tuple[tuple[int, ...], Hashable]
"""Shape and option of a forward."""


@dataclasses.dataclass
class _Known:
    """What is known of a kind of forward."""

    sliced: SlicedForward
    too_large: bool = False
    """Whether there was no memory for its graphs."""


class RepeatedForward:
    """Runs a forward in slices, from one thread at a time. Forwards of one shape and one option are of one kind.

    Each kind is measured once. On CUDA its slices are captured as graphs and replayed, of one kind at a time: when
    another kind comes, their memory is given back first. A kind is captured when it is new, and one that had graphs
    before when it comes twice in a row: two that alternate do not wait for a capture per forward. A forward that cannot
    be captured, or whose replay is not bit-identical, runs without graphs, with a warning.

    Args:
        forward: computes a tensor from a tensor of any shape, both on ``device``, and an option, which is hashable.
        device: where it computes.
        slice_seconds: how long a slice should take at most.
        cuda_graphs: whether to capture it on CUDA.
        alone: entered for a capture: nothing else may draw torch's random numbers on the device meanwhile.
        as_captured: entered where the forward has to make the calls that it makes in a capture, or is captured.

    Attributes:
        captured: the graphs of the latest kind; None where it runs without.

    Raises:
        ValueError: slice_seconds is not positive.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Any], Tensor],
        device: torch.device,
        *,
        slice_seconds: float,
        cuda_graphs: bool,
        alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        as_captured: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.captured: CapturedForward | None = None
        self._forward, self._alone, self._as_captured = forward, alone, as_captured
        self._cuda_graphs = cuda_graphs and device.type == "cuda"
        self._sliced_forward = functools.partial(SlicedForward, device, slice_seconds)
        self._sliced_forward()  # checks slice_seconds
        self._kinds: collections.OrderedDict[_Kind, _Known] = collections.OrderedDict()  # the latest is the last
        self._captured_kind: _Kind | None = None

    @property
    def slices(self) -> Slices | None:
        """The slices of the latest kind of forward; None until they are measured."""
        return next(reversed(self._kinds.values())).sliced.slices if self._kinds else None

    def holds(self, shape: tuple[int, ...], option: Hashable = None) -> bool:
        """Tell whether forwards of that shape and option are captured: the memory that they take is taken already."""
        return self._captured_kind == (shape, option)

    def forget(self) -> None:
        """Measure and capture anew, because the forwards that follow compute something else."""
        self._kinds.clear()
        self.release()

    def release(self) -> None:
        """Give back the memory of graphs."""
        self.captured = self._captured_kind = None

    def __call__(self, inputs: Tensor, pause: Pause, option: Hashable = None) -> Tensor:
        """Compute the forward of ``inputs``; the result may be overwritten by the next call.

        Calls ``pause`` between slices; until the slices of this kind are measured, between all calls of torch.
        """
        kind = tuple(inputs.shape), option
        capture_now = self._cuda_graphs and (kind not in self._kinds or kind == next(reversed(self._kinds)))
        known = self._remember(kind)
        if kind != self._captured_kind:
            self.release()
            if capture_now and not known.too_large:
                self.captured = self._capture_checked(inputs, pause, option)
                self._captured_kind = kind if self.captured is not None else None
        if self.captured is not None:
            return self.captured.replay(inputs, pause)
        return known.sliced.run(lambda: self._forward(inputs, option), pause)

    def _remember(self, kind: _Kind) -> _Known:
        """Return what is known of a kind, as the latest one; forget the kind that was not there for longest."""
        known = self._kinds.pop(kind, None) or _Known(self._sliced_forward())
        self._kinds[kind] = known
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        return known

    def _capture_checked(self, example: Tensor, pause: Pause, option: Hashable) -> CapturedForward | None:
        """Capture the latest kind of forward; None, with a warning, if its replay would not be bit-identical."""
        known = next(reversed(self._kinds.values()))
        expected = known.sliced.run_unmeasured(lambda: self._forward(example, option), pause)
        with self._as_captured():  # measures the calls that will be captured
            while known.sliced.slices is None:
                known.sliced.run(lambda: self._forward(example, option), pause)
        with self._alone():
            try:
                captured = self._capture(example, option)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory to capture the model's forward as a CUDA graph; it runs without: %s", error)
                known.too_large = True  # another kind may have room
                return None
            except (RuntimeError, NotImplementedError) as error:
                self._give_up_graphs(str(error))
                return None
        if not torch.equal(captured.replay(example, pause), expected):
            self._give_up_graphs("its replay is not bit-identical")
            return None
        return captured

    def _give_up_graphs(self, reason: str) -> None:
        logger.warning("the model's forward cannot be captured as a CUDA graph and runs without: %s", reason)
        self._cuda_graphs = False

    def _capture(self, example: Tensor, option: Hashable) -> CapturedForward:
        known = next(reversed(self._kinds.values()))
        with self._as_captured():
            return capture(lambda inputs: self._forward(inputs, option), known.sliced, example)


def capture(forward: Callable[[Tensor], Tensor], sliced: SlicedForward, example: Tensor) -> CapturedForward:
    """Capture ``forward`` of inputs shaped like ``example``, one graph per slice of ``sliced``, which is measured.

    All graphs share one pool of memory: what a graph leaves in it is there for those that follow.

    Raises:
        torch.OutOfMemoryError, RuntimeError, NotImplementedError: what torch raises where it cannot capture. The
            device and torch's generator can be used as before.
    """
    before = stream = torch.cuda.current_stream(example.device)
    if before == torch.cuda.default_stream(example.device):  # which cannot be captured
        stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    static_input = example.clone()
    stream.wait_stream(before)
    graphs: list[Any] = []
    pool = torch.cuda.graph_pool_handle()

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        # Other threads may use the device meanwhile but not sample: the graph has torch's generator until its end.
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    def next_graph() -> None:
        graphs[-1].capture_end()
        begin()

    try:
        with torch.cuda.stream(stream):
            begin()
            static_output = sliced.run(lambda: forward(static_input), next_graph)
            graphs[-1].capture_end()
    except BaseException:
        # A capture that broke must be ended, and leaves torch's generator in the graph's hands.
        for graph in graphs[-1:]:
            with torch.cuda.stream(stream), contextlib.suppress(RuntimeError):
                graph.capture_end()
        torch.cuda.set_stream(before)
        generator = torch.cuda.default_generators[example.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    before.wait_stream(stream)
    return CapturedForward(graphs, static_input, static_output)
