"""The report of a round's overhead: its figures, and what it says of the goals."""

import json
import sys

import pytest
from bench_conditions import conditions

from bench.round import results as figures


def batch(seconds, projection=0.0, layers=None):
    rest = seconds - projection
    parts = {"inputs": 0.1 * rest, "projection": projection, "forward": 0.8 * rest, "distance": 0.1 * rest}
    return {"seconds": seconds, "parts": parts, "layers": layers}


def entry(off, on, **changes):
    info = {
        "model": "qwen3-8b",
        "layers": 36,
        "whole_layers": 36,
        "parameters": 8_190_000_000,
        "hidden_size": 4096,
        "vocab_size": 151936,
        "batch_size": 2,
        "seq_len": 64,
        "dtype": "float32",
        "device": "cpu",
        "backend": "reference",
        "threads": 2,
        "warnings": [],
        "off": off,
        "on": on,
        "memory": {"held": 8, "result": 2**21, "workspace": 3 * 2**20, "stored": 2**26},
        **changes,
    }
    return {"group": "round", "extra_info": info}


def results(*entries, gpu=None):
    return {
        "benchmarks": [*entries, {"group": "projection", "extra_info": {}}],
        **conditions(gpu=gpu),
    }


def drifting(extra, projection, noise=(0.0,) * 8, **changes):
    """Eight batches on a machine that slows down steadily; the projection adds ``extra`` seconds to each."""
    off = [batch(1.0 + 0.02 * at) for at in range(9)]
    on = [batch(1.01 + 0.02 * at + extra + added, projection) for at, added in enumerate(noise)]
    return entry(off, on, **changes)


def only_case(recorded):
    return figures.read_cases(results(recorded))[0]


def test_the_difference_is_free_of_steady_drift():
    case = only_case(drifting(extra=0.004, projection=0.004))
    assert case.differences == pytest.approx([0.004] * 8)
    assert tuple(case.difference) == pytest.approx((0.004, 0.004, 0.004))
    assert not case.difference.below_noise
    assert case.relative_difference.median == pytest.approx(0.004 / 1.08)


def test_the_interval_is_that_of_the_sign_test():
    """Of 8 differences the smallest and the largest enclose the median with 99.2 %, the next ones with only 93 %."""
    noise = [-0.03, 0.01, 0.02, -0.01, 0.05, 0.0, -0.02, 0.03]
    case = only_case(drifting(extra=0.0, projection=0.0, noise=noise))
    assert (case.difference.low, case.difference.high) == pytest.approx((-0.03, 0.05))
    assert case.difference.below_noise


def test_too_few_batches_are_refused():
    recorded = entry([batch(1.0)] * 6, [batch(1.0)] * 5)
    with pytest.raises(ValueError, match="at least 6 batches with the projection, got 5"):
        _ = only_case(recorded).difference


def test_the_whole_model_is_computed_from_the_time_of_its_layers():
    """2 of 36 layers take 0.5 s: the others add 8.5 s."""
    off, on = [batch(1.0, layers=0.5)] * 7, [batch(1.02, projection=0.02, layers=0.5)] * 6
    part, whole = figures.read_cases(results(entry(off, on, layers=2)))
    assert not part.is_whole
    assert not part.computed
    assert whole.is_whole
    assert whole.computed
    assert [b.seconds for b in whole.off] == pytest.approx([9.5] * 7)
    assert part.share.median == pytest.approx(0.02 / 1.02)
    assert whole.share.median == pytest.approx(0.02 / 9.52)
    assert whole.on[0].parts["forward"] == pytest.approx(0.8 + 8.5)
    assert whole.difference == part.difference
    assert whole.relative_difference.median == pytest.approx(0.02 / 9.5)


def test_a_whole_model_needs_times_of_layers():
    with pytest.raises(ValueError, match="layers of qwen3-8b must have been timed"):
        figures.read_cases(results(drifting(0.0, 0.0, layers=2)))


