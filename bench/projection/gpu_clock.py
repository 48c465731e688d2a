"""Times calls on a GPU: a round runs every call once, as a graph, between two events, with a cold L2 where asked."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

import torch

from bench.projection.checks import Call

_FLUSH_BYTES = 2**28
"""More than any L2 holds."""
_FIRST_WAIT, _MAX_WAIT = 2**20, 2**28
"""Clock cycles that a GPU waits before a round: half a millisecond at first, a tenth of a second at most."""
PROFILED_CALLS = 3


@contextlib.contextmanager
def captured(calls: dict[str, Call], device: torch.device) -> Iterator[dict[str, Call]]:
    """Give each call as the replay of a CUDA graph; on a CPU the calls themselves.

    Launching from Python takes longer than a kernel for few rows. Servers of models replay graphs as well.
    """
    if device.type != "cuda":
        yield calls
        return
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    kept = []
    for name, call in calls.items():
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            call()  # compiles, and fills caches
        torch.cuda.current_stream(device).wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append(call())
    try:
        yield {name: graph.replay for name, graph in graphs.items()}
    finally:
        torch.cuda.synchronize(device)
        graphs.clear()
        kept.clear()
        gc.collect()
        torch.cuda.empty_cache()


class Clock:
    """Runs calls in turn and times each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wait = _FIRST_WAIT
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def _once(self, calls: list[Call], cold: bool) -> list[float]:
        """Time each call. On a GPU all are enqueued before the first begins, so that no time is one of launching."""
        if self._flush is None:
            return [self._seconds(call) for call in calls]
        while True:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
            torch.cuda._sleep(self._wait)
            for call, (start, end) in zip(calls, events, strict=True):
                if cold:
                    self._flush.zero_()
                start.record()
                call()
                end.record()
            in_time = not events[0][0].query()
            torch.cuda.synchronize(self._device)
            if in_time or self._wait >= _MAX_WAIT:
                return [1e-3 * start.elapsed_time(end) for start, end in events]
            self._wait *= 2

    @staticmethod
    def _seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def interleaved(
        self, calls: dict[str, Call], seconds: float, min_rounds: int, max_rounds: int, cold: bool
    ) -> dict[str, list[float]]:
        """Time each call in ``min_rounds`` to ``max_rounds`` rounds, as many as fit into ``seconds``."""
        names = list(calls)
        start = time.perf_counter()
        self._once([calls[name] for name in names], cold)
        rounds = min(max(int(seconds / max(time.perf_counter() - start, 1e-6)), min_rounds), max_rounds)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name, value in zip(order, self._once([calls[name] for name in order], cold), strict=True):
                times[name].append(value)
        return times


def kernel_seconds(call: Call, device: torch.device) -> dict[str, float]:
    """Return the mean time of each kernel of a call, by name; empty on a CPU and where the driver forbids profiling."""
    if device.type != "cuda":
        return {}
    call()
    torch.cuda.synchronize(device)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED_CALLS):
                call()
            torch.cuda.synchronize(device)
    except RuntimeError:
        return {}
    return {
        event.key: 1e-6 * event.self_device_time_total / PROFILED_CALLS
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }
