"""The proof worker when batches fail or hang, when there is nothing to do, and at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blocking import blocked
from web import TIMEOUT, eventually
from workers import BATCH, PATIENT, Parts, alone, config, failing, proof, workers

from poc_kernels.protocol import PoCState, RoundEndedError
from poc_kernels.scheduling import Turns
from poc_kernels.service import worker as worker_module

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parts]]:
    """Makes workers."""
    with workers(monkeypatch) as make:
        yield make


def test_a_batch_that_fails_is_tried_again(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.engine.before_forward = failing(3)
    parts.begin()
    parts.checked(20)
    parts.stop()
    result = parts.manager.status()
    valid = [nonce for nonce, distance in enumerate(alone(result["total_checked"])) if distance < 1.4]
    assert result["valid_nonces"] == valid
    assert b"poc_batch_failures_total 3.0" in parts.metrics.text()


def test_failures_are_told_until_a_batch_succeeds(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", TIMEOUT)  # until it is woken
    parts = make()
    parts.engine.before_forward = failing(1)
    parts.begin()
    eventually(lambda: parts.worker.trouble() == "proof batches fail: RuntimeError")
    parts.worker._round_changed()
    parts.checked(BATCH)
    assert parts.worker.trouble() is None


def test_a_job_that_fails_fails_alone(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        first = parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        second, third = parts.submit(proof(9)), parts.submit(proof(5))
        parts.engine.before_forward = failing(1)
    assert first.result(TIMEOUT).dist == alone(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        second.result(TIMEOUT)
    assert third.result(TIMEOUT).dist == alone(5)
    assert parts.worker.trouble() is None


def test_a_forward_that_fails_costs_none_of_those_who_share_it(make: Callable[..., Parts]) -> None:
    """Each is tried alone; one that fails again fails alone."""
    parts = make()
    parts.begin(PoCState.VALIDATING)
    poison(parts)
    with blocked(parts.engine) as entered:
        parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        good = [parts.submit(proof(1, nonces=[number]), f"submitter {number}") for number in range(BATCH - 1)]
        bad = parts.submit(proof(1, public_key="poison"), "another")
    assert [result.result(TIMEOUT).dist for result in good] == [[distance] for distance in alone(BATCH - 1)]
    with pytest.raises(RuntimeError, match="it cannot be computed"):
        bad.result(TIMEOUT)
    assert b"poc_batch_failures_total 2.0" in parts.metrics.text()
    eventually(lambda: parts.worker._idle)
    assert parts.worker.trouble() is None


def poison(parts: Parts, key: str = "poison") -> list[int]:
    """Have forwards fail that have a row of this key; count them in what is returned."""
    prove, failed = parts.manager.prover.prove, [0]

    def poisoned(config: Any, rows: Any, pause: Any, then: Any) -> Any:
        if any(row.public_key == key for row in rows):
            failed[0] += 1
            raise RuntimeError("it cannot be computed")
        return prove(config, rows, pause)

    parts.manager.prover.prove = poisoned  # type: ignore[method-assign]
    return failed


@pytest.fixture
def without_end(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Whoever waits to try again waits for too long."""
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 10 * TIMEOUT)


@pytest.mark.usefixtures("without_end")
def test_a_round_does_not_wait_after_requests_that_fail(make: Callable[..., Parts]) -> None:
    parts = make()
    poison(parts)
    parts.begin()
    for number in range(4):
        failing_job = parts.submit(proof(1, public_key="poison"), f"submitter {number}")
        with pytest.raises(RuntimeError, match="it cannot be computed"):
            failing_job.result(TIMEOUT)
        parts.checked(parts.manager.status()["total_checked"] + 3 * BATCH)
    assert parts.worker.trouble() is None


@pytest.mark.usefixtures("without_end")
@pytest.mark.parametrize("bad", [1, 3])
def test_others_do_not_wait_after_requests_that_fail(make: Callable[..., Parts], bad: int) -> None:
    """Not even where each of them shared a forward before, as long as others' succeed in between."""
    parts = make()
    failed = poison(parts)
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        results = [
            parts.submit(proof(BATCH - 1 if number % 2 else 1, public_key=key), f"submitter {number}")
            for number, key in enumerate(["poison", "key"] * bad)
        ]
    for failing_job, good in zip(results[::2], results[1::2], strict=True):
        with pytest.raises(RuntimeError, match="it cannot be computed"):
            failing_job.result(TIMEOUT)
        assert good.result(TIMEOUT).dist == alone(BATCH - 1)
    assert failed == [2 * bad]


