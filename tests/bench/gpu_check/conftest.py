"""Checks whose steps are those of a test."""

import pytest
from bench_processes import FIRST_INTERRUPT, KILL, LogClock

from bench.gpu_check import steps


@pytest.fixture
def make_check(tmp_path):
    def make(plan, total=60.0, grace=1.0, elapsed=0.0):
        return steps.Check(tmp_path, "cpu", plan, total, grace, elapsed)

    return make


@pytest.fixture
def make_watched(make_check, tmp_path, monkeypatch):
    """A check of one step, interrupted at 90 s and at 105 s and killed at 120 s of a clock that its log sets."""

    def make(name, moments):
        monkeypatch.setattr(steps, "time", LogClock(tmp_path / f"{name}.log", moments))
        return make_check({name: KILL}, total=KILL, grace=KILL - FIRST_INTERRUPT)

    return make
