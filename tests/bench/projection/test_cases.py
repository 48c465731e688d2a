"""The cases of the suites: their order, and which are left out when time is short."""

import importlib
import re
import subprocess
import sys

import pytest
from bench_processes import ROOT, with_package

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from bench.projection import gpu_report, test_gpu


def test_the_cases_that_goals_are_about_come_first(monkeypatch):
    monkeypatch.delenv("POC_BENCH_QUICK", raising=False)
    suite = importlib.reload(test_gpu)
    goals = [any(goal[2](Shape(*case)) for goal in gpu_report._GOALS) for case in suite.CASES]
    assert goals == sorted(goals, reverse=True)
    assert [size for size, _ in suite.CASES[:7]] == [8192] * 7
    assert [rows for _, rows in suite.CASES[:7]] == [1, 8, 32, 64, 4096, 8192, 16384]
    assert len(suite.CASES) == len(set(suite.CASES)) == 45


class Shape:
    """What a goal asks of a case."""

    def __init__(self, size, rows):
        self.size, self.rows = size, rows


@pytest.mark.parametrize(("seconds", "skipped"), [(0, 1), (300, 0)])
def test_cases_without_time_are_skipped(tmp_path, seconds, skipped):
    suite = ROOT / "bench" / "projection" / "test_gpu.py"
    options = ["-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", "-rs", "-k", "bounds", "--benchmark-disable"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(suite), *options, f"--bench-seconds={seconds}"],
        cwd=tmp_path,
        env=with_package(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", POC_BENCH_QUICK="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert len(re.findall("^SKIPPED.*out of time", done.stdout, re.MULTILINE)) == skipped
    assert len(re.findall("^SKIPPED.*checked, not timed", done.stdout, re.MULTILINE)) == 1 - skipped
