"""The suite beside inference: its load on a node of a few lines, its figures, and what it says of the goals."""

import asyncio
import heapq
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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
        self.progress, self.slices, self.waits, self.held = [], [], [], []
        self.answer, self.proof_error = answer, proof_error
        self.switched, self.asked, self.stuck, self.in_trouble = [], [], False, None

    def switch(self, condition):
        self.switched.append(condition.name)

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


def block(module, rig, condition, arrivals, seconds=0.2, max_in_flight=100, timeout_seconds=TIMEOUT):
    load = module("beside_load")
    return run(
        load.run_block(rig, condition, arrivals, seconds, max_in_flight=max_in_flight, timeout_seconds=timeout_seconds)
    )


# ---- the load ----------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_of_the_seed(module):
    poisson = module("beside_load").poisson
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


def test_a_block_has_the_requests_that_arrived_and_the_nonces_done_in_it(module):
    rig, load = FakeRig(), module("beside_load")
    result = block(module, rig, load.Condition("both", share=0.1), [(0.0, 1), (0.05, 0), (0.199, 1)])
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


@pytest.mark.parametrize("chat", [True, False])
def test_one_side_alone_has_nothing_of_the_other(module, chat):
    rig, load = FakeRig(), module("beside_load")
    result = block(module, rig, load.Condition("alone", chat=chat, validation=not chat), [(0.0, 0)])
    assert (len(result.requests), result.tokens) == ((1, 3) if chat else (0, 0))
    assert (result.nonces > 0) is not chat
    assert bool(rig.progress) is not chat


def test_requests_beyond_the_most_in_flight_are_refused(module):
    load = module("beside_load")
    result = block(module, FakeRig(), load.Condition("chat"), [(0.0, 0)] * 5 + [(0.1, 0)], max_in_flight=2)
    assert result.refused == 3
    assert len(result.requests) == 3


def test_a_block_ends_by_a_wrong_proof(module):
    load = module("beside_load")
    rig = FakeRig(proof_error=load.DifferenceError("another distance"))
    with pytest.raises(load.DifferenceError, match="another distance"):
        block(module, rig, load.Condition("both"), [])


def test_a_block_ends_by_a_wrong_answer(module):
    with pytest.raises(AssertionError):
        block(module, FakeRig(answer=[1, 2, 4]), module("beside_load").Condition("both"), [(0.0, 0)])


def test_what_never_ends_and_a_node_in_trouble_are_told(module, monkeypatch):
    load = module("beside_load")
    monkeypatch.setattr(load, "_LOOK_SECONDS", 0.01)
    rig = FakeRig()
    rig.stuck = True
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.05 s"):
        block(module, rig, load.Condition("chat", validation=False), [(0.0, 0)], timeout_seconds=0.05)
    rig.in_trouble = "its thread ended"
    with pytest.raises(RuntimeError, match="the node is in trouble: its thread ended"):
        block(module, rig, load.Condition("chat", validation=False), [(0.0, 0)])


def test_saturation_is_the_rate_of_a_closed_loop(module):
    """Four users at 30 ms a request, but for a token of each that the window cuts off or has more."""
    rig = FakeRig()
    rate = run(module("beside_load").saturation(rig, 4, 0.6, TIMEOUT))
    assert abs(rate - 4 / 0.03) <= 4 / 3 / 0.45 + 1e-9
    assert set(rig.asked) == {0, 1}


def test_without_a_rate_of_saturation_nothing_is_measured(module):
    """The first tokens come after 10 ms."""
    options = SimpleNamespace(in_flight=4, saturation_seconds=0.005, timeout_seconds=TIMEOUT)
    with pytest.raises(SystemExit, match="give --saturation-seconds more"):
        run(module("beside")._measure_all(FakeRig(), [], options))


# ---- a node's turns ----------------------------------------------------------------------------------------------


def test_turns_are_switched_between_blocks_and_waits_are_timed(module):
    from poc_kernels.scheduling import Pacing, Turns, TurnsClosed

    first, second = Turns(), Turns(Pacing(share=0.5))
    switched = module("beside_turns").SwitchedTurns(first)
    step, proof = switched.inference(lambda: True), switched.proof()
    with step:
        assert first._steps.computing is not None
        switched.switch(second)
    assert first._steps.computing is None
    with proof:
        assert second._slices.computing is not None
        assert proof.computing
        assert proof.pause() >= 0
    with step:
        assert second._steps.computing is not None
    assert len(switched.waits) == 2
    assert all(wait >= 0 for wait in switched.waits)
    switched.close()
    assert second.closed
    assert switched.closed
    assert not first.closed
    with pytest.raises(TurnsClosed), step:
        pass


