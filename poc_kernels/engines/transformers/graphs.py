"""A forward's slices as CUDA graphs: captured once per shape, replayed with a pause between slices."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from ...scheduling import SlicedForward
from ...scheduling.slices import Pause


class CapturedForward(NamedTuple):
    """A forward of one shape: its slices as CUDA graphs, and the memory that they read and write."""

    graphs: list[Any]
    static_input: Tensor
    static_output: Tensor

    def replay(self, inputs_embeds: Tensor, pause: Pause) -> Tensor:
        """Run the graphs on ``inputs_embeds``, with ``pause`` called between them; the next replay overwrites it."""
        self.static_input.copy_(inputs_embeds)
        for place, graph in enumerate(self.graphs):
            if place > 0:
                pause()
            graph.replay()
        return self.static_output


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
        with masks_as_outside_a_capture(), torch.cuda.stream(stream):
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


@contextlib.contextmanager
def masks_as_outside_a_capture() -> Iterator[None]:
    """Have transformers make the masks that it makes for whole sequences: none where attention is simply causal.

    During a capture it cannot check whether a batch is packed or padded, and makes explicit masks to be safe. With
    these, other attention kernels run, whose results are not bit-identical. Only this thread is affected: others may
    serve users meanwhile.
    """
    thread = threading.get_ident()

    def only_here(answer: Any, otherwise: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return answer if threading.get_ident() == thread else otherwise(*arguments, **named)

    with contextlib.ExitStack() as undo:
        for name, answer in (("find_packed_sequence_indices", None), ("is_tracing", False)):
            otherwise = getattr(masking_utils, name)
            undo.callback(setattr, masking_utils, name, otherwise)
            setattr(masking_utils, name, partial(only_here, answer, otherwise))
        yield
