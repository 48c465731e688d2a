"""The figures of a run, what they say about the goals, and the report."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from bench_conditions import conditions

from bench.interference import load, prefill
from bench.interference import results as figures


def request_of(first, gaps, due=100.0):
    times = due + first + np.concatenate([[0.0], np.cumsum(gaps)])
    return SimpleNamespace(due=due, submitted=due + 0.001, times=list(times))


def block_of(requests=(), nonces=0.0, seconds=10.0, **changes):
    fields = {"begin": 100.0, "refused": 0, "tokens": 50, "slices": [], "step_waits": [], "slice_waits": [], **changes}
    return load.Block(seconds=seconds, requests=list(requests), nonces=nonces, **fields)


def test_percentiles_say_how_many_samples_they_rest_on():
    summary = figures.summary([np.arange(1, 101), np.arange(101, 1001)])
    assert summary["samples"] == 1000
    assert (summary["p50"], summary["p99"]) == pytest.approx((500.5, 990.01))
    assert summary["above_p99"] == 10
    assert (summary["quantiles"][0], summary["quantiles"][-1]) == (1, 1000)
    assert figures.summary([]) is None


def steps_block(generator, slower=1.0, seconds=10.0, rate=20.0):
    """Requests of 31 gaps that share those of the steps they are in, each 10 ms long or, one in 50, 3 times as long."""
    steps = 0.01 * slower * np.where(generator.random(int(2 * seconds / 0.01)) < 0.02, 3.0, 1.0)
    steps *= generator.uniform(0.9, 1.1, len(steps))
    times = 100.0 + np.cumsum(steps)
    requests = []
    for due in 100.0 + np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds))):
        first = np.searchsorted(times, due)
        requests.append(SimpleNamespace(due=due, submitted=due, times=list(times[first : first + 32])))
    return block_of(requests, seconds=seconds)


def test_ratios_are_those_of_percentiles():
    ratios = figures.ratios
    alone = [request_of(0.02, [0.01] * 31, due=100.0 + at) for at in range(10)]
    doubled = [request_of(0.03, [0.02] * 31, due=100.0 + at) for at in range(10)]
    both, blocks = [block_of(doubled)] * 2, [block_of(alone)] * 2
    found = ratios(both, blocks, 0)
    for percentile in ("p50", "p95", "p99"):
        assert found["first"][percentile] == pytest.approx([1.5] * 3)
        assert found["between"][percentile] == pytest.approx([2.0] * 3)
    assert found == ratios(both, blocks, 0)
    assert ratios([block_of()], blocks[:1], 0) is None


def test_the_interval_holds_the_ratio_where_requests_share_steps_and_blocks_drift():
    """Of conditions that are alike, on a machine whose speed changes by 5 % from block to block."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(25):
        sides = [[steps_block(generator, generator.normal(1.0, 0.05)) for _ in range(5)] for _ in range(2)]
        _, low, high = figures.ratios(*sides, 0)["between"]["p99"]
        inside += low <= 1.0 <= high
    assert inside >= 20  # 95 % would be 24; with five rounds it is rough


def measured(gap=0.01, first=0.02, nonces=50.0, share=0.1):
    """A rate's cells: chat alone has tokens each 10 ms, validation alone 10 nonces a second."""
    alone = [request_of(0.02, [0.01] * 31) for _ in range(20)]
    both = [request_of(first, [gap] * 31) for _ in range(20)]
    name = "both" if share == 0.1 else "another"
    blocks = {
        load.Condition("chat alone", validation=False): [block_of(alone)],
        load.Condition(name, share=share): [
            block_of(both, nonces, slices=[0.001, 0.003], step_waits=[0.5], slice_waits=[0.1])
        ],
        load.Condition("validation alone", chat=False): [block_of(nonces=60.0), block_of(nonces=140.0)],
    }
    return figures.cells(blocks, 0)


def test_cells_have_rates_and_shares_of_their_own_rate():
    alone, both, solo = measured(gap=0.0125)
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


def counted(**changes):
    names = ("steps", "steps_followed", "tokens", "step_seconds", "slices", "slice_seconds", "seconds_between_steps")
    return dict.fromkeys(names, 0.0) | {"seconds": 10.0} | changes


def test_what_the_engine_counted_gives_the_bound_of_validation():
    steps = {"steps": 200, "steps_followed": 160, "tokens": 500, "step_seconds": 1.6}
    slices = {"slices": 400, "slice_seconds": 0.8, "seconds_between_steps": 0.2}
    blocks = {
        load.Condition("chat alone", validation=False): [
            block_of([request_of(0.02, [0.01])], counters=counted(**steps)) for _ in range(2)
        ],
        load.Condition("both", share=0.1): [
            block_of([request_of(0.02, [0.01])], 10.0, counters=counted(**steps, **slices)) for _ in range(2)
        ],
        load.Condition("validation alone", chat=False): [block_of(nonces=40.0, counters=counted())],
    }
    alone, both, solo = figures.cells(blocks, 0)
    assert alone["engine"]["step_seconds"] == pytest.approx(0.01)
    assert alone["engine"]["steps_share"] == pytest.approx(0.2)  # with those that no other followed
    assert figures.bound(alone) == pytest.approx(0.8)
    assert both["engine"]["tokens_per_step"] == 2.5
    assert both["engine"]["seconds_before_steps"] == pytest.approx(0.001)
    assert both["engine"]["slices_share"] == pytest.approx(0.08)
    assert both["engine"]["slices_share_before_steps"] == pytest.approx(0.02)
    assert (solo["engine"]["step_seconds"], solo["engine"]["slice_seconds"]) == (None, None)
    assert figures.bound(measured()[0]) is None


@pytest.mark.parametrize(
    ("rate", "changes", "ratio", "met"),
    [
        ("light", {"gap": 0.0124, "first": 0.0249, "nonces": 50}, 0.9, [True, True, True, None, None, None, True]),
        ("light", {"gap": 0.0126, "first": 0.0251, "nonces": 39}, 0.89, [False] * 3 + [None] * 3 + [False]),
        (figures.STEADY, {"nonces": 50}, None, [None, None, None, True, True, True]),
    ],
)
def test_goals_of_vllm_are_judged_at_two_rates_and_against_prompts_alone(rate, changes, ratio, met):
    run = run_of(measured(**changes), rate=rate) | {"engine": "vllm"}
    run["prefill"] = None if ratio is None else {"ratio": [ratio, 0.8, 1.0]}
    assert [verdict.met for verdict in figures.judge(run)] == met


def test_a_figure_whose_interval_does_not_meet_the_goal_shows_nothing():
    cells = measured(gap=0.012, nonces=50)
    run = run_of(cells)
    ratios = next(cell for cell in cells if cell["condition"] == "both")["ratios"]["between"]
    ratios["p99"] = [1.2, 1.1, 1.3]
    assert [verdict.met for verdict in figures.judge(run)] == [None, True]
    ratios["p99"] = [1.3, 1.2, 1.4]
    assert [verdict.met for verdict in figures.judge(run)] == [False, True]


def test_proofs_and_prompts_are_compared_round_by_round():
    rounds = [{"proof_tokens_per_second": 90.0 * speed, "tokens_per_second": 100.0 * speed} for speed in (1, 2, 5)]
    assert prefill.ratio_of(rounds) == pytest.approx([0.9] * 3)
    rounds[0]["proof_tokens_per_second"] = 60.0
    ratio, low, high = prefill.ratio_of(rounds)
    assert (ratio, low, high) == pytest.approx((0.9, 0.6, 0.9))


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
def test_goals_are_judged_by_the_default_pacing_at_their_rate(device, rate, changes, met):
    verdicts = figures.judge(run_of(measured(**changes), device, rate))
    assert [verdict.met for verdict in verdicts] == met


def results(**changes):
    run = {
        **run_of(measured(gap=0.02)),
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
    return {figures.KEY: run, **conditions()}


def test_the_report_has_tables_plots_and_verdicts(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench.interference import report

    path = tmp_path / "run.json"
    path.write_text(json.dumps(results()))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    report.main()
    for name in ("run.png", "run-tradeoff.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "run.md").read_text()
    assert "| p99 of time between tokens, light rate | at most 1.25 of chat alone | 2.000" in text
    assert "**missed**" in text
    assert "| validation while users are served, light rate | at least 40% of its solo rate | 50.0% | **met** |" in text
    both = next(line for line in text.splitlines() if line.startswith("| both |"))
    assert "| 20 / 20 / 20 |" in both
    assert "2.00 (2.00 to 2.00)" in both
    assert "50.0 %" in both
    assert "2 slices of the forward, the longest 1.9 ms" in text
    assert "equal to those generated alone, token for token" in text
    assert "quick run" not in text


def test_the_report_says_what_differs_at_near_ties_and_what_is_quick():
    pytest.importorskip("matplotlib")
    from bench.interference import report

    changed = {"answers_exact": False, "answers_near_ties": 7, "least_lead": -0.0123, "quick": True}
    text = report.markdown(results(**changed), "a.png", "b.png")
    assert "except 7, which differ where the likeliest tokens are nearly tied (the farthest 0.0123 of" in text
    assert "no figure here says anything about speed" in text


def test_a_file_without_a_run_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench.interference import report

    path = tmp_path / "run.json"
    path.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(SystemExit) as caught:
        report.main()
    assert caught.value.code == 2
