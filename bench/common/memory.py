"""Memory: what a device has free, and what a call of the op takes beyond its result."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import poc_kernels

_GROWTH = """
import ctypes, sys
import torch
import poc_kernels

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

rows, features, threads, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
torch.set_num_threads(threads)
seed = poc_kernels.seed_tensor(1)
poc_kernels.residual_projection(torch.ones(8, 64, dtype=dtype), seed)  # backends are tried, threads started
x = torch.ones(rows, features, dtype=dtype)
ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # the peak so far is forgotten
before = status("VmRSS")
y = poc_kernels.residual_projection(x, seed)
print(max(0, status("VmHWM") - before - y.nbytes))
"""


def available(device: torch.device) -> int:
    """Return the bytes that can be taken on ``device``, without swapping on a CPU; frees what is unused first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kibibytes)


def workspace(rows: int, features: int, dtype: torch.dtype, device: torch.device, directory: Path) -> int:
    """Return the bytes that ``residual_projection`` of x [rows, features] takes during a call, beyond its result.

    On a CPU this is the growth of the peak of a fresh process, run in ``directory``; on a GPU that of torch's
    allocator.
    """
    if device.type == "cuda":
        seed = poc_kernels.seed_tensor(1, device)
        x = torch.ones(rows, features, dtype=dtype, device=device)
        poc_kernels.residual_projection(x[:8], seed)  # backends are tried
        return workspace_cuda(lambda: poc_kernels.residual_projection(x, seed), device)
    arguments = [rows, features, torch.get_num_threads(), str(dtype).removeprefix("torch.")]
    # Every block of a page or more comes from the system and goes back to it, so that it shows.
    environment = {"PYTHONPATH": str(Path(poc_kernels.__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "4096"}
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process whose memory is measured failed: {done.stderr}")
    return int(done.stdout)


def workspace_cuda(call: Callable[[], Tensor], device: torch.device) -> int:
    """Return the bytes of torch's allocator on a GPU that ``call`` takes while it runs, beyond its result."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = call()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before - y.nbytes)
