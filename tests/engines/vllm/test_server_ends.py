"""How vLLM servers with rounds end: at once where they are refused, and by a signal in every state."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from callback_receivers import Receiver
from nodes import POW, Alone, begin, checked, claim, posted, status
from vllm_server import SLOW, VllmProcess
from web import CHAT, DONE, TIMEOUT, Stream, chat, client, eventually, streamed, text_of

pytest_plugins = ["vllm_server"]

END_SECONDS = 60
TOKENS = 600  # far more than are computed until a round has drained
TOKEN, KEY = "of rounds", "of users"
TWO_RANKS = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--api-key", KEY)


def ours_in_tracebacks(process: VllmProcess) -> list[str]:
    """Lines of its log that are of tracebacks through this package; vLLM itself logs one of the end of its engine."""
    return [line for line in process.logged() if 'File "' in line and "poc_kernels/engines/" in line]


@pytest.fixture(scope="module")
def refused(model_dir: Path) -> Iterator[dict[str, VllmProcess]]:
    """Servers that must not start, all started at once."""
    processes = {
        "servers": VllmProcess(model_dir, "--api-server-count", "2"),
        "setting": VllmProcess(model_dir, settings={"validation_share": "much"}),
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "servers",
            "poc_kernels: proofs need one API server, which keeps the round: start vLLM with --api-server-coun",
        ),
        ("setting", "POC_KERNELS_VALIDATION_SHARE must be a number, got 'much'"),
    ],
)
def test_what_is_refused_is_refused_before_the_model_is_loaded(
    refused: dict[str, VllmProcess], name: str, sentence: str
) -> None:
    process = refused[name]
    assert process.popen.wait(END_SECONDS * 2) != 0
    log = "".join(process.logged())
    assert sentence in log
    assert "EngineCore" not in log


@pytest.fixture(scope="module")
def processes(model_dir: Path) -> Iterator[dict[str, VllmProcess]]:
    """Servers that are to be ended, all started at once."""
    processes = {
        "generating": VllmProcess(model_dir, "--shutdown-timeout", str(END_SECONDS), settings={"drain_seconds": 0.05}),
        "ranks": VllmProcess(
            model_dir,
            *TWO_RANKS,
            settings={"token": TOKEN, "drain_seconds": 0.1},
            environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        ),
    }
    yield processes
    for process in processes.values():
        process.kill()


@contextlib.contextmanager
def killed_at_the_end(process: VllmProcess) -> Iterator[None]:
    """Leave the cores to the tests that follow, also where this one fails."""
    try:
        yield
    finally:
        process.kill()


def test_sigterm_while_generating(processes: dict[str, VllmProcess]) -> None:
    process = processes["generating"]
    asked: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
    with killed_at_the_end(process), client(process.url()) as http:
        text = streamed(http, **asked)
        with Stream(http, **asked, **SLOW) as stream:
            begin(http)
            checked(http, 40)  # drained, then paused
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(http.post, f"{POW}/validate", json=claim(range(50_000)))
                eventually(lambda: status(http)["queued_nonces"] > 0)
                assert DONE not in stream.lines
                assert process.end(signal.SIGTERM, END_SECONDS) == 0
                assert waiting.result(TIMEOUT).status_code == 409
            assert stream.result() == text  # whoever was paused goes on while there is an engine
    assert ours_in_tracebacks(process) == []


def test_two_ranks_compute_together(processes: dict[str, VllmProcess], alone: Alone) -> None:
    process = processes["ranks"]
    with client(process.url()) as http:
        guarded = {f"{POW}/status": 401, "/v1/models": 401, "/health": 200, "/metrics": 200, "/version": 200}
        assert {path: http.get(path).status_code for path in guarded} == guarded
        http.headers["authorization"] = f"Bearer {KEY}"
        assert (http.get("/v1/models").status_code, http.get(f"{POW}/status").status_code) == (200, 401)
        asked = chat(max_tokens=30, ignore_eos=True)
        text = text_of(http.post(CHAT, json=asked))
        with client(process.url()) as rounds:
            rounds.headers["authorization"] = f"Bearer {TOKEN}"
            assert rounds.get("/v1/models").status_code == 401
            begin(rounds, "validate", use_random_projection=True)
            computed = posted(rounds, "/validate", claim(range(12)))["distances"]
            assert computed == pytest.approx(alone.distances(range(12), use_random_projection=True), abs=1e-5)
            with ThreadPoolExecutor(1) as pool:
                verdict = pool.submit(posted, rounds, "/validate", claim(reversed(range(12))))
                assert text_of(http.post(CHAT, json=asked)) == text
                assert verdict.result(TIMEOUT)["distances"] == computed[::-1]
            posted(rounds, "/phase/generate")
            found = checked(rounds, 40)
            pairs = zip(found["valid_nonces"], found["valid_distances"], strict=True)
            assert all(distance == computed[nonce] for nonce, distance in pairs if nonce < 12)
            posted(rounds, "/phase/validate")
            assert text_of(http.post(CHAT, json=asked)) == text


def test_sigterm_while_validating_answers_who_waits_and_posts_callbacks_last(
    processes: dict[str, VllmProcess], receiver: Receiver
) -> None:
    process, port = processes["ranks"], receiver.port
    with client(process.url()) as http:
        http.headers["authorization"] = f"Bearer {TOKEN}"
        receiver.stop()
        begin(http, callback_url=receiver.url)
        found = checked(http, 20)
        posted(http, "/phase/validate")
        eventually(lambda: status(http)["callbacks"]["failed_attempts"] > 0)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(http.post, f"{POW}/validate", json=claim(range(5_000))) for _ in range(3)]
            eventually(lambda: status(http)["queued_nonces"] > 10_000)
            returned = Receiver(port=port)
            try:
                assert process.end(signal.SIGTERM, END_SECONDS) == 0
                assert [answer.result(TIMEOUT).status_code for answer in waiting] == [409] * 3
            finally:
                returned.stop()
    told = [nonce for batch in returned.contents(path="/generated") for nonce in batch["nonces"]]
    assert set(found["valid_nonces"]) <= set(told)
    assert ours_in_tracebacks(process) == []
