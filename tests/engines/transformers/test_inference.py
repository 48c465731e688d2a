"""Inference survives faults of continuous batching, and ends."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from served import NAME, limits_of, load, started
from web import CHAT, TIMEOUT, chat, client, error_of, events, eventually, serving, text_of

from poc_kernels.engines.transformers import inference as inference_module
from poc_kernels.engines.transformers import openai_app
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.scheduling import Turns, awake

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load(tiny_model_dir)


@pytest.fixture
def asking() -> Iterator[Callable[..., Future[Any]]]:
    """Calls a function in a thread of its own."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def streamed(http: httpx2.Client, first: threading.Event) -> list[dict[str, Any]]:
    with http.stream("POST", CHAT, json=chat(stream=True)) as stream:
        assert stream.status_code == 200
        told = []
        for event in events(stream.iter_lines()):
            told.append(event)
            if len(told) > 1:  # the first comes before any token
                first.set()
        return told


class Fault:
    """A model's forward that fails or hangs when it is told to."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._forward = model.forward
        self.error: Exception | None = None
        self.hang: threading.Event | None = None
        self.hanging = threading.Event()
        monkeypatch.setattr(model, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.hang is not None:
            hang, self.hang = self.hang, None
            self.hanging.set()
            assert hang.wait(TIMEOUT)
        return self._forward(*args, **kwargs)


def addresses(model: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]


def test_a_dead_thread_is_replaced(
    loaded: tuple[Any, Any], asking: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    attention, weights = model.config._attn_implementation, addresses(model)
    fault = Fault(model, monkeypatch)
    with started(*loaded) as inference, serving(openai_app.build(inference)) as url, client(url) as http:
        expected = text_of(http.post(CHAT, json=chat(max_tokens=8)))
        for restart in (1, 2):
            first = threading.Event()
            stream = asking(streamed, http, first)
            whole = asking(http.post, CHAT, json=chat())
            response = asking(http.post, "/v1/responses", json={"input": "hello", "stream": True})
            assert first.wait(TIMEOUT)
            eventually(lambda: inference._router.in_flight() == 3)
            fault.error = RuntimeError('a "fault"\n\nof the \\ device')
            told = stream.result(TIMEOUT)
            assert told[-1]["error"]["type"] == "server_error"
            assert "fault" not in told[-1]["error"]["message"]
            answer = whole.result(TIMEOUT)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert error_of(answer)["type"] == "server_error"
            last = response.result(TIMEOUT).text.strip().splitlines()[-1]
            assert json.loads(last.removeprefix("data: "))["type"] == "response.failed"
            eventually(lambda restart=restart: inference.restarts == restart)
            assert inference.trouble() is None
            assert text_of(http.post(CHAT, json=chat(max_tokens=8))) == expected
        assert addresses(model) == weights
    assert model.config._attn_implementation == attention


def test_a_stalled_thread_is_replaced(
    loaded: tuple[Any, Any], asking: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_module, "_STOP_SECONDS", 0.1)
    fault = Fault(loaded[0], monkeypatch)
    with (
        started(*loaded, stall_seconds=1.0) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        expected = text_of(http.post(CHAT, json=chat(max_tokens=8)))
        release = fault.hang = threading.Event()
        whole = asking(http.post, CHAT, json=chat())
        assert fault.hanging.wait(TIMEOUT)
        stuck = inference._batching._thread  # type: ignore[union-attr]
        answer = whole.result(TIMEOUT)
        assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
        eventually(lambda: inference.restarts == 1)
        # The device is free, though the old step still hangs.
        assert stuck.is_alive()
        assert text_of(http.post(CHAT, json=chat(max_tokens=8))) == expected
        release.set()
        stuck.join(TIMEOUT)
        assert not stuck.is_alive()
        assert text_of(http.post(CHAT, json=chat(max_tokens=8))) == expected
        assert inference.restarts == 1


def test_a_step_that_hangs_is_a_stall_though_inference_is_paused(
    loaded: tuple[Any, Any], asking: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_module, "_STOP_SECONDS", 0.1)
    fault = Fault(loaded[0], monkeypatch)
    with (
        started(*loaded, stall_seconds=3.0) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        release = fault.hang = threading.Event()
        whole = asking(http.post, CHAT, json=chat())
        assert fault.hanging.wait(TIMEOUT)
        inference._turns.pause_inference()
        got = asking(inference._turns.proof().__enter__)
        assert whole.result(TIMEOUT).status_code == 503
        got.result(TIMEOUT).end()  # the device is free for proofs
        eventually(lambda: inference.restarts == 1)
        release.set()
        inference._turns.resume_inference()
        assert text_of(http.post(CHAT, json=chat(max_tokens=2)))


def test_waiting_for_a_turn_is_no_stall(loaded: tuple[Any, Any], asking: Callable[..., Future[Any]]) -> None:
    with (
        started(*loaded, stall_seconds=0.2) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        turns = inference._turns
        with turns.proof(), turns.alone():
            answer = asking(http.post, CHAT, json=chat(max_tokens=2))
            eventually(lambda: inference._router.in_flight() == 1)
            threading.Event().wait(0.5)  # what is tested is that nothing happens in this time
            assert inference.trouble() is None
        text_of(answer.result(TIMEOUT))
        turns.pause_inference()
        answer = asking(http.post, CHAT, json=chat(max_tokens=2))
        eventually(lambda: inference._router.in_flight() == 1)
        threading.Event().wait(0.5)
        assert inference.trouble() is None
        turns.resume_inference()
        text_of(answer.result(TIMEOUT))
        assert inference.restarts == 0


def test_a_process_that_stood_still_is_no_stall(
    loaded: tuple[Any, Any], asking: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGSTOP, or on a machine that was paused: every thread goes on, much later, where it was."""
    fault, late = Fault(loaded[0], monkeypatch), [0.0]
    monkeypatch.setattr(awake, "time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    with (
        started(*loaded, stall_seconds=60.0) as inference,
        serving(openai_app.build(inference)) as url,
        client(url) as http,
    ):
        expected = text_of(http.post(CHAT, json=chat(max_tokens=8)))
        release = fault.hang = threading.Event()
        answer = asking(http.post, CHAT, json=chat(max_tokens=8))
        assert fault.hanging.wait(TIMEOUT)
        for _ in range(3):
            late[0] += 3600.0
            threading.Event().wait(3 * inference_module._POLL_SECONDS)  # the supervisor looks
            assert inference.trouble() is None
        release.set()
        assert text_of(answer.result(TIMEOUT)) == expected
        assert inference.restarts == 0