def test_a_distance_that_differs_is_named(module):
    m = module("beside_validation")
    expected = SimpleNamespace(nonces=[7, 8], dist=[1.25, 1.5])
    assert str(m.difference(expected, [1.25, 1.0])) == "the distance of nonce 8 is 1.0, alone it is 1.5"
    assert str(m.difference(expected, [1.25])) == "1 distances came for 2 nonces"


# ---- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_conditions_of_a_rate_and_their_order(module):
    m = module("beside")
    light, near = m.Rate("light", 0.15, 3, True), m.Rate("near saturation", 0.85, 2, False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    conditions = m.conditions_at(cpu, light, (0.2,), (0.1, 0.6), True)
    names = [condition.name for condition in conditions]
    shares = [
        *("held, share 0.05", "held, share 0.2"),
        *("free, share 0.1, the default", "free, share 0.6", "free, share 0.8"),
    ]
    unpaced = ["no pacing", "no pacing, a part of the GPU", "no pacing, no priorities"]
    assert names == ["chat alone", *shares, *unpaced, "validation alone"]
    equal = {condition.name for condition in conditions if condition.side == "equal"}
    assert equal == {"held, share 0.05", "held, share 0.2", "no pacing, no priorities"}
    conditions = m.conditions_at(gpu, near, (0.2,), (0.6,))
    assert [condition.name for condition in conditions] == [
        *("chat alone", "held, share 0.05", "held, share 0.1, the default", "free, share 0.8"),
        *("no pacing", "no pacing, no priorities", "validation alone"),
    ]
    assert [condition.name for condition in conditions if condition.side == "equal"] == ["no pacing, no priorities"]
    orders = [m.in_order(names, turn, 3) for turn in range(3)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({order[0] for order in orders}) == 3


def test_the_default_is_that_of_a_node(module):
    m = module("beside")
    cpu, gpu = m.default_of(torch.device("cpu")), m.default_of(torch.device("cuda", 0))
    assert gpu.name == "held, share 0.1, the default"
    assert cpu.paced is (sys.platform != "linux")
    assert (cpu.share, gpu.share) == (0.1, 0.1)


def test_only_rounds_that_all_conditions_had_count(module):
    assert module("beside").whole_rounds({"a": [1, 2], "b": [3]}) == {"a": [1], "b": [3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "device must be one that torch has here"),
        (["--case", "gpt@2x8"], "cases must be"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--block-seconds", "0"], "--block-seconds must be positive, got 0"),
        (["--rounds", "0,0,0"], "--rounds must be positive"),
        (["--rounds", "1,1"], "zip"),
        (["--held-shares", "1.5"], "share must be in"),
        (["--free-shares", "0"], "share must be in"),
        (["--http", "--case", "qwen3-0.6b@2x8"], "--http takes the demonstration's model"),
    ],
)
def test_options_that_make_no_sense_are_refused(module, tmp_path, monkeypatch, capsys, arguments, message):
    if "cuda" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        module("beside")._parsed([str(tmp_path / "out.json"), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# ---- figures -----------------------------------------------------------------------------------------------------


def request_of(first, gaps, due=100.0):
    times = due + first + np.concatenate([[0.0], np.cumsum(gaps)])
    return SimpleNamespace(due=due, submitted=due + 0.001, times=list(times))


def block_of(module, requests=(), nonces=0.0, seconds=10.0, **changes):
    fields = {"begin": 100.0, "refused": 0, "tokens": 50, "slices": [], "waits": [], "held": [], **changes}
    return module("beside_load").Block(seconds=seconds, requests=list(requests), nonces=nonces, **fields)


def test_percentiles_say_how_many_samples_they_rest_on(module):
    summary = module("beside_results").summary([np.arange(1, 101), np.arange(101, 1001)])
    assert summary["samples"] == 1000
    assert (summary["p50"], summary["p99"]) == pytest.approx((500.5, 990.01))
    assert summary["above_p99"] == 10
    assert (summary["quantiles"][0], summary["quantiles"][-1]) == (1, 1000)
    assert module("beside_results").summary([]) is None


def steps_block(module, generator, slower=1.0, seconds=10.0, rate=20.0):
    """Requests of 31 gaps that share those of the steps they are in, each 10 ms long or, one in 50, 3 times as long."""
    steps = 0.01 * slower * np.where(generator.random(int(2 * seconds / 0.01)) < 0.02, 3.0, 1.0)
    steps *= generator.uniform(0.9, 1.1, len(steps))
    times = 100.0 + np.cumsum(steps)
    requests = []
    for due in 100.0 + np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds))):
        first = np.searchsorted(times, due)
        requests.append(SimpleNamespace(due=due, submitted=due, times=list(times[first : first + 32])))
    return block_of(module, requests, seconds=seconds)


def test_ratios_are_those_of_percentiles(module):
    ratios = module("beside_results").ratios
    alone = [request_of(0.02, [0.01] * 31, due=100.0 + at) for at in range(10)]
    doubled = [request_of(0.03, [0.02] * 31, due=100.0 + at) for at in range(10)]
    both, blocks = [block_of(module, doubled)] * 2, [block_of(module, alone)] * 2
    found = ratios(both, blocks, 0)
    for percentile in ("p50", "p95", "p99"):
        assert found["first"][percentile] == pytest.approx([1.5] * 3)
        assert found["between"][percentile] == pytest.approx([2.0] * 3)
    assert found == ratios(both, blocks, 0)
    assert ratios([block_of(module)], blocks[:1], 0) is None


def test_the_interval_holds_the_ratio_where_requests_share_steps_and_blocks_drift(module):
    """Of conditions that are alike, on a machine whose speed changes by 5 % from block to block."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(25):
        sides = [[steps_block(module, generator, generator.normal(1.0, 0.05)) for _ in range(5)] for _ in range(2)]
        _, low, high = module("beside_results").ratios(*sides, 0)["between"]["p99"]
        inside += low <= 1.0 <= high
    assert inside >= 20  # 95 % would be 24; with five rounds it is rough


def measured(module, gap=0.01, first=0.02, nonces=50.0, share=0.1):
    """A rate's cells: chat alone has tokens each 10 ms, validation alone 10 nonces a second."""
    load, m = module("beside_load"), module("beside_results")
    alone = [request_of(0.02, [0.01] * 31) for _ in range(20)]
    both = [request_of(first, [gap] * 31) for _ in range(20)]
    name = "both" if share == 0.1 else "another"
    blocks = {
        load.Condition("chat alone", validation=False): [block_of(module, alone)],
        load.Condition(name, share=share): [
            block_of(module, both, nonces, slices=[0.001, 0.003], waits=[0.5], held=[0.1])
        ],
        load.Condition("validation alone", chat=False): [block_of(module, nonces=60.0), block_of(module, nonces=140.0)],
    }
    return m.cells(blocks, 0)


def test_cells_have_rates_and_shares_of_their_own_rate(module):
    alone, both, solo = measured(module, gap=0.0125)
    assert alone["first"]["p50"] == pytest.approx(0.02)  # from when it was due
    assert alone["ratios"] is None
    assert alone["nonces_per_second"] is None
    assert alone["solo_share"] is None
    assert alone["late_p99"] == pytest.approx(0.001)
    assert solo["nonces_per_second"] == pytest.approx(10.0)
    assert solo["first"] is None
    assert both["nonces_per_second"] == pytest.approx(5.0)
    assert both["solo_share"] == pytest.approx(0.5)
    assert both["between"]["samples"] == 20 * 31
    assert both["ratios"]["between"]["p99"] == pytest.approx([1.25] * 3)
    assert both["ratios"]["first"]["p99"] == pytest.approx([1.0] * 3)
    assert both["slices"]["max"] == 0.003
    assert both["slices"]["share_of_time"] == pytest.approx(0.0004)
    assert both["waits"]["share_of_time"] == pytest.approx(0.05)
    assert both["tokens_per_second"] == 5.0


def run_of(cells, device="cpu", rate="light"):
    rates = [{"name": rate, "fraction": 0.15, "requests_per_second": 2.0, "cells": cells}]
    return {"device": device, "default": "both", "rates": rates}


@pytest.mark.parametrize(
    ("device", "rate", "changes", "met"),
    [
        ("cpu", "light", {"gap": 0.012, "nonces": 50}, [True, True]),
        ("cpu", "light", {"gap": 0.013, "nonces": 39}, [False, False]),
        ("cpu", "half", {}, [None, None]),
        ("cpu", "light", {"share": 0.2}, [None, None]),
        ("cuda", "half", {"gap": 0.0104, "first": 0.0208, "nonces": 81}, [True, True, True]),
        ("cuda", "half", {"gap": 0.0104, "first": 0.0212, "nonces": 79}, [True, False, False]),
    ],
)
def test_goals_are_judged_by_the_default_pacing_at_their_rate(module, device, rate, changes, met):
    verdicts = module("beside_results").judge(run_of(measured(module, **changes), device, rate))
    assert [verdict.met for verdict in verdicts] == met


def results(module, **changes):
    run = {
        **run_of(measured(module, gap=0.02)),
        "http": False,
        "quick": False,
        "model": {"name": "demo", "dtype": "float32", "layers": 4, "parameters": 4_000_000},
        "batch_size": 16,
        "seq_len": 64,
        "new_tokens": 32,
        "prompt_tokens": 64,
        "prompts": 24,
        "in_flight": 32,
        "block_seconds": 8.0,
        "slice_seconds": 0.002,
        "slices_in_flight": 2,
        "multiprocessors": None,
        "projection": True,
        "max_in_flight": 256,
        "seed": 0,
        "planned_slices": [0.001, 0.0019],
        "answers_exact": True,
        "answers_near_ties": 0,
        "least_lead": 0.01,
        "saturation_requests_per_second": 13.3,
        "run_seconds": 600.0,
        **changes,
    }
    machine = {
        "cpu": "a processor",
        "architecture": "x86_64",
        "logical_cores": 2,
        "bfloat16_instructions": [],
        "backend": "reference",
        "threads": 2,
        "load_before": 0.0,
        "os": "an OS",
        "python": "CPython 3.11",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "gpu": None,
    }
    commit = {"id": "abc", "dirty": False}
    return {"beside": run, "machine_info": machine, "commit_info": commit, "datetime": "2026-11-22T12:00:00"}


def test_the_report_has_tables_plots_and_verdicts(module, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results(module)))
    monkeypatch.setattr(sys, "argv", ["beside_report.py", str(path)])
    module("beside_report").main()
    for name in ("run.png", "run-tradeoff.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "run.md").read_text()
    assert "| p99 of time between tokens, light rate | at most 1.25 of chat alone | 2.000" in text
    assert "**missed**" in text
    assert "| validation beside chat, light rate | at least 40% of its solo rate | 50.0% | **met** |" in text
    both = next(line for line in text.splitlines() if line.startswith("| both |"))
    assert "| 20 / 20 / 20 |" in both
    assert "2.00 (2.00 to 2.00)" in both
    assert "50.0 %" in both
    assert "2 slices of the forward, the longest 1.9 ms" in text
    assert "equal to those generated alone, token for token" in text
    assert "quick run" not in text


def test_the_report_says_what_differs_at_near_ties_and_what_is_quick(module):
    pytest.importorskip("matplotlib")
    changed = {"answers_exact": False, "answers_near_ties": 7, "least_lead": -0.0123, "quick": True}
    text = module("beside_report").markdown(results(module, **changed), "a.png", "b.png")
    assert "but for 7, which differ where the likeliest tokens are nearly tied (the farthest 0.0123 of" in text
    assert "no figure here says anything about speed" in text


def test_a_file_without_a_run_is_refused(module, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["beside_report.py", str(path)])
    with pytest.raises(SystemExit) as caught:
        module("beside_report").main()
    assert caught.value.code == 2


# ---- conditions --------------------------------------------------------------------------------------------------


def test_conditions_name_machine_versions_and_commit_and_no_host(module):
    import platform

    found = module("conditions").conditions(torch.device("cpu"))
    text = module("report_text").header(found)
    assert f"torch {torch.__version__}" in text
    assert found["machine_info"]["gpu"] is None
    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4
