"""A process that is refused the tiles of AMX, as in a sandbox, goes on without them."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import run_python

from poc_kernels.kernels import cpu, native

if native.load() is None:
    pytest.skip("this installation has no native core", allow_module_level=True)
if platform.system() != "Linux" or platform.machine() != "x86_64":
    pytest.skip("tiles are asked for on Linux with x86-64 only", allow_module_level=True)

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")

SERVES_WITHOUT = """
import ctypes, errno, torch
from poc_kernels import RandomProjection, backends, use_backend
from poc_kernels.kernels import cpu

libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(158, 0x1023, 18) == -1 and ctypes.get_errno() == errno.EPERM, "the filter is on"
assert not dict(cpu.instruction_sets()).get("amx", False)
x = torch.randn(3, 100)
projection = RandomProjection.from_block_hash("0x1", dim=100)
y = projection.pre(x)
print(backends.select(torch.device("cpu")).name)
with use_backend("reference"):
    assert torch.equal(projection.pre(x), y)
"""


@pytest.fixture(scope="module")
def tile_support(tmp_path_factory):
    """tests/sanitize/tile_support.cpp as a program."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler {COMPILER}")
    program = tmp_path_factory.mktemp("tiles") / "tile_support"
    source = ROOT / "tests" / "sanitize" / "tile_support.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-I", ROOT / "csrc", source, "-o", program], check=True)
    return program


def test_tiles_are_used_only_with_all_that_they_take(tile_support):
    done = subprocess.run([tile_support], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "no filter" in done.stdout:
        pytest.skip("this system takes no filter of system calls; all else was tested")
    assert "a process that is refused them goes on without\n" in done.stdout


def test_a_process_that_is_refused_tiles_is_served_by_another_backend(tile_support, tmp_path):
    if subprocess.run([tile_support, "true"]).returncode == 77:
        pytest.skip("this system takes no filter of system calls")
    best = next(name for name, supported in cpu.instruction_sets() if supported and name != "amx")
    assert run_python(SERVES_WITHOUT, tmp_path, launcher=[str(tile_support)]) == f"native-{best}"