def test_a_long_forward_at_start_is_not_taken_for_standing_still(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial measures one to know how long it may take: a large model on a slow machine has to get its time."""
    fault, counted = Fault(loaded[0], monkeypatch), []
    inference = Inference(*loaded, NAME, Turns(), limits_of(), temperature=0)

    def look() -> None:
        if not counted:
            began = inference._clock.now()
            threading.Event().wait(1.5)
            counted.append(inference._clock.now() - began)

    monkeypatch.setattr(
        fault, "_forward", lambda *args, then=fault._forward, **kwargs: (look(), then(*args, **kwargs))[1]
    )
    inference.start()
    inference.stop(TIMEOUT)
    assert counted[0] > 1.2
    assert inference._clock._thread is not None
    assert not inference._clock._thread.is_alive()


def test_a_rebuild_that_fails_is_tried_again(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inference_module, "_FIRST_BACKOFF_SECONDS", 0.05)
    model, _ = loaded
    attention = model.config._attn_implementation
    build, may_build = type(model).init_continuous_batching, threading.Event()
    attempts = []

    def init(self: Any, **settings: Any) -> Any:
        attempts.append(1)
        if not may_build.is_set():
            settings["continuous_batching_config"].num_blocks = 10**9  # no memory holds that
        return build(self, **settings)

    with started(*loaded) as inference, serving(openai_app.build(inference)) as url, client(url) as http:
        fault = Fault(model, monkeypatch)
        good = inference._config.num_blocks
        monkeypatch.setattr(type(model), "init_continuous_batching", init)
        fault.error = RuntimeError("dead")
        with caplog.at_level(logging.CRITICAL, "poc_kernels"):
            assert http.post(CHAT, json=chat()).status_code == 503
            eventually(lambda: len(attempts) >= 2)
            told = r"generation is being rebuilt: RuntimeError(; then \w+)?"  # no text of an error
            assert re.fullmatch(told, str(inference.trouble()))
            for stream in (False, True):
                answer = http.post(CHAT, json=chat(stream=stream))
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert "rebuilt" in error_of(answer)["message"]
            assert inference._router.in_flight() == 0
            inference._config.num_blocks = good
            may_build.set()
            eventually(lambda: inference.restarts == 1)
        assert inference.trouble() is None
        text_of(http.post(CHAT, json=chat(max_tokens=2)))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("condition", ["idle", "busy", "paused", "paused, turns open", "computing proof", "dead"])
def test_stop_leaves_no_thread(
    loaded: tuple[Any, Any],
    asking: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    condition: str,
) -> None:
    turns = Turns()
    inference = Inference(*loaded, NAME, turns, limits_of(), temperature=0)
    assert inference.trouble() == "inference is not started"
    inference.start()
    threads = [inference._supervisor, inference._batching._thread]  # type: ignore[union-attr]
    proof = turns.proof()
    with serving(openai_app.build(inference)) as url, client(url) as http:
        answers = []
        if condition.startswith("paused"):
            turns.pause_inference()
        if condition == "computing proof":
            proof.__enter__()
        if condition == "dead":
            Fault(loaded[0], monkeypatch).error = RuntimeError("dead")
        if condition != "idle":
            answers = [asking(http.post, CHAT, json=chat()) for _ in range(3)]
            if condition != "dead":
                eventually(lambda: inference._router.in_flight() == 3)
        if condition != "paused, turns open":
            turns.close()
        inference.stop(TIMEOUT)
        inference.stop(TIMEOUT)
        proof.end()
        for answer in answers:
            assert answer.result(TIMEOUT).status_code == 503
        assert http.post(CHAT, json=chat()).status_code == 503
    assert not any(thread is not None and thread.is_alive() for thread in threads)
    assert inference._router.in_flight() == 0
    assert inference.trouble() == "inference is stopped"


def test_stop_during_a_rebuild(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    building, go_on = threading.Event(), threading.Event()
    build = type(model).init_continuous_batching
    inference = Inference(*loaded, NAME, Turns(), limits_of(), temperature=0)
    inference.start()

    def init(self: Any, **settings: Any) -> Any:
        building.set()
        assert go_on.wait(TIMEOUT)
        return build(self, **settings)

    monkeypatch.setattr(type(model), "init_continuous_batching", init)
    inference._batching._manager.background_thread_status.record_fatal_error(RuntimeError("x"))  # type: ignore[union-attr]
    assert building.wait(TIMEOUT)
    stopper = threading.Thread(target=inference.stop, args=(TIMEOUT,), daemon=True)
    stopper.start()
    eventually(inference._stop.is_set)
    go_on.set()
    stopper.join(TIMEOUT)
    assert not stopper.is_alive()
    assert inference._supervisor is not None
    assert not inference._supervisor.is_alive()
    assert "generation_loop" not in " ".join(thread.name for thread in threading.enumerate())


def test_stop_before_start_and_start_twice(loaded: tuple[Any, Any]) -> None:
    inference = Inference(*loaded, NAME, Turns(), limits_of())
    inference.stop(1)
    with started(*loaded) as running, pytest.raises(RuntimeError, match="once"):
        running.start()


def test_a_cache_that_cannot_be_made_is_said_at_start(loaded: tuple[Any, Any]) -> None:
    attention = loaded[0].config._attn_implementation
    inference = Inference(*loaded, NAME, Turns(), limits_of(kv_blocks=10**9))
    with pytest.raises(ValueError, match=r"continuous batching cannot be started with these settings: .*emory"):
        inference.start()
    assert loaded[0].config._attn_implementation == attention
    inference.stop(1)


@pytest.mark.parametrize(("temperature", "sampled"), [(0, False), (0.7, True)])
def test_temperature(loaded: tuple[Any, Any], temperature: float, sampled: bool) -> None:
    config = Inference(*loaded, NAME, Turns(), limits_of(), temperature=temperature).generation_config(5)
    assert bool(config.do_sample) is sampled
    assert config.max_new_tokens == 5
    assert not sampled or config.temperature == temperature
    assert loaded[0].generation_config.max_new_tokens != 5


def test_more_at_once_than_the_cache_holds(loaded: tuple[Any, Any]) -> None:
    limits = {"kv_block_size": 4, "kv_blocks": 16, "max_batch_tokens": 16}
    with started(*loaded, **limits) as inference, serving(openai_app.build(inference)) as url, client(url) as http:

        def ask(n: int) -> int:
            answer = http.post("/v1/completions", json={"prompt": " a" * (18 + n % 3), "max_tokens": 30 + n})
            return int(answer.json()["usage"]["completion_tokens"])

        with ThreadPoolExecutor(10) as pool:
            assert list(pool.map(ask, range(10))) == [30 + n for n in range(10)]
        assert inference.restarts == 0


def test_a_negative_temperature_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="-1"):
        Inference(*loaded, NAME, Turns(), limits_of(), temperature=-1)
