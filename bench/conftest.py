"""Options of the suites that pytest runs, and what their result files say of machine and commit."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # pytest 8.0 does not find `bench` by itself

from bench.common import conditions

_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options: where suites run, for how long, and the cases of the round. The CPU suite ignores the device."""
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
    """Skip a case that would begin after --bench-seconds."""
    seconds = item.config.getoption("--bench-seconds")
    if seconds is not None and time.monotonic() - _STARTED > seconds:
        pytest.skip(f"--bench-seconds {seconds:g}: out of time")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace what the plugin says by what decides the times; names of the host and of kernel builds go."""
    machine_info.clear()
    machine_info.update(conditions.machine_info(torch.device(config.getoption("--bench-device"), 0)))


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep the commit; names of the folder and the branch go, and messages of git."""
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]
