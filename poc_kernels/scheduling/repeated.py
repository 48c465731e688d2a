"""A model's forward, computed again and again in one shape: in slices, which a GPU replays as captured graphs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .slices import MEASURED_FORWARDS, Pause, SlicedForward, Slices

logger = logging.getLogger("poc_kernels")


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


class RepeatedForward:
    """Runs a forward in slices, from one thread at a time; its shape may change, and is then measured anew.

    On CUDA the slices are captured as graphs whenever the shape changes, and replayed. A forward that cannot be
    captured, or whose replay is not bit-identical, runs without graphs, with a warning.

    Args:
        forward: computes a tensor from a tensor of any shape, both on ``device``.
        device: where it computes.
        slice_seconds: how long a slice should take at most.
        cuda_graphs: whether to capture it on CUDA.
        alone: entered for a capture: nothing else may draw torch's random numbers on the device meanwhile.
        as_captured: entered where the forward has to make the calls that it makes in a capture, or is captured.

    Attributes:
        captured: the graphs of the latest shape; None where it runs without.

    Raises:
        ValueError: slice_seconds is not positive.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
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
        self._shape: tuple[int, ...] | None = None
        self._sliced = SlicedForward(device, slice_seconds)

    @property
    def slices(self) -> Slices | None:
        """The slices of the forward in its latest shape; None until they are measured."""
        return self._sliced.slices

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether forwards of that shape are captured: the memory that they take is taken already."""
        return self.captured is not None and self._shape == shape

    def forget(self) -> None:
        """Measure and capture anew, because the forwards that follow compute something else."""
        self.captured = self._shape = None
        self._sliced.forget()

    def __call__(self, inputs: Tensor, pause: Pause) -> Tensor:
        """Compute the forward of ``inputs``; the result may be overwritten by the next call.

        Calls ``pause`` between slices; until the slices of the shape are measured, between all calls of torch.
        """
        shape = tuple(inputs.shape)
        if shape != self._shape:
            self.forget()  # one shape at a time: the last one's memory is given back first
            if self._cuda_graphs:
                self.captured = self._capture_checked(inputs, pause)
            self._shape = shape
        if self.captured is not None:
            return self.captured.replay(inputs, pause)
        return self._sliced.run(lambda: self._forward(inputs), pause)

    def _capture_checked(self, example: Tensor, pause: Pause) -> CapturedForward | None:
        """Capture the forward of that shape; None, with a warning, if its replay would not be bit-identical."""
        expected = self._sliced.run_unmeasured(lambda: self._forward(example), pause)
        with self._as_captured():  # measures the calls that will be captured
            for _ in range(MEASURED_FORWARDS):
                self._sliced.run(lambda: self._forward(example), pause)
        with self._alone():
            try:
                captured = self._capture(example)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory to capture the model's forward as a CUDA graph; it runs without: %s", error)
                return None  # another shape may have room
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

    def _capture(self, example: Tensor) -> CapturedForward:
        with self._as_captured():
            return capture(self._forward, self._sliced, example)


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
