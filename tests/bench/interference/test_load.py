"""The load: requests and proofs that are sent to a rig of a few lines."""

import asyncio
import heapq
from types import SimpleNamespace

import numpy as np
import pytest

from bench.interference import load
from bench.interference import run as suite

TIMEOUT = 20.0
ANSWER = [1, 2, 3]


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when nothing is left to do, however busy the machine is."""

    _now = 0.0

    def time(self):
        return self._now

    def _run_once(self):
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)._scheduled = False
            self._timer_cancelled_count -= 1
        if self._scheduled and not self._ready:
            self._now = max(self._now, self._scheduled[0].when())
        super()._run_once()


def run(coroutine):
    loop = Loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


class FakeRig:
    """Answers each request with three tokens, 10 ms apart, and each batch of proofs after 5 ms, in two parts."""

    def __init__(self, answer=ANSWER, proof_error=None):
        self.prompts, self.proofs = 2, 3
        self.progress, self.slices, self.step_waits, self.slice_waits = [], [], [], []
        self.answer, self.proof_error = answer, proof_error
        self.switched, self.asked, self.stuck, self.in_trouble = [], [], False, None
        self.counts = False

    async def switch(self, condition):
        self.switched.append(condition.name)

    async def counters(self):
        return {"slices": float(len(self.progress))} if self.counts else None

    def begin(self, request, ended):
        loop = asyncio.get_running_loop()
        self.asked.append(request.prompt)
        if self.stuck:
            return

        def token():
            request.times.append(loop.time())
            if len(request.times) == len(self.answer):
                request.answer = self.answer
                ended(request)
            else:
                loop.call_later(0.01, token)

        loop.call_later(0.01, token)

    def validate(self, proof, ended):
        loop = asyncio.get_running_loop()

        def done():
            self.progress += [loop.time()] * 2
            self.slices.append(0.002)
            ended(self.proof_error)

        loop.call_later(0.005, done)

    def nonces_between(self, begin, end):
        return 2.0 * sum(begin <= at < end for at in self.progress)

    def trouble(self):
        return self.in_trouble

    def check(self, requests):
        assert all(request.answer == ANSWER for request in requests)


def block(rig, condition, arrivals, seconds=0.2, max_in_flight=100, timeout_seconds=TIMEOUT):
    return run(
        load.run_block(rig, condition, arrivals, seconds, max_in_flight=max_in_flight, timeout_seconds=timeout_seconds)
    )


def test_arrivals_are_a_poisson_process_of_the_seed():
    poisson = load.poisson
    arrivals = poisson(50.0, 100.0, 7, "seed")
    assert arrivals == poisson(50.0, 100.0, 7, "seed")
    assert arrivals != poisson(50.0, 100.0, 7, "another")
    at = np.array([time for time, _ in arrivals])
    assert ((at >= 0) & (at < 100)).all()
    assert (np.diff(at) > 0).all()
    assert len(at) == pytest.approx(5000, abs=4 * 5000**0.5)
    gaps = np.diff(at)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert {prompt for _, prompt in arrivals} == set(range(7))


def test_a_block_has_the_requests_that_arrived_and_the_nonces_done_in_it():
    rig = FakeRig()
    result = block(rig, load.Condition("both", share=0.1), [(0.0, 1), (0.05, 0), (0.199, 1)])
    assert rig.asked == [1, 0, 1]
    assert rig.switched == ["both"]
    assert [len(request.times) for request in result.requests] == [3, 3, 3]
    # The last request ended after the block: its tokens are timed, and do not count to the rate.
    assert result.tokens == 6
    assert result.refused == 0
    assert result.nonces % 2 == 0
    assert 0 < result.nonces < 2 * len(rig.progress)
    assert result.requests[0].due == pytest.approx(result.begin)
    dues = [request.due for request in result.requests]
    assert np.diff(dues) == pytest.approx([0.05, 0.149])
    assert all(request.submitted == pytest.approx(request.due) for request in result.requests)


def test_a_block_has_what_the_engine_counted_until_its_last_request_ended():
    rig = FakeRig()
    assert block(rig, load.Condition("both"), [(0.1, 0)]).counters is None
    rig.counts = True
    before = len(rig.progress)
    counted = block(rig, load.Condition("both"), [(0.199, 0)]).counters
    assert counted["seconds"] == pytest.approx(0.02 + 0.199 + 0.03)
    # All but those of the first batch, which came before, and of those that ended afterwards.
    assert 0 < counted["slices"] < len(rig.progress) - before


def test_regular_arrivals_come_at_one_interval():
    arrivals = load.regular(0.25, 1.1, 7, "seed")
    assert [at for at, _ in arrivals] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {prompt for _, prompt in load.regular(0.01, 10.0, 7, "seed")} == set(range(7))


@pytest.mark.parametrize("chat", [True, False])
def test_one_side_alone_has_nothing_of_the_other(chat):
    rig = FakeRig()
    result = block(rig, load.Condition("alone", chat=chat, validation=not chat), [(0.0, 0)])
    assert (len(result.requests), result.tokens) == ((1, 3) if chat else (0, 0))
    assert (result.nonces > 0) is not chat
    assert bool(rig.progress) is not chat


def test_requests_beyond_the_most_in_flight_are_refused():
    result = block(FakeRig(), load.Condition("chat"), [(0.0, 0)] * 5 + [(0.1, 0)], max_in_flight=2)
    assert result.refused == 3
    assert len(result.requests) == 3


def test_a_block_ends_by_a_wrong_proof():
    rig = FakeRig(proof_error=load.DifferenceError("another distance"))
    with pytest.raises(load.DifferenceError, match="another distance"):
        block(rig, load.Condition("both"), [])


def test_a_block_ends_by_a_wrong_answer():
    with pytest.raises(AssertionError):
        block(FakeRig(answer=[1, 2, 4]), load.Condition("both"), [(0.0, 0)])


def test_what_never_ends_and_a_node_in_trouble_are_told(monkeypatch):
    monkeypatch.setattr(load, "_POLL_SECONDS", 0.01)
    rig = FakeRig()
    rig.stuck = True
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.05 s"):
        block(rig, load.Condition("chat", validation=False), [(0.0, 0)], timeout_seconds=0.05)
    rig.in_trouble = "its thread ended"
    with pytest.raises(RuntimeError, match="the node is in trouble: its thread ended"):
        block(rig, load.Condition("chat", validation=False), [(0.0, 0)])


def test_saturation_is_the_rate_of_a_closed_loop():
    """Four users at 30 ms per request, except for a token of each that the window cuts off or has in addition."""
    rig = FakeRig()
    rate = run(load.saturation(rig, 4, 0.6, TIMEOUT))
    assert abs(rate - 4 / 0.03) <= 4 / 3 / 0.45 + 1e-9
    assert set(rig.asked) == {0, 1}


def test_without_a_rate_of_saturation_nothing_is_measured():
    """The first tokens come after 10 ms."""
    options = SimpleNamespace(in_flight=4, saturation_seconds=0.005, timeout_seconds=TIMEOUT)
    with pytest.raises(SystemExit, match="give --saturation-seconds more"):
        run(suite.measure_all(FakeRig(), [], options))
