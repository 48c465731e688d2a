"""What a result file says of its machine, versions and commit; `report_text.header` turns it into text."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from poc_kernels import backends

LOAD_BEFORE = os.getloadavg()[0]  # read at import: the run itself raises it
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> dict[str, str]:
    """Return what Linux tells of the first CPU, its name and flags included."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines[: lines.index("")] if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _operating_system() -> str:
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except OSError:
        return kernel


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": "unknown" if driver is None else driver.splitlines()[0].strip(),
        "cuda": torch.version.cuda,
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """Describe what decides the times of calls on ``device``; the host's name is no part of it."""
    cpu = _cpu()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "logical_cores": os.cpu_count(),
        "bfloat16_instructions": sorted(_BFLOAT16_FLAGS & set(flags)),
        "backend": backends.select(device).name,
        "threads": torch.get_num_threads(),
        "load_before": LOAD_BEFORE,
        "os": _operating_system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "gpu": _gpu() if device.type == "cuda" else None,
    }


def conditions(device: torch.device) -> dict[str, Any]:
    """Return machine_info, commit_info and datetime of a run on ``device``, as pytest-benchmark writes them."""
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "machine_info": machine_info(device),
        "commit_info": {"id": _output("git", "rev-parse", "HEAD") or "unknown", "dirty": bool(changes)},
        "datetime": datetime.now(timezone.utc).isoformat(),
    }
