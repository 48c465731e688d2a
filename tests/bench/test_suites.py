"""The suites themselves: the order of their cases, and what they leave out when time is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import poc_kernels

pytest.importorskip("pytest_benchmark")


def test_the_cases_that_goals_are_about_come_first(module, monkeypatch):
    monkeypatch.delenv("POC_BENCH_QUICK", raising=False)
    suite, report = module("test_projection_gpu"), module("gpu_report")
    goals = [any(goal[2](Shape(*case)) for goal in report._GOALS) for case in suite.CASES]
    assert goals == sorted(goals, reverse=True)
    assert [size for size, _ in suite.CASES[:7]] == [8192] * 7
    assert [rows for _, rows in suite.CASES[:7]] == [1, 8, 32, 64, 4096, 8192, 16384]
    assert len(suite.CASES) == len(set(suite.CASES)) == 45


class Shape:
    """What a goal asks of a case."""

    def __init__(self, size, rows):
        self.size, self.rows = size, rows


@pytest.mark.parametrize(("seconds", "skipped"), [(0, 1), (300, 0)])
def test_cases_without_time_are_skipped(module, tmp_path, seconds, skipped):
    suite = module("gpu_check").BENCH / "test_projection_gpu.py"
    options = ["-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", "-rs", "-k", "bounds", "--benchmark-disable"]
    environment = {
        "PYTHONPATH": str(Path(poc_kernels.__file__).parents[1]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "POC_BENCH_QUICK": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(suite), *options, f"--bench-seconds={seconds}"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert len(re.findall("^SKIPPED.*out of time", done.stdout, re.MULTILINE)) == skipped
    assert len(re.findall("^SKIPPED.*checked, not timed", done.stdout, re.MULTILINE)) == 1 - skipped
