"""The proof worker on an engine of a few lines: turns, states, and jobs."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from blocking import blocked
from small_engine import SmallEngine
from web import TIMEOUT, eventually
from workers import BATCH, PATIENT, Parts, alone, config, proof, workers

from poc_kernels.protocol import DistanceProver, IllegalTransitionError, PoCManager, PoCState, RoundEndedError, Row
from poc_kernels.scheduling import Turns
from poc_kernels.service import worker as worker_module
from poc_kernels.service.line import MIN_COST
from poc_kernels.service.queue import JobState, QueueFullError

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parts]]:
    """Makes workers."""
    with workers(monkeypatch) as make:
        yield make


def test_a_round_holds_inference_and_posts_what_is_valid(make: Callable[..., Parts]) -> None:
    parts = make()
    assert not parts.turns.inference_paused
    parts.begin()
    parts.checked(40)
    assert parts.turns.inference_paused
    parts.stop()
    eventually(lambda: not parts.turns.inference_paused)
    result = parts.manager.status()
    assert parts.callbacks.nonces() == result["valid_nonces"]
    assert 0 < result["total_valid"] < result["total_checked"]
    assert {(kind, url) for kind, url, _ in parts.callbacks.batches} == {("generated", "http://chain")}
    assert all(batch["nonces"] for _, _, batch in parts.callbacks.batches)


def test_a_round_without_callbacks_posts_nothing(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(callback_url=None)
    parts.checked(40)
    assert parts.callbacks.batches == []


def test_inference_is_let_go_in_every_other_state(make: Callable[..., Parts]) -> None:
    parts = make()
    for phase in (PoCState.GENERATING, PoCState.VALIDATING) * 2:
        if parts.manager.state == PoCState.IDLE:
            parts.begin(phase)
        else:
            parts.manager.set_phase(phase)
        eventually(lambda phase=phase: parts.turns.inference_paused == (phase == PoCState.GENERATING))


def test_requests_are_drained_before_the_first_nonce(make: Callable[..., Parts]) -> None:
    drained, asked = threading.Event(), threading.Event()

    def drain(seconds: float) -> bool:
        asked.set()
        return drained.wait(seconds)

    parts = make(drain=drain, drain_seconds=TIMEOUT)
    parts.begin()
    assert asked.wait(TIMEOUT)
    assert parts.engine.shapes == []
    assert not parts.turns.inference_paused
    drained.set()
    parts.checked(BATCH)
    assert parts.turns.inference_paused


def test_draining_has_a_deadline(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = 0.0, []

    def drain(seconds: float) -> bool:
        nonlocal now
        given.append(seconds)
        now += seconds
        return False

    # A clock that draining alone advances.
    monkeypatch.setattr(worker_module, "time", types.SimpleNamespace(monotonic=lambda: now))
    parts = make(drain=drain, drain_seconds=0.25)
    parts.begin()
    parts.checked(BATCH)
    assert given == pytest.approx([0.1, 0.1, 0.05])
    assert parts.turns.inference_paused


@pytest.mark.parametrize("how", ["stop", "validate"])
def test_a_phase_that_ends_while_it_drains_computes_nothing(make: Callable[..., Parts], how: str) -> None:
    asked = threading.Event()

    def drain(seconds: float) -> bool:
        asked.set()
        return threading.Event().wait(min(seconds, 0.01))

    parts = make(drain=drain, drain_seconds=TIMEOUT)
    parts.begin()
    assert asked.wait(TIMEOUT)
    if how == "stop":
        parts.stop()
    else:
        parts.manager.set_phase(PoCState.VALIDATING)
        assert parts.submit(proof(1)).result(TIMEOUT).nonces == [0]
    eventually(lambda: parts.worker._idle)
    assert not parts.turns.inference_paused
    assert parts.manager.status()["total_checked"] == 0


# ---- validating ----


def test_verdicts(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    honest, forged = parts.submit(proof(10)), parts.submit(proof(30, 0.5))
    assert honest.result(TIMEOUT).dist == alone(10)
    assert forged.result(TIMEOUT).dist == alone(30)
    assert forged.result().fraud_detected
    eventually(lambda: parts.worker.queue.nonces == 0)
    eventually(lambda: len(parts.callbacks.batches) == 1)
    kind, _, verdict = parts.callbacks.batches[0]
    assert (kind, verdict["received_dist"], verdict["fraud_detected"]) == ("validated", [0.5] * 30, True)
    assert b"poc_frauds_total 1.0" in parts.metrics.text()


def test_proofs_wait_for_steps_that_owe_nothing(make: Callable[..., Parts]) -> None:
    parts = make(turns=Turns(PATIENT))
    order: list[str] = []
    inference = parts.turns.inference()

    def step() -> None:
        with inference:
            eventually(lambda: parts.device.waiting)
            order.append("inference")

    with ThreadPoolExecutor(1) as pool:

        def before_forward() -> None:
            order.append("proof")
            if len(order) in (1, 3):
                pool.submit(step)
                eventually(lambda: inference.computing)

        parts.engine.before_forward = before_forward
        parts.begin(PoCState.VALIDATING)
        parts.submit(proof(4 * BATCH)).result(TIMEOUT)
    assert order == ["proof", "inference", "proof", "inference", "proof", "proof"]


def test_no_proof_runs_while_inference_has_the_device(make: Callable[..., Parts]) -> None:
    parts = make(turns=Turns(PATIENT))
    parts.begin(PoCState.VALIDATING)
    with parts.turns.inference():
        result = parts.submit(proof(1))
        eventually(lambda: parts.device.waiting)
        assert parts.engine.shapes == []
        assert not result.done()
    assert result.result(TIMEOUT).nonces == [0]


def test_validation_goes_on_while_generating(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin()
    parts.checked(BATCH)
    before = parts.manager.status()["total_checked"]
    assert parts.submit(proof(40)).result(TIMEOUT).dist == alone(40)
    assert parts.manager.status()["total_checked"] > before


def forwards_of_both(make: Callable[..., Parts], rows: int, count: int) -> list[int]:
    """Rows of the forwards of a round and of a request, from the first of the request to the last."""
    parts = make()
    parts.begin(seq_len=64)
    job = parts.worker.enqueue(proof(count * rows), "one", config=config(batch_size=rows, seq_len=64))
    assert job.future.result(TIMEOUT).dist == alone(count * rows, batch_size=rows, seq_len=64)
    shapes = [shape[0] for shape in parts.engine.shapes]
    of_both = shapes[shapes.index(rows) :]
    return of_both[: len(of_both) - of_both[::-1].index(rows)]


def test_a_round_keeps_half_of_the_positions_beside_larger_forwards(make: Callable[..., Parts]) -> None:
    assert forwards_of_both(make, 8 * BATCH, 4) == [*[8 * BATCH, *[BATCH] * 8] * 3, 8 * BATCH]


def test_a_round_keeps_half_of_the_positions_where_these_are_no_multiple_of_its_own(
    make: Callable[..., Parts],
) -> None:
    assert forwards_of_both(make, BATCH + 2, 4) == [6, 4, 6, 4, 4, 6, 4, 6]


def test_small_forwards_get_one_between_two_batches_of_a_round(make: Callable[..., Parts]) -> None:
    """More would have its positions, but not its time: a forward has a cost of its own."""
    assert forwards_of_both(make, 1, 4) == [1, BATCH] * 3 + [1]


def test_the_queue_is_bounded_to_the_nonce(make: Callable[..., Parts]) -> None:
    parts = make(max_queued_nonces=20)
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        first = parts.submit(proof(15))
        assert entered.wait(TIMEOUT)
        with pytest.raises(QueueFullError, match="at most 20 nonces can wait to be validated, 15 do, and 6 came"):
            parts.submit(proof(6), "another")
        second = parts.submit(proof(5), "another")
        with pytest.raises(QueueFullError):
            parts.submit(proof(1), "a third")
        assert parts.submit(proof(0), "a third").result(0).dist == []  # takes no place
        assert parts.worker.queue.nonces == 20
    assert [len(future.result(TIMEOUT)) for future in (first, second)] == [15, 5]
    eventually(lambda: parts.worker.queue.nonces == 0)
    assert parts.submit(proof(20)).result(TIMEOUT).dist == alone(20)
    with pytest.raises(ValueError, match="a batch must have at least 1 and at most 20 nonces, got 21"):
        parts.submit(proof(21))


def test_what_cannot_be_validated_is_refused_at_once(make: Callable[..., Parts]) -> None:
    parts = make()
    with pytest.raises(IllegalTransitionError, match="none was begun"):
        parts.submit(proof(1))
    parts.begin(PoCState.VALIDATING)
    with pytest.raises(ValueError, match="block_hash of the batch"):
        parts.submit(proof(1, block_hash="other"))
    assert parts.worker.queue.nonces == 0


def test_forwards_are_given_out_in_turn(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    order: list[str] = []
    with blocked(parts.engine) as entered:
        large = parts.submit(proof(6 * BATCH), "one")
        assert entered.wait(TIMEOUT)
        small = parts.submit(proof(2 * BATCH), "another")
        for name, result in (("large", large), ("small", small)):
            result.add_done_callback(lambda _, name=name: order.append(name))
    assert large.result(TIMEOUT).dist == alone(6 * BATCH)
    assert small.result(TIMEOUT).dist == alone(2 * BATCH)
    eventually(lambda: len(order) == 2)  # waiters wake before callbacks are called
    assert order == ["small", "large"]


def test_batches_of_many_submitters_and_keys_share_forwards(make: Callable[..., Parts]) -> None:
    """Bit for bit each alone, and each with its own progress, verdict and callback."""
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        first = parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        jobs = [
            parts.worker.enqueue(
                proof(1, number / 10, nonces=[number], public_key=f"key {number}", node_id=number - 1),
                f"submitter {number % 5}",
                keep=True,
            )
            for number in range(3 * BATCH - 1)
        ]
    assert first.result(TIMEOUT).dist == alone(1)
    verdicts = [job.future.result(TIMEOUT) for job in jobs]
    assert len(parts.engine.shapes) == 1 + 3
    manager = PoCManager(DistanceProver(SmallEngine()))
    manager.init_round(config())
    assert verdicts == [manager.validate(job.validation.proof) for job in jobs]
    eventually(lambda: len(parts.callbacks.batches) == len(jobs))
    posted = {batch["public_key"]: batch for _, _, batch in parts.callbacks.batches}
    assert [posted[f"key {number}"]["node_id"] for number in range(3)] == [0, 0, 1]  # never below 0
    assert {name: value for name, value in posted["key 7"].items() if name != "node_id"} == {
        name: value for name, value in verdicts[7].to_dict().items() if name != "node_id"
    }
    assert b'poc_validations_total{outcome="done"} 12.0' in parts.metrics.text()


def test_a_proof_without_nonces_is_judged_at_once_and_not_kept(make: Callable[..., Parts]) -> None:
    parts = make()
    with pytest.raises(IllegalTransitionError, match="No round configured"):
        parts.submit(proof(0))
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        job = parts.worker.enqueue(proof(0), "one", keep=True)
        verdict = job.future.result(0)
        assert (job.state, verdict.dist, verdict.fraud_detected, verdict.judged) == (JobState.DONE, [], False, False)
        assert parts.worker.queue.get(job.id) is None
        assert parts.worker.queue.batches == 1
        with pytest.raises(ValueError, match="Block hash mismatch"):
            parts.submit(proof(0, block_hash="other"))


def test_proofs_are_validated_after_the_round_was_stopped(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin()
    parts.checked(BATCH)
    parts.stop()
    assert parts.submit(proof(2 * BATCH, 0.5)).result(TIMEOUT).dist == alone(2 * BATCH)
    eventually(lambda: [kind for kind, *_ in parts.callbacks.batches].count("validated") == 1)
    eventually(lambda: parts.worker._idle)
    assert not parts.turns.inference_paused
    assert parts.manager.state == PoCState.STOPPED
    assert parts.worker.trouble() is None


def test_a_round_that_replaces_another_keeps_its_callbacks(make: Callable[..., Parts]) -> None:
    """What was being computed is thrown away; what was found is not."""
    parts = make()
    parts.begin()
    eventually(lambda: parts.callbacks.batches)
    before = parts.manager.status()["valid_nonces"]
    with blocked(parts.engine) as entered:
        assert entered.wait(TIMEOUT)
        before = parts.manager.status()["valid_nonces"]
        parts.begin(block_height=2, callback_url="http://another")
    parts.checked(BATCH)
    parts.stop()
    first = [batch for _, url, batch in parts.callbacks.batches if url == "http://chain"]
    assert [nonce for batch in first for nonce in batch["nonces"]] == before
    assert {batch["block_height"] for batch in first} == {1}
    second = [batch for _, url, batch in parts.callbacks.batches if url == "http://another"]
    assert {batch["block_height"] for batch in second} <= {2}
    assert {batch["r_target"] for batch in (*first, *second)} == {1.4}


def test_a_kept_job_says_what_became_of_it(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        job = parts.worker.enqueue(proof(2 * BATCH, 0.5), "one", keep=True)
        assert entered.wait(TIMEOUT)
        assert parts.worker.queue.get(job.id) is job
        assert parts.worker.queue.status()["running"] == {"id": job.id, "nonces_done": 0, "nonces": 2 * BATCH}
    assert job.future.result(TIMEOUT) is job.verdict
    assert parts.worker.queue.get(job.id) is job
    metrics = parts.metrics.text()
    assert b'poc_validations_total{outcome="done"} 1.0' in metrics
    assert b"poc_validation_wait_seconds_count 1.0" in metrics


def test_a_round_that_ends_while_its_batch_comes(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    put = parts.worker.queue.put

    def late(*arguments: object, **named: object) -> object:
        parts.stop()
        parts.begin(PoCState.VALIDATING)
        return put(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.worker.queue, "put", late)
    result = parts.submit(proof(1))
    with pytest.raises(RoundEndedError, match="while the batch was validated"):
        result.result(0)
    eventually(lambda: parts.worker._idle)
    assert parts.engine.shapes == []


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("count", [1, 3 * BATCH])
def test_jobs_end_with_their_round(make: Callable[..., Parts], count: int, again: bool) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        results = [parts.submit(proof(count)) for _ in range(3)]
        assert entered.wait(TIMEOUT)
        parts.stop()
        assert all(result.done() for result in results)  # though the forward still runs
        assert parts.worker.queue.nonces == 0
        if again:
            parts.begin(PoCState.VALIDATING, r_target=0.1, callback_url="http://another")
    for result in results:
        with pytest.raises(RoundEndedError, match="while the batch was validated"):
            result.result(0)
    eventually(lambda: parts.worker._idle)
    assert len(parts.engine.shapes) == 1  # nothing was computed in vain
    assert parts.worker.trouble() is None
    assert parts.callbacks.batches == []


@pytest.mark.parametrize("then", [PoCState.VALIDATING, PoCState.STOPPED])
def test_a_phase_that_ends_while_it_drains_never_holds_users(make: Callable[..., Parts], then: PoCState) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def drain(seconds: float) -> bool:
        asked.set()
        go_on.wait(TIMEOUT)
        return False

    parts = make(drain=drain, drain_seconds=TIMEOUT)
    paused: list[bool] = []
    parts.engine.before_forward = lambda: paused.append(parts.turns.inference_paused)
    hold = parts.turns.pause_inference
    parts.turns.pause_inference = lambda: paused.append(True) or hold()  # type: ignore[func-returns-value,method-assign]
    parts.begin()
    assert asked.wait(TIMEOUT)
    result = parts.submit(proof(1))
    if then == PoCState.STOPPED:
        parts.stop()
    else:
        parts.manager.set_phase(then)
    go_on.set()
    if then == PoCState.VALIDATING:
        assert result.result(TIMEOUT).dist == alone(1)
        assert parts.worker._drain_end is None  # the next phase has its whole time
    eventually(lambda: parts.worker._idle)
    assert True not in paused


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize("low", [False, True])
def test_proofs_have_the_priority_that_is_asked_for(make: Callable[..., Parts], low: bool) -> None:
    parts = make(low_priority=low)
    usual = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []
    parts.engine.before_forward = lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    parts.begin(PoCState.VALIDATING)
    assert parts.submit(proof(1)).result(TIMEOUT).dist == alone(1)
    assert found == [19 if low else usual]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == usual


# ---- what the prover is told of beforehand ----


@pytest.mark.parametrize("validating", [False, True])
def test_the_prover_is_told_what_comes_next(
    make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, validating: bool
) -> None:
    """Whether batches are generated, validated, or both in turn."""
    parts = make()
    prover = parts.manager.prover
    asked: list[tuple[list[Row], list[list[Row]]]] = []
    go = threading.Semaphore(0)

    def prove(config: object, rows: list[Row], pause: object, then: list[list[Row]], prove: object = prover.prove):
        assert go.acquire(timeout=TIMEOUT)
        asked.append((rows, [*then]))
        return prove(config, rows, pause, then)

    monkeypatch.setattr(prover, "prove", prove)
    parts.begin(PoCState.GENERATING, node_id=0, node_count=1)
    jobs = [parts.submit(proof(3 * BATCH)) for _ in range(2 if validating else 0)]
    for _ in range(14):
        go.release()
    for job in jobs:
        job.result(TIMEOUT)
    eventually(lambda: len(asked) == 14)
    for place, (_, then) in enumerate(asked[:-2]):
        if place > 1:  # the first may have been told of before the jobs came
            assert then == [rows for rows, _ in asked[place + 1 : place + 3]]
    go.release(1000)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(BATCH, 3), (16 * MIN_COST // 64, 64)])
def test_nothing_is_told_of_that_another_round_comes_before(
    make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, batch_size: int, seq_len: int
) -> None:
    """A prover far away would begin it in vain: whatever it is told of comes next, in that order and of that round."""
    parts = make()
    prover = parts.manager.prover
    asked: list[tuple[object, list[Row], list[list[Row]]]] = []
    go = threading.Semaphore(0)

    def prove(config: object, rows: list[Row], pause: object, then: list[list[Row]], prove: object = prover.prove):
        assert go.acquire(timeout=TIMEOUT)
        asked.append((config, rows, [*then]))
        return prove(config, rows, pause, then)

    monkeypatch.setattr(prover, "prove", prove)
    parts.begin(PoCState.GENERATING, node_id=0, node_count=1)
    others = [config(block_hash=f"another {number}", batch_size=batch_size, seq_len=seq_len) for number in range(2)]
    jobs = [
        parts.worker.enqueue(proof(batch_size, block_hash=other.block_hash), f"submitter {number}", config=other)
        for number, other in enumerate(others)
    ]
    go.release(60)
    for job in jobs:
        job.future.result(TIMEOUT)
    eventually(lambda: len(asked) == 60)
    told = 0
    for place, (round_, _, then) in enumerate(asked[:-2]):
        if place > 1:  # the first may have been told of before the jobs came
            assert then == [rows for other, rows, _ in asked[place + 1 : place + 1 + len(then)] if other is round_]
            told += len(then)
    assert told >= 60
    go.release(1000)