def test_goals_are_for_whole_models_and_the_second_for_large_ones_on_a_gpu():

    def goals_of(**changes):
        case = only_case(drifting(0.0, 0.0, **changes))
        return [goal for goal in figures.GOALS if figures.applies(goal, case)]

    assert goals_of() == [figures.EVERYWHERE]
    assert goals_of(device="cuda") == [figures.EVERYWHERE, figures.LARGE_ON_GPU]
    assert goals_of(device="cuda", parameters=600_000_000) == [figures.EVERYWHERE]
    part = entry([batch(1.0, layers=0.5)] * 7, [batch(1.0, layers=0.5)] * 6, layers=2)
    assert not figures.applies(figures.EVERYWHERE, only_case(part))


@pytest.mark.parametrize(
    ("extra", "projection", "noise", "met", "reason"),
    [
        (0.02, 0.02, (0.0,) * 8, True, "by the share; the measured difference confirms it"),
        (0.02, 0.02, (-0.2, 0.2) * 4, True, "by the share; the measured difference is too noisy to confirm it"),
        (0.20, 0.02, (0.0,) * 8, False, "the share is under it, the measured difference is not"),
        (0.06, 0.06, (0.0,) * 8, False, "the share is not under it"),
    ],
)
def test_a_goal_is_judged_by_the_share_and_the_difference(extra, projection, noise, met, reason):
    case = only_case(drifting(extra, projection, noise))
    assert tuple(figures.judge(figures.EVERYWHERE, case)) == (met, reason)


def test_a_share_that_is_over_the_goal_at_times_is_said():
    on = [batch(1.0, projection=0.08 if at in (2, 5) else 0.01) for at in range(8)]
    verdict = figures.judge(figures.EVERYWHERE, only_case(entry([batch(1.0)] * 9, on)))
    assert verdict.met
    assert "over it" in verdict.reason


def test_the_report_says_what_is_computed_below_the_noise_and_not_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench.round import report

    part = entry([batch(1.0, layers=0.5)] * 7, [batch(1.0, projection=0.02, layers=0.5)] * 6, layers=2)
    small = drifting(0.02, 0.02, model="demo", warnings=["something was slow"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results(part, small)))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    report.main()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "run.md").read_text().splitlines()

    def rows(start):
        return [line for line in lines if line.startswith(start)]

    assert "below the noise" in rows("| qwen3-8b, 2 of 36 layers |")[0]
    assert "as measured" in rows("| qwen3-8b, all 36 layers, **computed** |")[0]
    assert "below the noise" not in rows("| demo, all 36 layers |")[0]
    five, half = rows("| under 5 % always | qwen3"), rows("| under 0.5 %")
    assert len(five) == 1
    assert "computed** | 0.211 %" in five[0]
    assert "**met**" in five[0]
    assert half == ["| under 0.5 % at 7B shapes on a GPU | none in this run |  |  | not measured |"]
    assert "| qwen3-8b | 4096 | 0 | 8 bytes | 2 MiB | 3 MiB | 64 MiB |" in lines
    assert "- demo: something was slow" in lines


def test_the_report_of_a_gpu_names_it():
    pytest.importorskip("matplotlib")
    from bench.round import report

    gpu = {"name": "a GPU", "memory_bytes": 80 * 2**30, "compute_capability": "9.0", "driver": "1.2", "cuda": "12.8"}
    recorded = results(drifting(0.002, 0.002, device="cuda", dtype="bfloat16"), gpu=gpu)
    text = report.markdown(recorded, "run.png")
    assert "- GPU: a GPU, 80 GiB, compute capability 9.0, driver 1.2, CUDA 12.8" in text
    assert "| under 0.5 % at 7B shapes on a GPU | qwen3-8b, all 36 layers | 0.185 % |" in text


def test_a_file_without_rounds_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench.round import report

    path = tmp_path / "run.json"
    path.write_text(json.dumps(results()))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(SystemExit) as caught:
        report.main()
    assert caught.value.code == 2
