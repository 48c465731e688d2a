"""The prover and the device of vLLM's API server, before an engine of stand-ins whose calls may fail."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from web import TIMEOUT, eventually

pytest.importorskip("greenlet")

from vllm_stepping import (
    CONFIG,
    CONFIGS,
    ENDLESS,
    Client,
    Request,
    Worker,
    distances,
    install,
    outcomes,
    rows,
    text_of,
)

from poc_kernels.engines.vllm import remote
from poc_kernels.engines.vllm import session as session_module
from poc_kernels.engines.vllm.link import EngineError, EngineLost, Link
from poc_kernels.engines.vllm.remote import RemoteDevice, RemoteProver, open_engine
from poc_kernels.protocol import PoCConfig, PoCManager, PoCState, ProofBatch, RoundEndedError
from poc_kernels.protocol.limits import Bounds
from poc_kernels.scheduling import TurnsClosed
from poc_kernels.service.round_service import RoundService
from poc_kernels.service.settings import ServiceSettings


class Server:
    """A client, its workers, and the prover and the device made on them."""

    def __init__(self, ranks: int, answer_seconds: float) -> None:
        self.workers = [Worker(world_size=ranks, rank=rank) for rank in range(ranks)]
        self.client = Client(self.workers)
        self.client.start()
        opening = open_engine(
            self.client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=answer_seconds
        )
        self.prover: RemoteProver
        self.device: RemoteDevice
        self.prover, self.device = asyncio.run_coroutine_threadsafe(opening, self.client.loop).result(TIMEOUT)

    def runs(self) -> list[dict[str, Any]]:
        return [payload for command, payload in self.client.calls if command == "run"]

    def jobs(self) -> list[list[str]]:
        """What each worker still knows."""
        told = self.device.link.tell("run", {"round": self.runs()[-1]["round"], "jobs": self.runs()[-1]["jobs"]})
        return [answer["jobs"] for answer in told]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Makes servers."""
    install(monkeypatch)
    with contextlib.ExitStack() as stack:

        def make(ranks: int = 1, answer_seconds: float = TIMEOUT) -> Server:
            server = Server(ranks, answer_seconds)
            stack.callback(server.client.close)
            return server

        yield make


# ---- proofs ----