@pytest.mark.usefixtures("without_end")
def test_requests_do_not_wait_for_a_round_that_fails(make: Callable[..., Parts]) -> None:
    """Nor does it take turns from them, however large they are."""
    parts = make()
    failed = poison(parts, "key")
    parts.begin()
    large = config(public_key="other", batch_size=32, seq_len=64)
    jobs = [
        parts.worker.enqueue(proof(64, public_key="other"), f"submitter {number}", config=large).future
        for number in range(3)
    ]
    assert [len(job.result(TIMEOUT).dist) for job in jobs] == [64] * 3
    assert 2 <= failed[0] <= 12


@pytest.mark.usefixtures("without_end")
@pytest.mark.parametrize(("phase", "tried"), [(PoCState.VALIDATING, 3), (PoCState.GENERATING, 4)])
def test_a_dead_device_is_not_asked_without_end(make: Callable[..., Parts], phase: PoCState, tried: int) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    prove = parts.manager.prover.prove
    calls: list[int] = []

    def dead(*arguments: Any) -> Any:
        if calls or parts.worker.queue.batches > 1:
            calls.append(1)
            raise RuntimeError("the device is lost")
        return prove(*arguments)

    parts.manager.prover.prove = dead  # type: ignore[method-assign]
    with blocked(parts.engine) as entered:
        first = parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        for number in range(8):
            parts.submit(proof(1), f"submitter {number}")
        parts.manager.set_phase(phase)
    first.result(TIMEOUT)
    eventually(lambda: len(calls) == tried)
    assert not threading.Event().wait(0.1)
    assert len(calls) == tried
    assert parts.worker.trouble() == "proof batches fail: RuntimeError"
    parts.worker._notify()  # as after some time: once more, and no more than that
    eventually(lambda: len(calls) > tried)
    assert not threading.Event().wait(0.05)
    assert len(calls) <= tried + 2


