"""Stand-ins for vLLM's engine: workers that step, and a client whose calls they answer between their steps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_engine import SmallEngine

from poc_kernels.engines.vllm import compat, session, trial
from poc_kernels.engines.vllm.messages import METHOD, Open
from poc_kernels.protocol import DistanceProver, EngineProver, PoCConfig, Row
from poc_kernels.protocol.engine import never

OPEN = Open(slice_seconds=0.002, cuda_graphs=True)


CONFIG = PoCConfig("block", 1, "key", r_target=1.4, batch_size=4, seq_len=8, use_random_projection=True)
CONFIGS = {
    proof: CONFIG if proof == CONFIG.proof else dataclasses.replace(CONFIG, proof=proof, r_target=None, seq_len=17)
    for proof in EngineProver.forms
}
"""A round of each form."""


class EngineDeadError(Exception):
    """What vLLM's client raises."""


class LayeredEngine(SmallEngine):
    """A `SmallEngine` of several layers, which pauses before each: a session's engine."""

    layers = 5
    windows = (16,)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.replaced = False
        self.inside = False
        self.others_fail = True
        self.forgotten = 0
        self.before_layer: Callable[[], object] = lambda: None

    def refresh(self) -> bool:
        replaced, self.replaced = self.replaced, False
        return replaced

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def forget(self) -> None:
        self.forgotten += 1

    def all_ranks_failed(self) -> bool:
        return self.others_fail

    def forward(self, inputs_embeds: Any, pause: Callable[[], None] = never, after_layer: Any = None) -> Any:
        hidden = inputs_embeds
        for layer in range(self.layers):
            pause()
            assert self.inside
            self.before_layer()
            hidden = super().forward(hidden) / 2
            hidden = hidden if after_layer is None else after_layer(layer, hidden)
        return hidden


class WithoutLayers(LayeredEngine):
    """The engine of a model after whose layers no transform is possible."""

    @property
    def layers(self) -> int:  # type: ignore[override]
        raise ValueError("model must call its layers in order")


def rows(first: int, count: int = 4) -> list[Row]:
    """Rows of nonces that follow each other."""
    return [Row("key", nonce) for nonce in range(first, first + count)]


class Whole(SmallEngine):
    """The model of `LayeredEngine`, in one go."""

    layers = LayeredEngine.layers

    def forward(self, inputs_embeds: Any, pause: Any = None, after_layer: Any = None) -> Any:
        for layer in range(self.layers):
            inputs_embeds = super().forward(inputs_embeds) / 2
            inputs_embeds = inputs_embeds if after_layer is None else after_layer(layer, inputs_embeds)
        return inputs_embeds


def distances(of: list[Row], config: PoCConfig = CONFIG) -> list[float]:
    """What proofs of these rows are, computed in one go."""
    return DistanceProver(Whole()).prove(config, of).values


def outcomes(of: list[Row], config: PoCConfig) -> list[Any]:
    """What proofs of any form are of these rows, computed in one go."""
    return EngineProver(Whole()).prove(config, of).values


class Worker:
    """A worker whose model is a matrix: each step makes a token of those before it."""

    def __init__(self, world_size: int = 1, rank: int = 0) -> None:
        self.vllm_config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(world_size=world_size))
        self.rank = rank
        self.engine = LayeredEngine()
        self.in_step: Callable[[], object] = lambda: None
        self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))

    def execute_model(self, scheduler_output: Any) -> None:
        """Compute the next token of every request."""
        assert not self.engine.inside
        self.in_step()
        for request in scheduler_output.requests:
            states = torch.stack([self.weight[token] for token in request.tokens]).cumsum(0)
            request.tokens.append(int((torch.tanh(states[-1]) @ self.weight).argmax()))

    def poc_kernels_call(self, command: str, payload: dict[str, Any]) -> dict[str, Any]:
        return session.call(self, command, payload)


ENDLESS = 10**9
"""Tokens of a request that goes on until a test lowers its count."""


class Request:
    """A user's request."""

    def __init__(self, prompt: int, count: int) -> None:
        self.tokens = [prompt]
        self.count = count
        self.done = threading.Event()


def scheduled(requests: list[Request], prompt_tokens: int = 0) -> Any:
    """What vLLM's scheduler tells a worker of a step."""
    return types.SimpleNamespace(
        total_num_scheduled_tokens=len(requests) + prompt_tokens,
        requests=requests,
    )


def text_of(prompt: int, count: int) -> list[int]:
    """The tokens of a request, alone."""
    worker, request = Worker(), Request(prompt, count)
    for _ in range(count):
        worker.execute_model(scheduled([request]))
    return request.tokens