@pytest.mark.parametrize("ranks", [1, 2])
def test_distances_are_those_of_one_process(serve: Callable[..., Server], ranks: int) -> None:
    server = serve(ranks)
    for first in (0, 4):
        outcomes = server.prover.prove(CONFIG, rows(first))
        assert outcomes.values == distances(rows(first))
        assert set(outcomes.part_seconds) == {"inputs", "projection", "forward", "distance"}
    assert server.prover.prove(CONFIG, rows(3, 1)).values == distances(rows(3, 1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rounds_of_every_form_follow_each_other(serve: Callable[..., Server], ranks: int) -> None:
    server = serve(ranks)
    for proof in ("vectors", "fingerprint", "distances", "fingerprint"):
        config = CONFIGS[proof]
        server.prover.check(config)
        found = server.prover.prove(config, rows(0), then=[rows(4)])
        assert found.values == outcomes(rows(0), config)
        assert set(found.part_seconds) == set(server.prover.forms[proof].parts)
        assert server.prover.prove(config, rows(3, 1)).values == outcomes(rows(3, 1), config)


def test_what_follows_is_begun_and_what_is_not_asked_for_is_cancelled(serve: Callable[..., Server]) -> None:
    server = serve()
    batches = [rows(4 * number) for number in range(6)]
    assert server.prover.prove(CONFIG, batches[0], then=batches[1:3]).values == distances(batches[0])
    assert len(server.runs()[0]["rows"]) == 3
    # What was put ahead is not put again.
    assert server.prover.prove(CONFIG, batches[1], then=batches[2:4]).values == distances(batches[1])
    put = [job for run in server.runs() for job in run["rows"]]
    assert 3 <= len(put) == len({*put}) <= 4
    # Another is asked for than was expected.
    assert server.prover.prove(CONFIG, batches[5]).values == distances(batches[5])
    assert len(server.runs()[-1]["jobs"]) <= 1
    assert [len(jobs) for jobs in server.jobs()] == [1]


def test_what_follows_is_computed_while_an_outcome_is_handled(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for it meanwhile, and it is asked for later without a call that computes."""
    monkeypatch.setattr(remote, "_IDLE_SECONDS", TIMEOUT)  # however slow the machine is, one call is enough
    server = serve()
    batches, engine = [rows(4 * number) for number in range(4)], server.workers[0].engine
    began = threading.Event()
    engine.before_layer = began.set
    assert server.prover.prove(CONFIG, batches[0], then=batches[1:2]).values == distances(batches[0])
    for number in (1, 2):
        began.clear()
        found = server.prover.prove(CONFIG, batches[number], then=[batches[number + 1]])
        assert found.values == distances(batches[number])
        assert began.wait(TIMEOUT)  # of the one after
    layers = engine.layers
    eventually(lambda: len(engine.shapes) == 4 * layers)
    assert server.prover.prove(CONFIG, batches[3]).values == distances(batches[3])
    assert len(engine.shapes) == 4 * layers


def test_an_outcome_is_given_by_an_engine_that_has_died_since(serve: Callable[..., Server]) -> None:
    server = serve()

    def die(command: str, payload: Any, answers: Any) -> Any:
        if command == "run" and len(answers[0]["outcomes"]) == 1:
            server.client.dead = True
        return answers

    server.client.answer = die
    server.workers[0].engine.before_layer = lambda: time.sleep(0.03)  # the other one needs another call
    assert server.prover.prove(CONFIG, rows(0), then=[rows(4)]).values == distances(rows(0))
    with pytest.raises(EngineLost, match="vLLM's engine died"):
        server.prover.prove(CONFIG, rows(4))


def test_an_answer_that_comes_after_a_cancel_is_nobodys(serve: Callable[..., Server]) -> None:
    server = serve()
    server.workers[0].engine.before_layer = lambda: time.sleep(0.03)
    server.prover.prove(CONFIG, rows(0), then=[rows(4)])
    server.prover.cancel()
    eventually(lambda: server.jobs() == [[]])
    assert server.prover.prove(CONFIG, rows(4)).values == distances(rows(4))


def test_rows_that_follow_may_be_those_of_now(serve: Callable[..., Server]) -> None:
    server = serve()
    assert server.prover.prove(CONFIG, rows(0), then=[rows(0), rows(0)]).values == distances(rows(0))
    assert server.prover.prove(CONFIG, rows(0)).values == distances(rows(0))


def test_rounds_follow_each_other(serve: Callable[..., Server]) -> None:
    server = serve()
    for block in ("block", "another", "block"):
        config = PoCConfig(block, 1, "key", r_target=1.4, batch_size=4, seq_len=8, callback_url="http://secret@chain")
        values = server.prover.prove(config, rows(0), then=[rows(4)]).values
        assert values == distances(rows(0), config)
    assert [command for command, _ in server.client.calls].count("begin") == 3
    assert "secret" not in str(server.client.calls)


def test_a_pause_that_raises_ends_the_work(serve: Callable[..., Server]) -> None:
    server = serve()

    def end() -> None:
        raise RoundEndedError("over")

    server.workers[0].engine.before_layer = lambda: time.sleep(0.01)
    with pytest.raises(RoundEndedError, match="over"):
        server.prover.prove(CONFIG, rows(0), end, then=[rows(4)])
    eventually(lambda: server.jobs() == [[]])
    assert server.prover.prove(CONFIG, rows(0)).values == distances(rows(0))


def test_a_round_that_does_not_fit_is_refused_without_a_call(serve: Callable[..., Server]) -> None:
    server = serve()
    server.client.calls.clear()
    with pytest.raises(ValueError, match="seq_len must be at most the 64 positions of the model, got 65"):
        server.prover.check(PoCConfig("block", 1, "key", r_target=1.4, seq_len=65))
    assert server.client.calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proof": "dice"}, "proof must be one of distances, vectors, fingerprint, got 'dice'"),
        (
            {"proof": "vectors", "k_dim": 25, "seq_len": 8},
            "k_dim must be at most the hidden size 24 of the model, got 25",
        ),
        ({"proof": "vectors", "seq_len": 65}, "seq_len must be at most the 64 positions of the model, got 65"),
        ({"proof": "fingerprint", "seq_len": 15}, "seq_len must be at least 16 in a round of fingerprints, got 15"),
    ],
)
def test_rounds_of_any_form_are_checked_without_a_call(
    serve: Callable[..., Server], changes: dict[str, Any], message: str
) -> None:
    server = serve()
    server.client.calls.clear()
    with pytest.raises(ValueError, match=message):
        server.prover.check(PoCConfig("block", 1, "key", **changes))
    assert server.client.calls == []


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ("distances", "batch_size must be at most 3 with this vocabulary, got 4"),
        ("fingerprint", "batch_size must be at most 2 in a round of fingerprints with 5 x 24 signs per row, got 4"),
    ],
)
def test_rows_that_take_too_much_memory_are_refused_here_and_in_the_workers(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, proof: str, message: str
) -> None:
    for module in (remote, session_module):
        monkeypatch.setattr(module, "SERVER_BOUNDS", Bounds(logits=3 * 101, signs=2 * 5 * 24))
    server = serve()
    with pytest.raises(ValueError, match=message):
        server.prover.check(CONFIGS[proof])
    with pytest.raises(EngineError, match=message):
        server.prover.prove(CONFIGS[proof], rows(0))


def test_a_round_that_one_worker_refuses_is_computed_by_none(serve: Callable[..., Server]) -> None:
    server = serve(2)

    def refuse() -> bool:
        raise MemoryError("no room for this shape")

    server.workers[1].engine.refresh = refuse  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="worker 1 cannot compute this round: MemoryError: no room"):
        server.prover.prove(CONFIG, rows(0))
    assert all(worker.engine.shapes == [] for worker in server.workers)
    del server.workers[1].engine.refresh
    assert server.prover.prove(CONFIG, rows(0)).values == distances(rows(0))


def test_weights_that_were_replaced_are_counted(serve: Callable[..., Server]) -> None:
    server = serve()
    server.workers[0].engine.replaced = True
    server.prover.prove(CONFIG, rows(0))
    assert server.prover.refreshed == 1


def test_a_round_that_is_begun_anew_has_the_weights_of_then(serve: Callable[..., Server]) -> None:
    """Though its configuration is that of the round before: to a manager, a round that was stopped is another one."""
    server = serve()
    manager = PoCManager(server.prover)
    config = dataclasses.replace(CONFIG, node_id=0, node_count=1)
    for replaced in (False, True):
        server.workers[0].engine.replaced = replaced
        manager.start_round(config)
        for _ in range(3):
            manager.run_batch()
        assert server.prover.refreshed == int(replaced)
        manager.stop_round()
    manager.validate(ProofBatch("key", "block", 1, [0], [1.0]))  # belongs to the round that was stopped
    assert [command for command, _ in server.client.calls].count("begin") == 2


# ---- faults ----


def test_an_error_of_all_ranks_is_the_proofs_alone(serve: Callable[..., Server]) -> None:
    server = serve(2)

    def failing(worker: Worker) -> Callable[[], None]:
        def fail() -> None:
            worker.engine.before_layer = lambda: None
            raise FloatingPointError("of every rank")

        return fail

    for worker in server.workers:
        worker.engine.before_layer = failing(worker)
    with pytest.raises(EngineError, match="FloatingPointError: of every rank"):
        server.prover.prove(CONFIG, rows(0), then=[rows(4)])
    for first in (0, 4):
        assert server.prover.prove(CONFIG, rows(first)).values == distances(rows(first))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_outcome_of_one_rank_that_is_an_error_is_the_proofs(serve: Callable[..., Server], rank: int) -> None:
    """What the others computed beside it does not count."""
    server = serve(2)

    def fail() -> None:
        server.workers[rank].engine.before_layer = lambda: None
        raise FloatingPointError("of one rank")

    server.workers[rank].engine.before_layer = fail
    with pytest.raises(EngineError, match="FloatingPointError: of one rank"):
        server.prover.prove(CONFIG, rows(0), then=[rows(4)])
    for first in (0, 4):
        assert server.prover.prove(CONFIG, rows(first)).values == distances(rows(first))


def test_answers_that_are_lost_lose_no_outcome(serve: Callable[..., Server]) -> None:
    server = serve()
    answers_given = itertools.count()

    def lose(command: str, payload: Any, answers: Any) -> Any:
        if command == "run" and next(answers_given) % 2 == 0:
            raise ConnectionError("the answer was lost")
        return answers

    server.client.answer = lose
    for number in range(5):
        following = [rows(4 * (number + ahead)) for ahead in (1, 2)]
        assert server.prover.prove(CONFIG, rows(4 * number), then=following).values == distances(rows(4 * number))
    # Nothing is computed twice, however often it is asked for.
    assert len(server.workers[0].engine.shapes) <= 7 * server.workers[0].engine.layers


def test_calls_that_fail_again_and_again_fail_the_batch(serve: Callable[..., Server]) -> None:
    server = serve()

    def lose(command: str, payload: Any, answers: Any) -> Any:
        raise ConnectionError("the answer was lost")

    server.client.answer = lose
    with pytest.raises(EngineError, match="ConnectionError: the answer was lost"):
        server.prover.prove(CONFIG, rows(0))
    server.client.answer = lambda command, payload, answers: answers
    assert server.prover.prove(CONFIG, rows(0)).values == distances(rows(0))


def test_a_worker_that_lost_its_round_begins_it_again(serve: Callable[..., Server]) -> None:
    server = serve()
    server.prover.prove(CONFIG, rows(0), then=[rows(4)])
    opening = open_engine(server.client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=TIMEOUT)
    asyncio.run_coroutine_threadsafe(opening, server.client.loop).result(TIMEOUT)
    assert server.prover.prove(CONFIG, rows(8)).values == distances(rows(8))
    assert [command for command, _ in server.client.calls].count("begin") == 2


def test_an_engine_that_does_not_answer_fails_the_batch_in_time(serve: Callable[..., Server]) -> None:
    server = serve(answer_seconds=0.3)
    go = threading.Event()
    server.workers[0].engine.before_layer = lambda: go.wait(TIMEOUT)
    pauses: list[int] = []
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.3 s"):
        server.prover.prove(CONFIG, rows(0), lambda: pauses.append(1))
    assert pauses  # whoever stops the round need not wait for it
    go.set()
    server.device.link._answer_seconds = TIMEOUT
    assert server.prover.prove(CONFIG, rows(0)).values == distances(rows(0))


@pytest.mark.parametrize(
    ("how", "why"),
    [("dead", "vLLM's engine died"), ("stopping", "vLLM shuts down"), ("loop", "event loop has ended")],
)
def test_an_engine_that_is_gone_ends_every_call(serve: Callable[..., Server], how: str, why: str) -> None:
    server = serve()
    reached = threading.Event()
    server.workers[0].engine.before_layer = lambda: (reached.set(), time.sleep(0.02))

    def lose() -> None:
        assert reached.wait(TIMEOUT)
        if how == "loop":
            server.client.close_loop()
        else:
            setattr(server.client, how, True)

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(EngineLost, match=why):
        collections.deque((server.prover.prove(CONFIG, rows(0), then=[rows(4)]) for _ in itertools.count()), 0)
    thread.join(TIMEOUT)
    for call in (server.device.take, server.device.pause, lambda: server.prover.prove(CONFIG, rows(0))):
        with pytest.raises(EngineLost, match=why):
            call()
    with pytest.raises(EngineLost, match=why):
        server.device.pause_users()
    server.device.resume_users()
    server.prover.cancel()
    assert server.device.status()["lost"] == server.device.link.lost


def test_calls_that_were_under_way_when_the_engine_died_are_answered(serve: Callable[..., Server]) -> None:
    """By vLLM they are not."""
    server = serve()
    go, reached = threading.Event(), threading.Event()
    server.workers[0].engine.before_layer = lambda: (reached.set(), go.wait(TIMEOUT))
    threading.Thread(target=lambda: (reached.wait(TIMEOUT), setattr(server.client, "dead", True))).start()
    try:
        with pytest.raises(EngineLost, match="vLLM's engine died"):
            server.prover.prove(CONFIG, rows(0))
    finally:
        go.set()


def test_a_loop_that_has_ended_takes_no_call() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    link = Link(Client([Worker()]), loop, TIMEOUT)

    async def method() -> None:
        raise AssertionError("it was called")

    link.drop(method)
    for _ in range(2):
        with pytest.raises(EngineLost, match="the server's event loop has ended"):
            link.call(method)
    link.drop(method)


def test_one_who_waits_for_the_engine_is_let_go(serve: Callable[..., Server]) -> None:
    server = serve()
    go, reached = threading.Event(), threading.Event()
    server.workers[0].engine.before_layer = lambda: (reached.set(), go.wait(TIMEOUT))
    threading.Thread(target=lambda: (reached.wait(TIMEOUT), server.device.cancel())).start()
    try:
        with pytest.raises(TurnsClosed, match="cancelled"):
            server.prover.prove(CONFIG, rows(0))
        with pytest.raises(TurnsClosed, match="cancelled"):
            server.device.take()
    finally:
        go.set()


# ---- users ----


def test_texts_and_distances_are_those_alone(serve: Callable[..., Server]) -> None:
    server = serve()
    requests: list[Request] = []
    values: list[float] = []
    for number in range(12):
        requests.append(server.client.request(number, 20 + number))
        values += server.prover.prove(CONFIG, rows(4 * number), then=[rows(4 * number + 4)]).values
    for request in requests:
        assert request.done.wait(TIMEOUT)
        assert request.tokens == text_of(request.tokens[0], request.count)
    assert values == distances(rows(0, 48), dataclasses.replace(CONFIG, batch_size=48))


def test_slices_run_between_steps_while_users_are_served(serve: Callable[..., Server]) -> None:
    server = serve()
    server.workers[0].in_step = lambda: time.sleep(0.002)
    request = server.client.request(1, ENDLESS)
    eventually(lambda: len(request.tokens) > 2)
    server.prover.prove(CONFIG, rows(0))
    status = server.device.status()
    assert status["slices_between_steps"] > 0
    assert status["mean_step_seconds"] >= 0.002
    request.count = 1
    assert request.done.wait(TIMEOUT)


def test_users_are_paused_and_resumed(serve: Callable[..., Server]) -> None:
    server = serve()
    server.workers[0].in_step = lambda: time.sleep(0.001)
    request = server.client.request(1, ENDLESS)
    assert not server.device.drain_users(0.01)
    server.device.pause_users()
    tokens = len(request.tokens)
    server.prover.prove(CONFIG, rows(0))
    assert len(request.tokens) == tokens
    assert server.runs()[-1]["alone"]
    server.device.resume_users()
    server.device.resume_users()
    assert server.client.pauses == ["pause", "resume"]
    request.count = tokens + 20
    assert request.done.wait(TIMEOUT)
    assert request.tokens == text_of(1, len(request.tokens) - 1)
    assert server.device.drain_users(TIMEOUT)


def test_a_pause_whose_answer_is_lost_is_undone(serve: Callable[..., Server]) -> None:
    server = serve(answer_seconds=0.2)
    go = threading.Event()
    server.client.core.inbox.put(lambda: go.wait(TIMEOUT))
    with pytest.raises(TimeoutError):
        server.device.pause_users()
    go.set()
    eventually(lambda: server.client.pauses == ["pause", "resume"])
    eventually(lambda: not server.client.core.paused)


def test_users_are_resumed_even_by_a_device_that_was_cancelled(serve: Callable[..., Server]) -> None:
    server = serve()
    server.device.pause_users()
    server.device.cancel()
    server.client.core.inbox.put(lambda: time.sleep(0.05))
    server.device.resume_users()
    assert not server.client.core.paused  # by now: vLLM may end its engine next


def test_a_loop_that_waits_for_the_device_is_not_waited_for(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_RESUME_SECONDS", 0.01)
    server = serve()
    server.device.pause_users()
    server.device.cancel()
    resumed = threading.Event()
    server.client.loop.call_soon_threadsafe(resumed.wait, TIMEOUT)
    server.device.resume_users()
    resumed.set()
    eventually(lambda: not server.client.core.paused)


def test_a_slice_is_what_the_workers_computed_since_the_last(serve: Callable[..., Server]) -> None:
    server = serve()
    server.device.take()
    slices: list[float] = []
    server.prover.prove(CONFIG, rows(0), lambda: slices.append(server.device.pause().slice))
    slices.append(server.device.give_back())
    assert sum(slices) == pytest.approx(server.device.counters["slice_seconds"])
    assert server.device.give_back() == 0.0


# ---- as a service ----


def test_rounds_of_a_service(serve: Callable[..., Server]) -> None:
    """Generated with users paused, validated while they are served, and every nonce has its distance."""
    server = serve()
    service = RoundService(server.prover, server.device, ServiceSettings(drain_seconds=0.05))
    service.start()
    try:
        values = {"block_hash": "block", "block_height": 1, "public_key": "key", "r_target": 1.4, "batch_size": 4}
        values.update(seq_len=8, use_random_projection=True, node_id=0, node_count=1)
        server.workers[0].in_step = lambda: time.sleep(0.002)
        request = server.client.request(5, 300)
        service.begin(values, PoCState.GENERATING)
        eventually(lambda: service.manager.status()["total_checked"] >= 40)
        assert server.client.core.paused
        tokens = len(request.tokens)
        status = service.manager.status()
        found = dict(zip(status["valid_nonces"], status["valid_distances"], strict=True))
        assert len(request.tokens) == tokens
        alone = distances(rows(0, 40), dataclasses.replace(CONFIG, batch_size=40))
        assert {nonce: value for nonce, value in found.items() if nonce < 40} == {
            nonce: value for nonce, value in enumerate(alone) if value < 1.4
        }
        service.manager.set_phase(PoCState.VALIDATING)
        eventually(lambda: not server.client.core.paused)
        proof = ProofBatch("key", "block", 1, [*range(10)], alone[:10])
        verdict = service.enqueue(proof, "someone").future.result(TIMEOUT)
        assert verdict.dist == alone[:10]
        assert request.done.wait(TIMEOUT)
        assert request.tokens == text_of(5, 300)
        eventually(lambda: len(service.troubles()) == 0)
    finally:
        service.close(time.monotonic() + 5)


@pytest.mark.parametrize("state", [PoCState.IDLE, PoCState.GENERATING, PoCState.VALIDATING])
@pytest.mark.parametrize("how", ["dead", "stopping"])
def test_a_service_whose_engine_goes_first_ends(serve: Callable[..., Server], state: PoCState, how: str) -> None:
    server = serve()
    service = RoundService(server.prover, server.device, ServiceSettings(drain_seconds=0.0))
    service.start()
    values = {"block_hash": "block", "block_height": 1, "public_key": "key", "r_target": 1.4, "batch_size": 4}
    service.begin({**values, "seq_len": 8, "node_id": 0, "node_count": 1}, state)
    futures = []
    if state == PoCState.VALIDATING:
        server.workers[0].engine.before_layer = lambda: time.sleep(0.005)
        proof = ProofBatch("key", "block", 1, [*range(200)], [1.0] * 200)
        futures.append(service.enqueue(proof, "someone").future)
    elif state == PoCState.GENERATING:
        eventually(lambda: service.manager.status()["total_checked"] > 0)
    setattr(server.client, how, True)
    if state != PoCState.IDLE:
        eventually(lambda: "the proof thread is not running" in service.troubles())
    began = time.monotonic()
    service.close(began + 5)
    assert time.monotonic() - began < TIMEOUT
    for future in futures:
        with pytest.raises(RoundEndedError):
            future.result(TIMEOUT)
