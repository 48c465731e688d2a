"""Outputs reach their requests, and the room in the cache is what continuous batching can really use."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from served import TIMEOUT, client, error_of, load, serving, started
from transformers import Qwen3ForCausalLM
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from poc_kernels.serving.admission import ENGINE_FAILED
from poc_kernels.serving.batching import Router


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
    limits = {"cb_block_size": block_size, "cb_num_blocks": 8, "cb_max_batch_tokens": 16, "max_new_tokens": 10**6}
    with started(model, tokenizer, **limits) as inference, serving(inference.build_app()) as url, client(url) as http:
        room = inference._most_tokens
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
