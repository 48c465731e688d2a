"""Plain generation serves users as continuous batching does: in turns, pausable, cancellable, and one at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from architectures import plain_tokens, tiny
from served import load, started
from transformers import GenerationConfig
from web import CHAT, TIMEOUT, chat, client, error_of, events, eventually, pieces, serving, text_of

from poc_kernels.engines.transformers import inference as inference_module
from poc_kernels.engines.transformers import openai_app
from poc_kernels.engines.transformers.admission import ENGINE_FAILED
from poc_kernels.engines.transformers.batching import Router
from poc_kernels.engines.transformers.eager import EagerGeneration
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.engines.transformers.sampling import sampling_of
from poc_kernels.scheduling import PriorityLanes, Turns

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("gptj")


class Life:
    """A life of plain generation whose every forward is looked at, and may be held up."""

    def __init__(self, model: Any) -> None:
        self.turns, self.router = Turns(), Router()
        self.computing: list[bool] = []
        self.before = lambda: None
        self._hook = model.register_forward_pre_hook(self._look)
        self.generation = EagerGeneration(model, self.router, self.turns, PriorityLanes("cpu"))

    def _look(self, *_: Any) -> None:
        self.computing.append(self.generation._turn.computing)
        self.before()

    def submit(self, request_id: str, prompt: list[int], streaming: bool = False, **sampling: Any) -> list[Any]:
        """Begin a request on the running loop; its outputs as they come."""
        told: list[Any] = []
        config = GenerationConfig(**{"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **sampling})
        how = dataclasses.replace(sampling_of(config), logprobs=1)
        assert self.generation.submit(request_id, prompt, config, streaming, told.append, how)
        return told

    async def finished(self, *requests: list[Any]) -> None:
        async def look() -> None:
            while not all(told and told[-1].is_finished() for told in requests):
                await asyncio.sleep(0.005)

        await asyncio.wait_for(look(), TIMEOUT)

    def end(self) -> None:
        self._hook.remove()
        self.turns.close()
        assert self.generation.stop(TIMEOUT)


@pytest.fixture
def life(model: Any) -> Iterator[Life]:
    life = Life(model)
    yield life
    life.end()


def test_a_token_at_a_time_each_in_its_turn(model: Any, life: Life) -> None:
    async def ask() -> tuple[list[Any], list[Any]]:
        streamed, whole = life.submit("a", PROMPT, streaming=True), life.submit("b", PROMPT)
        await life.finished(streamed, whole)
        return streamed, whole

    streamed, whole = asyncio.run(ask())
    expected = plain_tokens(model, PROMPT, 6)
    assert [output.generated_tokens for output in streamed] == [expected[: n + 1] for n in range(6)]
    assert [output.is_finished() for output in streamed] == [False] * 5 + [True]
    assert [output.generated_tokens for output in whole] == [expected]
    for output in streamed + whole:
        assert [each.top for each in output.logprobs] == [
            ((token, each.logprob),) for token, each in zip(output.generated_tokens, output.logprobs, strict=True)
        ]
    assert life.computing[:12] == [True] * 12
    assert life.router.in_flight() == 0
    assert life.generation.stalled_for() == 0.0


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_token_ends_a_text(model: Any, life: Life, as_list: bool) -> None:
    expected = plain_tokens(model, PROMPT, 6)
    end = expected[2]

    async def ask() -> list[Any]:
        told = life.submit("a", PROMPT, eos_token_id=[1, end] if as_list else end)
        await life.finished(told)
        return told

    assert [output.generated_tokens for output in asyncio.run(ask())] == [expected[: expected.index(end) + 1]]


def test_a_request_that_fails_ends_alone(model: Any, life: Life) -> None:
    async def ask() -> tuple[list[Any], list[Any]]:
        wrong, right = life.submit("a", [10**6]), life.submit("b", PROMPT)
        await life.finished(wrong, right)
        return wrong, right

    wrong, right = asyncio.run(ask())
    assert [(output.error, output.generated_tokens) for output in wrong] == [(ENGINE_FAILED, [])]
    assert right[-1].generated_tokens == plain_tokens(model, PROMPT, 6)
    assert life.generation.died_of() is None


def test_a_pause_keeps_what_is_in_flight(model: Any, life: Life) -> None:
    async def ask() -> list[Any]:
        told = life.submit("a", PROMPT, streaming=True)
        while not told:
            await asyncio.sleep(0.001)
        life.turns.pause_inference()
        await asyncio.to_thread(eventually, lambda: life.generation._turn.waiting or told[-1].is_finished())
        assert life.generation.stalled_for() == 0.0
        life.turns.resume_inference()
        await life.finished(told)
        return told

    assert asyncio.run(ask())[-1].generated_tokens == plain_tokens(model, PROMPT, 6)


def test_a_request_whose_client_is_gone_ends(model: Any, life: Life) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(TIMEOUT)

    async def ask() -> tuple[list[Any], ...]:
        life.before = hold
        gone, waiting, served = (life.submit(name, PROMPT, max_new_tokens=6) for name in ("a", "b", "c"))
        await asyncio.to_thread(entered.wait, TIMEOUT)
        life.generation.cancel("a")
        life.generation.cancel("b")
        go_on.set()
        await life.finished(served)
        return gone, waiting, served

    gone, waiting, served = asyncio.run(ask())
    assert (gone, waiting) == ([], [])
    assert len(life.computing) == 1 + 6  # one step of what was cancelled, none of what waited
    assert served[-1].generated_tokens == plain_tokens(model, PROMPT, 6)


def test_what_waits_and_is_cancelled_is_not_computed_and_not_kept(model: Any, life: Life) -> None:
    async def ask() -> None:
        life.turns.pause_inference()
        life.submit("first", PROMPT)
        await asyncio.to_thread(eventually, lambda: life.generation._turn.waiting)
        for number in range(100):
            life.submit(f"{number}", PROMPT)
            life.generation.cancel(f"{number}")
        assert not life.generation._waiting
        life.generation.cancel("first")  # it waits for the turn
        life.turns.resume_inference()
        await life.finished(life.submit("last", PROMPT, max_new_tokens=2))

    asyncio.run(ask())
    assert len(life.computing) == 2


def test_the_settings_of_the_cache_bound_a_request(model: Any, tokenizer: Any) -> None:
    with started(model, tokenizer, kv_block_size=4, kv_blocks=16) as inference:
        assert (inference.batched, inference._max_tokens) == (False, 64)
    with started(model, tokenizer) as inference:
        assert inference._max_tokens == 256  # the model's positions


def test_it_stops_amid_a_request_and_takes_none_afterwards(model: Any) -> None:
    life = Life(model)
    life.turns.pause_inference()

    async def ask() -> None:
        life.submit("a", PROMPT)
        await asyncio.to_thread(eventually, lambda: life.generation._turn.waiting)
        assert await asyncio.to_thread(life.generation.stop, TIMEOUT)
        assert not life.generation.submit("b", PROMPT, GenerationConfig(), False, lambda _: None)

    asyncio.run(ask())
    assert life.computing == []
    assert life.generation.died_of() is None
    life.end()


# ---- behind the routes ----


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)[1]


@pytest.fixture
def asking() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def test_chats_streams_and_more_than_one_at_once(
    model: Any, tokenizer: Any, asking: Callable[..., Future[Any]]
) -> None:
    with (
        started(model, tokenizer) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        assert not inference.batched
        alone = text_of(http.post(CHAT, json=chat("one", max_tokens=8)))
        answers = [asking(http.post, CHAT, json=chat(content, max_tokens=8)) for content in ("two", "one", "three")]
        assert text_of(answers[1].result(TIMEOUT)) == alone
        assert all(text_of(answer.result(TIMEOUT)) for answer in answers)
        with http.stream("POST", CHAT, json=chat("one", max_tokens=8, stream=True)) as stream:
            assert "".join(pieces(events(stream.iter_lines()))) == alone
        too_long = http.post("/v1/completions", json={"prompt": " a" * 300, "max_tokens": 1})
        assert error_of(too_long)["code"] == "context_length_exceeded"
        assert (inference.restarts, inference.trouble()) == (0, None)


def test_a_step_that_hangs_is_left_behind(
    tokenizer: Any, asking: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_module, "_STOP_SECONDS", 0.1)
    model = tiny("gptj")
    hanging, release = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        hook.remove()
        hanging.set()
        assert release.wait(TIMEOUT)

    with (
        started(model, tokenizer, stall_seconds=1.0) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        expected = text_of(http.post(CHAT, json=chat(max_tokens=8)))
        hook = model.register_forward_pre_hook(hang)
        answer = asking(http.post, CHAT, json=chat(max_tokens=8))
        assert hanging.wait(TIMEOUT)
        assert (answer.result(TIMEOUT).status_code, inference.batched) == (503, False)
        eventually(lambda: inference.restarts == 1)
        assert text_of(http.post(CHAT, json=chat(max_tokens=8))) == expected
        release.set()
        eventually(lambda: not any("eager" in t.name for t in threading.enumerate() if t is not _thread_of(inference)))


def _thread_of(inference: Inference) -> threading.Thread:
    thread: threading.Thread = inference._batching._thread  # type: ignore[union-attr]
    return thread
