"""Sends users' requests and proofs to a rig from one event loop; for each token it only notes the time."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import gc
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

PRIORITIES, EQUAL, PARTITION = "priorities", "equal", "partition"
"""The lanes of validation: of low priority, of the priority of inference, or in a part of a GPU."""
OUTSTANDING_PROOFS = 4
"""Batches of proofs that are submitted and not answered: one is computed, the others wait. With one that waits, an
engine in another process would be idle while its verdict and the next batch travel."""


class DifferenceError(RuntimeError):
    """Something computed while users are served is not what was computed alone."""


class Request:
    """One request, and the times of its tokens, by the clock of the event loop."""

    __slots__ = ("answer", "due", "error", "prompt", "submitted", "times")

    def __init__(self, prompt: int, due: float) -> None:
        self.prompt = prompt
        self.due = due
        self.submitted = 0.0
        self.times: list[float] = []
        self.answer: Any = None
        self.error: str | None = None


class Rig(Protocol):
    """Drives a node, in this process or over HTTP. All calls come from the event loop's thread."""

    prompts: int
    """Number of prompts whose expected answer is known."""
    proofs: int
    """Number of batches of proofs whose distances are known."""
    slices: list[float] | None
    """Seconds of slices of proofs as they come; None where they are unknown."""
    step_waits: list[float] | None
    """Seconds that steps of inference waited for their turn; None where they are unknown."""
    slice_waits: list[float] | None
    """Seconds that slices of proofs waited for their turn; None where they are unknown."""

    async def switch(self, condition: Condition) -> None:
        """Change to the pacing of a condition, while nothing computes."""

    async def counters(self) -> dict[str, float] | None:
        """Return what the engine counts of its steps and slices; None where that is unknown."""

    def begin(self, request: Request, ended: Callable[[Request], None]) -> None:
        """Submit a request; ``ended`` is called on the loop once it has its times and its answer or error."""

    def validate(self, proof: int, ended: Callable[[BaseException | None], None]) -> None:
        """Submit a batch; ``ended`` is called on the loop, with an error if it failed or a distance differs."""

    def nonces_between(self, begin: float, end: float) -> float:
        """Return how many nonces were done between two times of the loop's clock, in the present condition."""

    def trouble(self) -> str | None:
        """Return why nothing more will come; None while all is well."""

    def check(self, requests: Sequence[Request]) -> None:
        """Raise if a request failed, or if an answer or a verdict is not the one given alone."""


_POLL_SECONDS = 2.0


async def wait_for(rig: Rig, awaitable: Awaitable[Any], timeout_seconds: float) -> Any:
    """Return the result of ``awaitable``, unless the node gets into trouble first.

    Raises:
        RuntimeError: the node is in trouble.
        TimeoutError: the time is over.
    """
    waiting = asyncio.ensure_future(awaitable)
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    try:
        while not waiting.done():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise TimeoutError(f"nothing came for {timeout_seconds:g} s")
            await asyncio.wait([waiting], timeout=min(left, _POLL_SECONDS))
            trouble = rig.trouble()
            if trouble is not None and not waiting.done():
                raise RuntimeError(f"the node is in trouble: {trouble}")
        return waiting.result()
    finally:
        waiting.cancel()


@dataclasses.dataclass(frozen=True)
class Condition:
    """What runs in a block.

    Args:
        name: in tables.
        chat: whether requests come.
        validation: whether proofs come.
        share, paced: of the `Pacing`; a share of None for no pacing.
        lanes: `PRIORITIES`, `EQUAL` or `PARTITION`.
        whole_batches: whether each batch of proofs is computed in one go, whoever waits.
    """

    name: str
    chat: bool = True
    validation: bool = True
    share: float | None = None
    paced: bool = True
    lanes: str = PRIORITIES
    whole_batches: bool = False


@dataclasses.dataclass
class Block:
    """The results of a block: the requests that arrived in it, even if they ended later, and the nonces done in it."""

    begin: float
    seconds: float
    requests: list[Request]
    refused: int
    tokens: int
    nonces: float
    slices: list[float]
    step_waits: list[float]
    slice_waits: list[float]
    counters: dict[str, float] | None = None
    """What the engine counted from the block's beginning until its requests had ended, and the ``seconds`` of that."""


def regular(every_seconds: float, seconds: float, prompts: int, seed: str) -> list[tuple[float, int]]:
    """Return arrivals at regular intervals, with prompts drawn as by `poisson`."""
    generator = random.Random(seed)
    count = math.ceil(seconds / every_seconds)
    return [(at * every_seconds, generator.randrange(prompts)) for at in range(count)]


def poisson(per_second: float, seconds: float, prompts: int, seed: str) -> list[tuple[float, int]]:
    """Draw the arrivals of an open-loop Poisson process: seconds since its beginning, and the number of the prompt."""
    generator = random.Random(seed)
    arrivals: list[tuple[float, int]] = []
    at = generator.expovariate(per_second)
    while at < seconds:
        arrivals.append((at, generator.randrange(prompts)))
        at += generator.expovariate(per_second)
    return arrivals


