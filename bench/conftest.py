"""What a result file says of its machine and commit: what a reader needs, and no name of the host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from typing import Any

import pytest
import torch

from poc_kernels import backends

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}
_LOAD_BEFORE = os.getloadavg()[0]  # read at import: the run itself raises it
_STARTED = time.monotonic()


def _operating_system() -> str:
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except OSError:
        return kernel


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    """Keep the processor and Python, add what else decides the times; host and kernel build names go."""
    cpu = machine_info["cpu"]
    device = torch.device(config.getoption("--bench-device"), 0)
    kept = {
        "cpu": cpu.get("brand_raw", "unknown"),
        "architecture": machine_info["machine"],
        "logical_cores": cpu["count"],
        "bfloat16_instructions": sorted(_BFLOAT16_FLAGS & set(cpu.get("flags", []))),
        "backend": backends.select(device).name,
        "threads": torch.get_num_threads(),
        "load_before": _LOAD_BEFORE,
        "os": _operating_system(),
        "python": f"{machine_info['python_implementation']} {machine_info['python_implementation_version']}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "gpu": _gpu() if device.type == "cuda" else None,
    }
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep the commit; the name of the folder, of the branch and messages of git go."""
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]