def test_a_verdict_that_fails_fails_alone(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    verdict = parts.manager.verdict

    def failing_once(validation: Any) -> Any:
        if validation.proof.public_key == "poison":
            raise ArithmeticError("no verdict")
        return verdict(validation)

    monkeypatch.setattr(parts.manager, "verdict", failing_once)
    with blocked(parts.engine) as entered:
        parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        bad, good = parts.submit(proof(1, public_key="poison")), parts.submit(proof(1))
    with pytest.raises(ArithmeticError, match="no verdict"):
        bad.result(TIMEOUT)
    assert good.result(TIMEOUT).dist == alone(1)
    assert len(parts.engine.shapes) == 2
    assert b"poc_batch_failures_total 1.0" in parts.metrics.text()


def test_a_failed_job_is_forgotten_when_there_is_nothing_to_do(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.engine.before_forward = failing(1)
    parts.begin(PoCState.VALIDATING)
    with pytest.raises(RuntimeError, match="out of memory"):
        parts.submit(proof(1)).result(TIMEOUT)
    eventually(lambda: parts.worker._idle)
    assert parts.worker.trouble() is None


def test_users_do_not_wait_for_a_forward_of_a_phase_that_is_over(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    stepped = threading.Event()
    seen: list[bool] = []

    def step() -> None:
        with parts.turns.inference():
            stepped.set()

    def phase(state: PoCState) -> None:
        parts.manager.set_phase(state)

    def forward(x: Any, pause: Callable[[], None]) -> Any:
        if not seen:
            phase(PoCState.GENERATING)
            eventually(lambda: pause() or parts.turns.inference_paused)
            user = threading.Thread(target=step, daemon=True)
            user.start()
            pause()
            seen.append(stepped.is_set())
            phase(PoCState.VALIDATING)
            eventually(lambda: pause() or stepped.is_set())
            seen.append(parts.turns.inference_paused)
            user.join(TIMEOUT)
        return type(parts.engine).forward(parts.engine, x)

    parts.engine.forward = forward  # type: ignore[method-assign]
    assert parts.submit(proof(1)).result(TIMEOUT).dist == alone(1)
    assert seen == [False, False]


def test_trouble(make: Callable[..., Parts]) -> None:
    parts = make(start=False, stall_seconds=30.0)
    assert parts.worker.trouble() == "the proof thread is not running"
    parts.worker.start()
    eventually(lambda: parts.worker._idle)
    parts.worker._progressed -= 100.0
    assert parts.worker.trouble() is None  # nothing to do
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        result = parts.submit(proof(1))
        assert entered.wait(TIMEOUT)
        assert parts.worker.trouble() is None  # the clock began with the work
        parts.worker._progressed -= 31.0
        assert parts.worker.trouble() == "no proof batch for 31 s in state VALIDATING"
    result.result(TIMEOUT)
    eventually(lambda: parts.worker.trouble() is None)


def test_to_be_held_back_is_no_stall(make: Callable[..., Parts]) -> None:
    parts = make(turns=Turns(PATIENT), stall_seconds=30.0)
    parts.begin(PoCState.VALIDATING)
    with parts.turns.inference():
        result = parts.submit(proof(1))
        eventually(lambda: parts.device._turn.waiting)
        parts.worker._progressed -= 31.0
        assert parts.worker.trouble() is None
    assert result.result(TIMEOUT).dist == alone(1)


def test_draining_is_no_stall(make: Callable[..., Parts]) -> None:
    drains = threading.Semaphore(0)

    def drain(seconds: float) -> bool:
        drains.release()
        return threading.Event().wait(0.001)

    parts = make(drain=drain, drain_seconds=TIMEOUT, stall_seconds=30.0)
    parts.begin()
    assert drains.acquire(timeout=TIMEOUT)
    parts.worker._progressed -= 31.0
    eventually(lambda: parts.worker.trouble() is None)
    assert parts.engine.shapes == []


def test_nothing_spins_while_there_is_nothing_to_do(
    make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make()
    looks: list[float] = []
    has_work = parts.worker._has_work

    def counted() -> bool:
        looks.append(time.monotonic())
        return has_work()

    monkeypatch.setattr(parts.worker, "_has_work", counted)
    for change in (
        lambda: None,
        lambda: parts.manager.init_round(config()),
        lambda: parts.manager.set_phase(PoCState.VALIDATING),
        lambda: parts.submit(proof(9)).result(TIMEOUT),
        parts.manager.stop_round,
    ):
        change()
        eventually(lambda: parts.worker._idle and parts.worker.queue.nonces == 0)
        before = len(looks)
        assert not threading.Event().wait(0.05)
        assert len(looks) <= before + 1  # it may just have been woken


# ---- the end ----


def condition(name: str, parts: Parts) -> None:
    """Bring a worker into a condition in which it is to be closed."""
    if name == "idle":
        eventually(lambda: parts.worker._idle)
    elif name == "generating":
        parts.begin()
        parts.checked(BATCH)
    elif name == "validating":
        parts.begin(PoCState.VALIDATING)
        parts.submit(proof(50))
    elif name == "failing":
        parts.engine.before_forward = failing()
        parts.begin()
        eventually(parts.worker.trouble)
    elif name == "stopped":
        parts.begin()
        parts.stop()
    elif name == "without turns":
        parts.begin()
        parts.turns.close()
        eventually(parts.ended)


@pytest.mark.parametrize(
    "name", ["started just now", "idle", "generating", "validating", "failing", "stopped", "without turns"]
)
def test_close_in_every_condition(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 10 * TIMEOUT)
    parts = make()
    condition(name, parts)
    parts.worker.close(TIMEOUT)
    assert parts.ended()
    assert not parts.turns.inference_paused
    assert parts.worker.queue.nonces == 0


def test_a_round_ends_with_the_thread_that_generates_it(make: Callable[..., Parts]) -> None:
    parts = make()
    condition("without turns", parts)
    assert parts.worker.ended
    assert parts.manager.state == PoCState.STOPPED
    parts.worker.close(TIMEOUT)
    assert parts.worker.trouble() == "the proof thread is not running"


def test_close_while_it_drains(make: Callable[..., Parts]) -> None:
    asked = threading.Event()

    def drain(seconds: float) -> bool:
        asked.set()
        return threading.Event().wait(seconds)

    parts = make(drain=drain, drain_seconds=10 * TIMEOUT)
    parts.begin()
    assert asked.wait(TIMEOUT)
    parts.worker.close(TIMEOUT)
    assert parts.ended()
    assert not parts.turns.inference_paused


def test_close_does_not_wait_for_a_batch_that_hangs(make: Callable[..., Parts]) -> None:
    parts = make()
    parts.begin(PoCState.VALIDATING)
    with blocked(parts.engine) as entered:
        results = [parts.submit(proof(1)), parts.submit(proof(2))]
        assert entered.wait(TIMEOUT)
        parts.worker.close(0.01)
        assert not parts.ended()
        for result in results:
            with pytest.raises(RoundEndedError, match="shutting down"):
                result.result(0)
        with pytest.raises(RoundEndedError, match="shutting down"):
            parts.submit(proof(1))
    eventually(parts.ended)  # in order: an error in a thread fails the test
    assert parts.worker.queue.nonces == 0


def test_close_during_a_batch_that_fails(make: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 10 * TIMEOUT)
    parts = make()
    entered, release = threading.Event(), threading.Event()

    def fail_when_closed() -> None:
        entered.set()
        assert release.wait(TIMEOUT)
        raise RuntimeError("out of memory")

    parts.engine.before_forward = fail_when_closed
    parts.begin()
    assert entered.wait(TIMEOUT)
    parts.worker.close(0.01)
    release.set()
    eventually(parts.ended)  # without another try


def test_close_before_start(make: Callable[..., Parts]) -> None:
    parts = make(start=False)
    parts.begin(PoCState.VALIDATING)
    result = parts.submit(proof(1))
    parts.worker.close(TIMEOUT)
    with pytest.raises(RoundEndedError, match="shutting down"):
        result.result(0)
