"""What a result file says of its machine and commit: what a reader needs, and no name of the host."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from poc_kernels import backends

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}
_LOAD_BEFORE = os.getloadavg()[0]  # read at import: the run itself raises it


def _operating_system() -> str:
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except OSError:
        return kernel


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep the processor and Python, add what else decides the times; host and kernel build names go."""
    cpu = machine_info["cpu"]
    kept = {
        "cpu": cpu.get("brand_raw", "unknown"),
        "architecture": machine_info["machine"],
        "logical_cores": cpu["count"],
        "bfloat16_instructions": sorted(_BFLOAT16_FLAGS & set(cpu.get("flags", []))),
        "backend": backends.select(torch.device("cpu")).name,
        "threads": torch.get_num_threads(),
        "load_before": _LOAD_BEFORE,
        "os": _operating_system(),
        "python": f"{machine_info['python_implementation']} {machine_info['python_implementation_version']}",
        "torch": torch.__version__,
    }
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep the commit; the name of the folder, of the branch and messages of git go."""
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]