class Proofs:
    """Keeps the queue of proofs filled until it is stopped."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._next = 0
        self._outstanding = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._first = asyncio.Event()
        self._idle = asyncio.Event()

    async def start(self, timeout_seconds: float) -> None:
        """Submit the first batches, and wait until one is done."""
        for _ in range(OUTSTANDING_PROOFS):
            self._submit()
        await wait_for(self._rig, self._first.wait(), timeout_seconds)
        if self._error is not None:
            raise self._error

    def _submit(self) -> None:
        self._outstanding += 1
        proof, self._next = self._next % self._rig.proofs, self._next + 1
        self._rig.validate(proof, self._ended)

    def _ended(self, error: BaseException | None) -> None:
        self._outstanding -= 1
        self._error = self._error or error
        self._first.set()
        if self._error is None and not self._stopping:
            self._submit()
        if self._outstanding == 0:
            self._idle.set()

    async def stop(self, timeout_seconds: float) -> None:
        """Submit no more, and wait until all batches are answered.

        Raises:
            DifferenceError: a batch had another distance than alone.
        """
        self._stopping = True
        await wait_for(self._rig, self._idle.wait(), timeout_seconds)
        if self._error is not None:
            raise self._error


async def run_block(
    rig: Rig,
    condition: Condition,
    arrivals: Sequence[tuple[float, int]],
    seconds: float,
    *,
    max_in_flight: int,
    timeout_seconds: float,
) -> Block:
    """Run one condition for ``seconds``, and then until all its requests have ended; proofs come all the while.

    Args:
        max_in_flight: requests that come when this many are in flight are refused, as the node's gate refuses them.
        timeout_seconds: limit for each thing that is waited for.

    Raises:
        DifferenceError: a distance or an answer is not the one computed alone.
        TimeoutError: something did not end.
    """
    loop = asyncio.get_running_loop()
    gc.collect()  # what earlier blocks left is not collected in this one
    await rig.switch(condition)
    proofs = Proofs(rig)
    if condition.validation:
        await proofs.start(timeout_seconds)
    recorded = (rig.slices, rig.step_waits, rig.slice_waits)
    marks = [0 if values is None else len(values) for values in recorded]
    in_flight = refused = 0
    drained = asyncio.Event()
    requests: list[Request] = []
    counted, counted_at = await rig.counters(), loop.time()
    begin = loop.time() + 0.02
    end = begin + seconds

    def ended(_: Request) -> None:
        nonlocal in_flight
        in_flight -= 1
        if in_flight == 0:
            drained.set()

    def arrive(due: float, prompt: int) -> None:
        nonlocal in_flight, refused
        if in_flight >= max_in_flight:
            refused += 1
            return
        in_flight += 1
        drained.clear()
        request = Request(prompt, due)
        requests.append(request)
        request.submitted = loop.time()
        rig.begin(request, ended)

    if condition.chat:
        for at, prompt in arrivals:
            loop.call_at(begin + at, arrive, begin + at, prompt)
    await asyncio.sleep(end - loop.time())
    slices, step_waits, slice_waits = (
        [] if values is None else values[mark:] for values, mark in zip(recorded, marks, strict=True)
    )
    if in_flight > 0:
        await wait_for(rig, drained.wait(), timeout_seconds)
    counters = _counted_since(counted, await rig.counters(), loop.time() - counted_at)
    if condition.validation:
        await proofs.stop(timeout_seconds)
    rig.check(requests)
    tokens = sum(bisect.bisect_left(request.times, end) for request in requests)
    return Block(
        begin=begin,
        seconds=seconds,
        requests=requests,
        refused=refused,
        tokens=tokens,
        nonces=rig.nonces_between(begin, end),
        slices=slices,
        step_waits=step_waits,
        slice_waits=slice_waits,
        counters=counters,
    )


def _counted_since(
    before: dict[str, float] | None, after: dict[str, float] | None, seconds: float
) -> dict[str, float] | None:
    if before is None or after is None:
        return None
    return {"seconds": seconds, **{name: after[name] - before[name] for name in after}}


async def saturation(rig: Rig, in_flight: int, seconds: float, timeout_seconds: float) -> float:
    """Measure the requests per second of a closed loop: ``in_flight`` users, of whom each asks again when answered.

    What counts are the tokens that come in the last three quarters of ``seconds``.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    window = (begin + seconds / 4, begin + seconds)
    requests: list[Request] = []
    active = 0
    drained = asyncio.Event()

    def ask() -> None:
        nonlocal active
        active += 1
        request = Request(len(requests) % rig.prompts, loop.time())
        request.submitted = request.due
        requests.append(request)
        rig.begin(request, ended)

    def ended(_: Request) -> None:
        nonlocal active
        active -= 1
        if loop.time() < window[1]:
            ask()
        elif active == 0:
            drained.set()

    for _ in range(in_flight):
        ask()
    await wait_for(rig, drained.wait(), seconds + timeout_seconds)
    rig.check(requests)
    tokens = sum(
        bisect.bisect_left(request.times, window[1]) - bisect.bisect_left(request.times, window[0])
        for request in requests
    )
    tokens_each = sum(len(request.times) for request in requests) / len(requests)
    return tokens / (window[1] - window[0]) / tokens_each


async def ask_alone(rig: Rig, prompt: int, timeout_seconds: float) -> Request:
    """Send one request while nothing else computes."""
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    rig.begin(Request(prompt, loop.time()), answered.set_result)
    request: Request = await wait_for(rig, answered, timeout_seconds)
    if request.error is not None:
        raise RuntimeError(f"a request failed with nothing else running: {request.error}")
    return request
