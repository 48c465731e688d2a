"""Outputs reach their requests, and the room in the cache is what continuous batching can really use."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from served import limits_of, load, started
from transformers import Qwen3ForCausalLM
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from web import TIMEOUT, client, error_of, eventually, serving

from poc_kernels.engines.transformers import openai_app
from poc_kernels.engines.transformers.admission import ENGINE_FAILED
from poc_kernels.engines.transformers.batching import ContinuousBatching, Router
from poc_kernels.engines.transformers.config import batching_config, generation_config
from poc_kernels.scheduling import PriorityLanes, Turns


def output(request_id: str, status: RequestStatus = RequestStatus.FINISHED, error: str | None = None) -> Any:
    return GenerationOutput(request_id, status=status, error=error)


async def heard(deliver: Any, *request_ids: str) -> tuple[Router, list[Any]]:
    """What comes for ``request_ids`` when another thread delivers."""
    router, told = Router(), list[Any]()
    for request_id in request_ids:
        router.register(request_id, told.append)
    await asyncio.to_thread(deliver, router)
    await asyncio.sleep(0)
    return router, told


def test_outputs_come_in_order_until_the_last() -> None:
    def deliver(router: Router) -> None:
        router.deliver(output("a", RequestStatus.DECODING))
        assert router.in_flight() == 2
        router.deliver_batch([output("b"), output("a"), output("a")])

    router, told = asyncio.run(heard(deliver, "a", "b"))
    assert [one.request_id for one in told] == ["a", "b", "a"]
    assert router.in_flight() == 0
    assert router.wait_idle(0)


def test_what_nobody_waits_for_is_dropped() -> None:
    def deliver(router: Router) -> None:
        router.forget("a")
        router.deliver_batch([output("a"), output("c")])

    router, told = asyncio.run(heard(deliver, "a"))
    assert told == []
    assert router.output_queue.empty()
    assert router.result_handlers == {}


def test_all_in_flight_fail_without_internals() -> None:
    router, told = asyncio.run(heard(lambda router: router.fail_all("secret"), "a", "b"))
    assert {one.request_id for one in told} == {"a", "b"}
    assert {one.error for one in told} == {ENGINE_FAILED}
    assert all(one.is_finished() for one in told)
    assert router.fail_all("again") == 0


def test_each_request_is_told_on_its_own_loop() -> None:
    router, where = Router(), dict[str, int]()
    registered, told = threading.Barrier(3, timeout=TIMEOUT), threading.Barrier(3, timeout=TIMEOUT)

    async def listen(request_id: str) -> None:
        done = asyncio.Event()

        def on_output(_: Any) -> None:
            where[request_id] = threading.get_ident()
            done.set()

        router.register(request_id, on_output)
        await asyncio.to_thread(registered.wait)
        await asyncio.wait_for(done.wait(), TIMEOUT)
        await asyncio.to_thread(told.wait)

    threads = {name: threading.Thread(target=lambda name=name: asyncio.run(listen(name))) for name in ("a", "b")}
    for thread in threads.values():
        thread.start()
    registered.wait()
    router.deliver_batch([output("a"), output("b")])
    told.wait()
    assert where == {name: thread.ident for name, thread in threads.items()}
    for thread in threads.values():
        thread.join(TIMEOUT)


def test_a_closed_loop_is_forgotten() -> None:
    router = Router()

    async def register() -> None:
        router.register("a", lambda _: None)

    asyncio.run(register())
    assert not router.wait_idle(0)
    router.deliver(output("a", RequestStatus.DECODING))
    assert router.in_flight() == 0


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("sliding", [False, True])
def test_a_request_may_fill_the_cache_and_no_more(tiny_model_dir: Path, block_size: int, sliding: bool) -> None:
    model, tokenizer = load(tiny_model_dir)
    if sliding:
        model.config.sliding_window = 10
        model.config.layer_types = ["sliding_attention", "full_attention"] * (model.config.num_hidden_layers // 2)
        weights = model.state_dict()
        with torch.random.fork_rng(devices=[]):
            model = Qwen3ForCausalLM(model.config).eval()
        model.load_state_dict(weights)
    limits = {"kv_block_size": block_size, "kv_blocks": 8, "max_batch_tokens": 16, "max_new_tokens": 10**6}
    with (
        started(model, tokenizer, **limits) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        room = inference._max_tokens
        assert 2 * block_size <= room
        assert sliding or 7 * block_size <= room <= 8 * block_size

        def ask(prompt: int, new: int) -> Any:
            return http.post("/v1/completions", json={"prompt": " a" * prompt, "max_tokens": new})

        assert ask(1, 1).json()["usage"]["prompt_tokens"] == 1
        for prompt in (1, room - 1):
            assert ask(prompt, room - prompt).json()["usage"]["total_tokens"] == room
            refused = ask(prompt, room - prompt + 1)
            assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")
        assert inference.restarts == 0


class Streams(PriorityLanes):
    """Lanes that tell which threads are inside, and what was given to them."""

    inside: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__("cpu")
        self.given: list[Any] = []

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        self.inside.add(threading.get_ident())
        try:
            yield
        finally:
            self.inside.discard(threading.get_ident())

    def prioritise_streams(self, owner: object) -> int:
        self.given.append(owner)
        return 0


class Batched:
    """A life of continuous batching whose every forward is looked at."""

    def __init__(self, directory: Path) -> None:
        self.model, tokenizer = load(directory)
        self.attention = self.model.config._attn_implementation
        self.turns, self.streams, self.router = Turns(), Streams(), Router()
        self.forwards: list[tuple[bool, bool]] = []
        self.model.register_forward_pre_hook(self._look)
        self.sampling = generation_config(self.model, tokenizer, 0)
        self.batching = ContinuousBatching(
            self.model,
            self.sampling,
            batching_config(limits_of(), "cpu"),
            self.router,
            self.turns,
            self.streams,
        )

    def _look(self, *_: Any) -> None:
        self.forwards.append((self.batching._turn.computing, threading.get_ident() in self.streams.inside))

    async def ask(self, count: int = 5) -> Any:
        done = asyncio.get_running_loop().create_future()

        def take(one: Any) -> None:
            if one.is_finished():
                done.set_result(one)

        config = copy.deepcopy(self.sampling)
        config.max_new_tokens = count
        config.eos_token_id = None
        assert self.batching.submit("a", [5, 6, 7], config, False, take)
        return await asyncio.wait_for(done, TIMEOUT)


def test_every_step_has_its_turn_and_its_stream(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    reset = ContinuousBatchingIOs._reset_static_tensors

    def look_and_reset(*arguments: Any, **named: Any) -> None:
        cleared.append(threading.get_ident() in Streams.inside)
        reset(*arguments, **named)

    monkeypatch.setattr(ContinuousBatchingIOs, "_reset_static_tensors", look_and_reset)
    batched = Batched(tiny_model_dir)
    try:
        answer = asyncio.run(batched.ask())
    finally:
        batched.turns.close()
        assert batched.batching.stop(TIMEOUT)
    assert len(answer.generated_tokens) == 5
    assert len(batched.forwards) >= 5
    assert set(batched.forwards) == {(True, True)}
    assert set(cleared) == {True}  # what steps read, when the thread begins too
    assert [type(each).__name__ for each in batched.streams.given] == ["ContinuousBatchProcessor"]
    assert batched.model.config._attn_implementation == batched.attention


def test_no_step_begins_while_inference_is_paused(tiny_model_dir: Path) -> None:
    batched = Batched(tiny_model_dir)

    async def ask_while_paused() -> Any:
        asked = asyncio.create_task(batched.ask())
        await asyncio.to_thread(eventually, lambda: batched.batching._turn.waiting)
        assert batched.forwards == []
        assert batched.batching.stalled_for() == 0.0
        batched.turns.resume_inference()
        return await asked

    try:
        batched.turns.pause_inference()
        assert len(asyncio.run(ask_while_paused()).generated_tokens) == 5
    finally:
        batched.turns.close()
        assert batched.batching.stop(TIMEOUT)


def test_a_step_waits_for_its_turn(tiny_model_dir: Path) -> None:
    batched = Batched(tiny_model_dir)
    proof = batched.turns.proof()

    async def ask_beside_a_slice() -> Any:
        with proof, batched.turns.alone():
            asked = asyncio.create_task(batched.ask())
            await asyncio.to_thread(eventually, lambda: batched.batching._turn.waiting)
            assert batched.forwards == []
        return await asked

    try:
        assert len(asyncio.run(ask_beside_a_slice()).generated_tokens) == 5
    finally:
        batched.turns.close()
        assert batched.batching.stop(TIMEOUT)


def test_a_stop_ends_a_step_that_waits(tiny_model_dir: Path) -> None:
    batched = Batched(tiny_model_dir)
    batched.turns.pause_inference()
    told: list[Any] = []

    async def submit() -> None:
        config = copy.deepcopy(batched.sampling)
        config.max_new_tokens = 5
        batched.batching.submit("a", [5, 6, 7], config, False, told.append)
        await asyncio.to_thread(eventually, lambda: batched.batching._turn.waiting)
        assert await asyncio.to_thread(batched.batching.stop, TIMEOUT)

    asyncio.run(submit())
    assert batched.forwards == []
    assert not batched.batching._turn.waiting
    assert batched.batching.died_of() is None
    with batched.turns.proof():  # the device is free
        pass


def test_a_manager_that_cannot_be_made_leaves_the_attention_as_it_was(tiny_model_dir: Path) -> None:
    """Plain generation is tried next, on the same model."""
    model, tokenizer = load(tiny_model_dir)
    attention, make = "eager", model.init_continuous_batching
    model.set_attn_implementation(attention)

    def fail_after(**settings: Any) -> Any:
        make(**settings)
        assert model.config._attn_implementation != attention
        raise ValueError("no such layer")

    model.init_continuous_batching = fail_after
    config = batching_config(limits_of(), "cpu")
    with pytest.raises(ValueError, match="no such layer"):
        ContinuousBatching(
            model, generation_config(model, tokenizer, 0), config, Router(), Turns(), PriorityLanes("cpu")
        )
    assert model.config._attn_implementation == attention
