"""How vLLM's API server makes the sessions of its workers, before it has users."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from web import TIMEOUT

pytest.importorskip("greenlet")

from vllm_stepping import CONFIGS, Client, WithoutLayers, Worker, install

from poc_kernels.engines.vllm import remote
from poc_kernels.engines.vllm import session as session_module
from poc_kernels.engines.vllm.link import EngineLost
from poc_kernels.engines.vllm.remote import RemoteDevice, RemoteProver, open_engine


def opened(workers: list[Worker]) -> tuple[RemoteProver, RemoteDevice]:
    """What proves in the workers."""
    client = Client(workers)
    client.start()
    try:
        opening = open_engine(client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=TIMEOUT)
        return asyncio.run_coroutine_threadsafe(opening, client.loop).result(TIMEOUT)
    finally:
        client.close()


def test_a_model_that_is_refused_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = install(monkeypatch)

    def refuse(worker: Worker, **options: Any) -> None:
        raise ValueError("proofs do not support alibi: serve another model")

    monkeypatch.setattr(session_module, "VllmEngine", refuse)
    with pytest.raises(ValueError, match="do not support alibi"):
        opened([Worker()])
    assert given == []


def test_an_engine_that_dies_before_there_are_users_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM, a call that was under way then gets no answer."""
    install(monkeypatch)
    go, worker = threading.Event(), Worker()
    client = Client([worker])

    def die(command: str, payload: dict[str, Any]) -> dict[str, Any]:
        client.dead = True
        go.wait(TIMEOUT)
        return {}

    monkeypatch.setattr(worker, "poc_kernels_call", die)
    client.start()
    try:
        opening = open_engine(client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=TIMEOUT)
        future = asyncio.run_coroutine_threadsafe(opening, client.loop)
        with pytest.raises(EngineLost, match="vLLM's engine died"):
            future.result(TIMEOUT / 2)
    finally:
        go.set()
        client.close()


def test_an_engine_that_hangs_before_there_are_users_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(remote, "_OPEN_SECONDS", 0.2)
    go, worker = threading.Event(), Worker()
    client = Client([worker])
    monkeypatch.setattr(worker, "poc_kernels_call", lambda command, payload: go.wait(TIMEOUT))
    client.start()
    try:
        opening = open_engine(client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=TIMEOUT)
        future = asyncio.run_coroutine_threadsafe(opening, client.loop)
        with pytest.raises(TimeoutError, match=r"vLLM's engine did not answer within 0\.2 s"):
            future.result(TIMEOUT / 2)
    finally:
        go.set()
        client.close()


def test_every_worker_is_tried_with_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    given = install(monkeypatch)
    workers = [Worker(2, 0), Worker(2, 1)]
    prover, device = opened(workers)
    first, engine, second, other = given
    assert first == second
    assert [engine, other] == [(worker.engine, True) for worker in workers]
    texts, served = first
    assert [[-token for token in text[-8:]] for text in texts] == served == [[-token for token in range(8)]] * 5
    assert max(map(len, texts)) == 48  # longer than the window of the stand-in's model
    assert (prover.model.vocab_size, device.ranks) == (101, 2)


def test_no_worker_is_tried_with_transforms_that_one_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them make the same forwards: one that made more would wait for the others."""
    given = install(monkeypatch)
    workers = [Worker(2, 0), Worker(2, 1)]
    workers[1].engine = WithoutLayers()
    opened(workers)
    assert [given[1], given[3]] == [(worker.engine, False) for worker in workers]


def test_a_model_whose_trial_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, differs="proofs would not be of the model that is served")
    with pytest.raises(ValueError, match="not be of the model that is served"):
        opened([Worker()])


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_model_without_layers_to_transform_serves_distances_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ranks: int, rank: int
) -> None:
    """Whichever worker lacks them."""
    install(monkeypatch)
    workers = [Worker(rank=each) for each in range(ranks)]
    workers[rank].engine = WithoutLayers()
    prover, _ = opened(workers)
    prover.check(CONFIGS["distances"])
    for proof in ("vectors", "fingerprint"):
        with pytest.raises(ValueError, match="model must call its layers in order"):
            prover.check(CONFIGS[proof])
    assert [record.getMessage() for record in caplog.records] == [
        "rounds of distances alone are served: model must call its layers in order"
    ]
