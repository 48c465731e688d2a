"""Options of the suites, and what their result files say of machine and commit."""

from __future__ import annotations

import time
from typing import Any

import conditions
import pytest
import torch

_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where suites run, for how long, and the cases of the round; test_projection_speed always takes the CPU."""
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-device", choices=["cpu", "cuda"], default="cpu", help="where the calls run")
    group.addoption("--bench-dtype", choices=["float32", "bfloat16", "float16"], help="float32; bfloat16 on a GPU")
    group.addoption("--bench-cases", help="MODEL[:LAYERS]@BATCHxSEQ,... with MODEL demo, qwen3-0.6b or qwen3-8b")
    group.addoption("--bench-seconds", type=float, help="cases that would begin later than this are skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a GPU that is not there."""
    if config.getoption("--bench-device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: torch finds no CUDA device")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what --bench-seconds leaves no time for."""
    seconds = item.config.getoption("--bench-seconds")
    if seconds is not None and time.monotonic() - _STARTED > seconds:
        pytest.skip(f"--bench-seconds {seconds:g}: out of time")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What decides the times, in place of what the plugin says; host and kernel build names go."""
    machine_info.clear()
    machine_info.update(conditions.machine_info(torch.device(config.getoption("--bench-device"), 0)))


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep the commit; the name of the folder, of the branch and messages of git go."""
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]
