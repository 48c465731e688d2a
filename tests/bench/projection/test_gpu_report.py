"""The report of a run on a GPU."""

import json
import sys

import pytest
from bench_conditions import conditions

pytest.importorskip("matplotlib")

from bench.projection import gpu_report as report

SPREAD = {"median": 2.0, "p10": 1.5, "p90": 2.5}


def seconds(value):
    return {"median": value, "p10": value, "p90": value}


def entry(size, rows, **changes):
    info = {
        "D": size,
        "M": rows,
        "backend": "triton",
        "cold": rows <= 64,
        "graphs": True,
        "rounds": 9,
        "seconds": {"op_16": seconds(2e-3), "op_8": seconds(1e-3), "stored": seconds(4e-3), "normals": seconds(9e-3)},
        "speedups": {"op_16": SPREAD, "op_8": {**SPREAD, "median": 4.0}, "normals": SPREAD},
        "kernels": {
            "op_16": {"quantise_kernel": 1e-3, "product_kernel": 3e-3},
            "op_8": {"quantise_kernel": 1e-3, "product_kernel": 1e-3},
        },
        "workspace": {"op_16": 2048, "op_8": None},
        "held": {"op": 0, "stored": 2 * size * size},
    }
    return {"group": "projection-gpu", "extra_info": {**info, **changes}, "stats": {}}


def results(*entries):
    bounds = {
        "D": 8192,
        "generation_seconds": 6e-3,
        "copy_bytes_per_second": 4e12,
        "product_multiply_adds_per_second": 4e14,
    }
    gpu = {"name": "GPU", "memory_bytes": 2**36, "compute_capability": "9.0", "driver": "1", "cuda": "13.0"}
    return {
        "benchmarks": [*entries, {"group": "bounds-gpu", "extra_info": bounds, "stats": {}}],
        **conditions(backend="triton", triton="3.6.0", gpu=gpu),
    }


def test_shares_are_of_the_tighter_ceiling():
    profiled_one = {"op_16": {"quantise_kernel": 1e-3, "product_kernel": 3e-3}, "op_8": {}}
    (few, many), bounds = report.read(results(entry(8192, 4096), entry(8192, 1, kernels=profiled_one)))
    assert (few.rows, many.rows) == (1, 4096)
    assert few.share_of_ceiling("stored", bounds) == pytest.approx((2 * 8192**2 + 4 * 8192) / 4e12 / 4e-3)
    assert many.share_of_ceiling("op_16", bounds) == pytest.approx(4096 * 8192**2 / 4e14 / 2e-3)
    assert many.share_of_ceiling("op_8", bounds) == pytest.approx(0.5 * 4096 * 8192**2 / 4e14 / 1e-3)
    assert few.quantise_share("op_16") == 0.25
    assert few.quantise_share("op_8") is None
    assert many.quantise_share("op_8") == 0.5


def test_goals_are_judged_by_the_slowest_case_and_not_without_one():
    slow = {"op_16": {**SPREAD, "median": 0.7}, "op_8": SPREAD, "normals": SPREAD}
    cases, _ = report.read(results(entry(4096, 4096, speedups=slow), entry(8192, 2048)))
    lines = report.goals(cases)
    assert "not measured" in lines[0]
    assert "NOT met, at worst 0.70 of 2 cases (D = 4096, M = 4096)" in lines[2]
    assert "met, at worst 2.00" in lines[3]


def test_parts_of_k_are_a_table_of_their_own():
    measured = {"1": seconds(4e-3), "2": seconds(3e-3), "4": seconds(2.5e-3)}
    parts = [
        {
            "group": "splits-gpu",
            "extra_info": {"D": 8192, "M": rows, "rounds": 7, "seconds": {"op_16": measured, "op_8": measured}},
        }
        for rows in (64, 16)
    ]
    text = report.markdown(results(entry(8192, 1), *parts), "a.png")
    assert "| D | M | op, bits | K / 1, ms | K / 2, ms | K / 4, ms | rounds |" in text
    assert "| 8192 | 16 | 16 | 4 | 3 | 2.5 | 7 |\n| 8192 | 16 | 8 | 4 | 3 | 2.5 | 7 |\n| 8192 | 64 |" in text
    printed = report.short(results(entry(8192, 1), *parts)).splitlines()
    assert [line.split() for line in printed].count(["8192", "64", "8", "4", "3", "2.5", "7"]) == 1
    assert "K in parts" not in report.markdown(results(entry(8192, 1)), "a.png")


def test_times_are_held_against_the_model_of_an_h200():
    pytest.importorskip("triton")
    from bench.projection import model

    predicted = model.call(8192, 8192, 16).total
    measured = {**entry(8192, 8192)["extra_info"]["seconds"], "op_16": seconds(2 * predicted)}
    text = report.markdown(results(entry(8192, 8192, seconds=measured)), "a.png")
    (row,) = [
        line for line in text.splitlines() if line.startswith(f"| 8192 | 8192 | {report.milliseconds(predicted)} |")
    ]
    assert row.split("|")[4].strip() == "2.00"
    other = results(entry(8192, 8192))
    other["machine_info"]["gpu"]["compute_capability"] = "8.0"
    assert "model" not in report.markdown(other, "a.png")


def test_the_report_is_written_beside_its_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    normals = {"op_16": SPREAD, "op_8": SPREAD, "normals": {"median": 0.4, "p10": 0.3, "p90": 0.5}}
    path.write_text(json.dumps(results(entry(8192, 1, speedups=normals), entry(8192, 4096, graphs=False))))
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(path)])
    report.main()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "run.md").read_text()
    assert "| 8192 | 1 (cold) | 2 | 1 | 4 | 9 | 2.00 (1.50-2.50) | 2.00 (1.50-2.50) | 0.40 (0.30-0.50) | 5 |" in text
    assert "quantise / op 8 |" in text
    assert "| 0.25 | 0.5 | 128 MiB | 0 bytes | 2 KiB | 9 |" in text
    assert "these calls are from Python" in text
    printed = capsys.readouterr().out
    assert "NOT met, at worst 2.00 of 1 cases (D = 8192, M = 1)" in printed
    assert printed.splitlines()[2].split() == ["8192", "1", "4", "2", "2.00", "1", "2.00", "9", "0.40"]
