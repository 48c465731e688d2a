"""The package as a whole: what importing it does, and what a process may do around its calls."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import CPU, assert_same_bits, expected, rows_of_every_kind, run_python

import poc_kernels
from poc_kernels import backends
from poc_kernels.kernels import self_test

IMPORT = """
import torch

def touched(*arguments, **options):
    raise SystemExit("importing the package touched a GPU")

torch.cuda._lazy_init = torch.cuda.init = torch.cuda.device_count = torch.cuda.is_available = touched
import poc_kernels
from poc_kernels import backends
from poc_kernels.kernels import trial
assert not torch.cuda.is_initialized()
assert not backends._selected and not trial.verdicts, "importing the package chose a backend"
print("imported")
"""

PROJECT = """
import warnings
import torch
import poc_kernels
from poc_kernels import backends
from poc_kernels.kernels import self_test
x = torch.arange(-100, 140).reshape(6, 40) / 7
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = poc_kernels.residual_projection(x, poc_kernels.seed_tensor(7))
print(len(caught), *(w.category.__name__ for w in caught), backends.select(x.device).name, self_test.digest(y))
"""


def digest_here():
    x = torch.arange(-100, 140).reshape(6, 40) / 7
    return self_test.digest(expected(x))


def test_importing_touches_no_gpu_and_chooses_no_backend(tmp_path):
    assert run_python(IMPORT, tmp_path) == "imported"


def test_a_fresh_process_gives_the_same_bits_without_a_warning(tmp_path):
    best = next(backend.name for backend in backends.backends() if backend.unavailable(CPU) is None)
    warned = "0 " if best != "reference" else "1 RuntimeWarning "
    assert run_python(PROJECT, tmp_path) == f"{warned}{best} {digest_here()}"


def test_a_package_without_its_native_core_warns_once_and_gives_the_same_bits(tmp_path):
    without = tmp_path / "without"
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(Path(poc_kernels.__file__).parent, without / "poc_kernels", ignore=ignored)
    printed = run_python(PROJECT, tmp_path, package_root=without)
    assert printed == f"1 RuntimeWarning reference {digest_here()}"


def test_the_environment_of_a_process_names_the_backend(tmp_path):
    printed = run_python(PROJECT, tmp_path, POC_KERNELS_BACKEND="reference")
    assert printed.split()[-2:] == ["reference", digest_here()]


def test_the_package_runs_as_a_module_with_the_status_of_its_command(tmp_path):
    root = Path(poc_kernels.__file__).parents[1]
    version, nothing = (
        subprocess.run(
            [sys.executable, "-m", "poc_kernels", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        for arguments in (["--version"], [])
    )
    assert (version.returncode, version.stdout) == (0, f"poc-kernels {poc_kernels.__version__}\n"), version.stderr
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("usage: poc-kernels ")


def test_everything_public_is_there_and_documented():
    for name in poc_kernels.__all__:
        thing = getattr(poc_kernels, name)
        assert isinstance(thing, int) or thing.__doc__, f"{name} says nothing of itself"


@pytest.mark.usefixtures("fresh_choice")
def test_the_first_calls_of_several_threads_may_come_at_once():
    inputs = [rows_of_every_kind(8, 64, torch.float32, seed) for seed in range(6)]
    together = threading.Barrier(6)

    def call(i):
        together.wait()
        seed = poc_kernels.seed_tensor(i)
        return [poc_kernels.residual_projection(inputs[i], seed, domain=i) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for i, results in enumerate(pool.map(call, range(6))):
            for y in results:
                assert_same_bits(y, expected(inputs[i], seed=i, domain=i), f"thread {i}")
    assert len(backends._selected) == 1


FORK = """
import os
import signal
import threading
import torch
import poc_kernels
from poc_kernels.kernels import self_test

x, seed = torch.ones(2, 40), poc_kernels.seed_tensor(7)
torch.set_num_threads(1)
tried, forked, wrong_answers = threading.Event(), threading.Event(), self_test.wrong_answers

def slowly(*arguments):
    tried.set()
    forked.wait()
    return wrong_answers(*arguments)

self_test.wrong_answers = slowly
thread = threading.Thread(target=poc_kernels.residual_projection, args=(x, seed))
thread.start()
tried.wait()
child = os.fork()
if child == 0:
    signal.alarm(120)
    self_test.wrong_answers = wrong_answers
    poc_kernels.residual_projection(x, seed)
    os._exit(0)
forked.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_forked_while_a_backend_is_tried_tries_it_too(tmp_path):
    assert run_python(FORK, tmp_path) == "0"


@pytest.mark.skipif(backends.select(CPU).name == "reference", reason="plain torch computes as the process is set")
@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("std", [0.01, 3e-39])
def test_a_process_that_flushes_subnormals_gets_the_same_bits(std):
    """Also when its first call, with the self-test, comes after the setting."""
    x = rows_of_every_kind(60, 90, torch.float32, 1)
    y = expected(x, std=std)
    poc_kernels.definition._coefficient.cache_clear()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    result = poc_kernels.residual_projection(x, poc_kernels.seed_tensor(7), std=std)
    name = backends.select(CPU).name
    torch.set_flush_denormal(False)
    assert_same_bits(result, y)
    assert name != "reference"


def test_other_python_threads_run_during_a_call():
    """The kernels release the GIL: a counter in another thread goes on."""
    if backends.select(CPU).name == "reference":
        pytest.skip("torch's own operators are many short calls")
    x, seed = torch.ones(1500, 2048), poc_kernels.seed_tensor(1)
    ticks, running = 0, True

    def count():
        nonlocal ticks
        while running:
            ticks += 1
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = ticks
        poc_kernels.residual_projection(x, seed)
        after = ticks
    finally:
        running = False
        counter.join()
    assert after - before >= 3