class Core(threading.Thread):
    """The loop of vLLM's engine: all calls that came, then a step."""

    def __init__(self, workers: list[Worker]) -> None:
        super().__init__(name="engine-core", daemon=True)
        self.workers = workers
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.requests: list[Request] = []
        self.paused = False
        self.emptied = True

    def run(self) -> None:
        while True:
            stepping = bool(self.requests) and not self.paused
            while not (stepping and self.inbox.empty()):
                work = self.inbox.get()
                if work is None:
                    return
                work()
                stepping = bool(self.requests) and not self.paused
                if self.inbox.empty():
                    break
            if stepping:
                self.step()

    def step(self) -> None:
        output = scheduled(self.requests)
        for worker in self.workers:
            worker.execute_model(output)
        ended = [request for request in self.requests if len(request.tokens) > request.count]
        self.requests = [request for request in self.requests if request not in ended]
        if not self.requests:
            for worker in self.workers:  # the scheduler takes what ended off the workers' books
                worker.execute_model(scheduled([]))
        for request in ended:
            request.done.set()


class Client:
    """vLLM's client, on an event loop of its own, and the engine behind it. Its calls may be made to fail."""

    def __init__(self, workers: list[Worker]) -> None:
        self.core = Core(workers)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="event-loop", daemon=True)
        self.unfinished: set[Request] = set()
        self.dead = self.stopping = False
        self.calls: list[tuple[str, Any]] = []
        self.pauses: list[str] = []
        self.answer: Callable[[str, Any, Any], Any] = lambda command, payload, answers: answers
        """Given a command, its payload and the answers to it: returns what the caller gets, or raises."""

    def start(self) -> None:
        self.core.start()
        self._thread.start()

    def close(self) -> None:
        self.core.inbox.put(None)
        self.core.join(20)
        self.close_loop()

    def close_loop(self) -> None:
        """End the event loop. Idempotent."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(20)
            self.loop.close()

    @property
    def errored(self) -> bool:
        return self.dead

    def request(self, prompt: int, count: int) -> Request:
        """Have ``count`` tokens made."""
        request = Request(prompt, count)
        self.unfinished.add(request)
        self.core.inbox.put(lambda: self.core.requests.append(request))
        return request

    def get_num_unfinished_requests(self) -> int:
        self.unfinished = {request for request in self.unfinished if not request.done.is_set()}
        return len(self.unfinished)

    async def collective_rpc(self, method: str, args: tuple[str, Any]) -> Any:
        assert method == METHOD
        self.calls.append(args)
        answers = await self._in_core(lambda: [worker.poc_kernels_call(*args) for worker in self.core.workers])
        return self.answer(*args, answers)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.pauses.append("pause")
        await self._in_core(lambda: setattr(self.core, "paused", True))

    async def resume_generation(self) -> None:
        self.pauses.append("resume")
        await self._in_core(lambda: setattr(self.core, "paused", False))

    async def _in_core(self, work: Callable[[], Any]) -> Any:
        if self.dead:
            raise EngineDeadError("EngineCore encountered an issue")
        if self.stopping:
            raise Exception("Call to method failed: Server shutting down")
        future = self.loop.create_future()

        def answer(settle: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                settle(value)

        def run() -> None:
            try:
                settle, value = future.set_result, work()
            except Exception as error:
                settle, value = future.set_exception, Exception(f"Call to method failed: {error}")
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(answer, settle, value)

        self.core.inbox.put(run)
        return await future


def install(monkeypatch: pytest.MonkeyPatch, differs: str | None = None) -> list[Any]:
    """Have sessions compute with stand-ins, and trials say what differs; return what trials are given."""
    given: list[Any] = []

    async def scored(client: Any, prompt: list[int], count: int) -> Any:
        answer = types.SimpleNamespace(
            token_ids=[*range(count)],
            logprobs=[{token: types.SimpleNamespace(logprob=-float(token))} for token in range(count)],
        )
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])

    def compare(engine: Any, texts: list[list[int]], served: list[list[float]]) -> str | None:
        given.append((texts, served))
        return differs

    monkeypatch.setattr(session, "VllmEngine", lambda worker, **options: worker.engine)
    monkeypatch.setattr(trial, "compare", compare)
    monkeypatch.setattr(trial, "independence", lambda engine, *, transforms: given.append((engine, transforms)))
    monkeypatch.setattr(compat, "scored", scored)
    return given


def small_session(worker: Worker, **options: Any) -> session.Session:
    """A session on a worker's engine."""
    slice_seconds = session.UNCUT_SECONDS if options.get("lockstep") else OPEN.slice_seconds
    return session.Session(worker, worker.engine, EngineProver(worker.engine, slice_seconds=slice_seconds), **options)
