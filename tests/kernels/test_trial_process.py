"""Kernels are tried on a GPU in another process, which may crash; stand-ins are in place of kernels and GPU."""

import functools
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU

from poc_kernels import backends, reference
from poc_kernels.kernels import Backend, trial, trial_process
from poc_kernels.protocol import inputs

GPU = torch.device("cuda", 0)


def find_wrong(stand_in):
    return trial_process.find_wrong(f"trial_stand_ins:{stand_in}", "kernels", CPU)


# ---- how the other process ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stand_in", "found"),
    [
        ("right", []),
        ("crash_at_the_end", []),
        ("wrong", ["kernels on cpu"]),
        ("raises", ["RuntimeError: a kernel that does not launch"]),
        ("abort", ["its trial ended the process (SIGABRT): an illegal memory access was encountered"]),
        ("exits", ["its trial ended the process (exit status 3): it said nothing"]),
    ],
)
def test_what_another_process_finds(stand_in, found):
    assert find_wrong(stand_in) == found


def test_a_crash_is_what_is_wrong():
    (wrong,) = find_wrong("segfault")
    assert wrong.startswith("its trial ended the process (SIGSEGV): ")


def test_kernels_that_hang_are_wrong(monkeypatch):
    monkeypatch.setattr(trial_process, "TIMEOUT_SECONDS", 0.5)
    assert find_wrong("hangs") == ["its trial did not end in 0.5 seconds"]


def test_a_process_that_is_killed_says_that_memory_is_short():
    with pytest.raises(MemoryError, match="that tries kernels on cpu was killed") as raised:
        find_wrong("killed")
    assert trial.is_transient(raised.value)


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("python", 1), KeyboardInterrupt()])
def test_what_a_killed_process_has_started_is_killed_with_it(error, monkeypatch, tmp_path):
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    held = []

    def raise_once_all_run(process, timeout):
        held.append(alive.open("rb", buffering=0))
        assert held[0].read(1) == b"x"
        raise error

    monkeypatch.setattr(subprocess.Popen, "communicate", raise_once_all_run)
    with pytest.raises(type(error)):
        trial_process._run(["sh", "-c", f"(printf x; exec sleep 3600) > '{alive}' & wait"])
    with held[0] as pipe:
        assert select.select([pipe], [], [], 60)[0], "a compiler runs on"
        assert pipe.read() == b""


def test_a_process_that_cannot_be_killed_is_left(monkeypatch):
    spared = []
    monkeypatch.setattr(trial_process, "TIMEOUT_SECONDS", 0.0)
    monkeypatch.setattr(trial_process, "KILLED_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda group, number: spared.append((group, number)))
        with pytest.raises(subprocess.TimeoutExpired):
            trial_process._run(["sleep", "3600"])
    ((group, number),) = spared
    os.killpg(group, number)


def test_a_trial_ends_by_itself_should_nobody_wait_for_it():
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        (found,) = find_wrong("alarm")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGALRM, handler)
    ends, seconds = found.split()
    assert ends == "ends"
    assert 0 < int(seconds) <= trial_process.TIMEOUT_SECONDS + trial_process.KILLED_SECONDS


def test_what_python_prints_at_its_start_is_no_report(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('a greeting')\nprint('{\"wrong\": []}', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert find_wrong("wrong") == ["kernels on cpu"]


def test_what_python_ignores_in_its_path_does_not_matter(monkeypatch):
    monkeypatch.setattr(sys, "path", [Path("/somewhere"), *sys.path])
    assert find_wrong("right") == []


def test_a_frozen_program_is_not_started_again(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(trial_process.SaysNothingError, match=r"sys\.executable does not say"):
        find_wrong("right")


@pytest.mark.parametrize(
    ("executable", "device", "stand_in", "reason"),
    [
        ("", CPU, "right", "sys.executable does not say where Python is"),
        ("/no/such/python", CPU, "right", "FileNotFoundError: "),
        (sys.executable, torch.device("cuda", 99), "right", r"it ended too soon \(exit status 1\): \w+Error: "),
        (sys.executable, CPU, "short_of_memory", "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_process_that_cannot_try_the_kernels_says_nothing_of_them(executable, device, stand_in, reason, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(trial_process.SaysNothingError, match=reason):
        trial_process.find_wrong(f"trial_stand_ins:{stand_in}", "kernels", device)


def test_a_process_that_does_not_find_the_package_says_nothing_of_kernels(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        trial_process.SaysNothingError, match=r"too soon \(exit status 1\): ModuleNotFoundError: No mod"
    ):
        find_wrong("right")


# ---- which process -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_with(monkeypatch, fresh_choice):
    """Makes a GPU as far as the choice of a process goes, on which kernels in another process do as a stand-in does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def with_kernels_that(stand_in):
        outcome = functools.partial(trial_process.find_wrong, f"trial_stand_ins:{stand_in}")
        monkeypatch.setattr(trial_process, "find_wrong", lambda function, name, device: outcome(name, CPU))

    return with_kernels_that


@pytest.fixture
def tried_here(monkeypatch):
    """What is tried in this process, by name; all of it is right."""
    tried = []
    monkeypatch.setattr(backends, "_wrong", lambda backend, device: tried.append(backend.name) or [])
    return tried


@pytest.fixture
def two_backends(monkeypatch):
    """One that may crash, and one that may not."""
    both = (
        Backend("compiled", reference.project, reference.entries, lambda device: None, may_crash=True),
        Backend("plain", reference.project, reference.entries, lambda device: None),
    )
    monkeypatch.setattr(backends, "backends", lambda: both)


@pytest.mark.usefixtures("two_backends")
@pytest.mark.parametrize(("stand_in", "chosen"), [("right", "compiled"), ("wrong", "plain"), ("segfault", "plain")])
def test_a_crash_on_a_gpu_costs_a_backend_and_not_the_process(stand_in, chosen, gpu_with, tried_here, caplog):
    gpu_with(stand_in)
    for _ in range(2):
        assert backends.select(GPU).name == chosen
    assert tried_here == ["plain"] * (chosen == "plain"), "one that may crash is not tried here"
    assert ("SIGSEGV" in caplog.text) == (stand_in == "segfault")


@pytest.mark.usefixtures("two_backends")
def test_kernels_are_tried_here_where_another_process_cannot(gpu_with, tried_here, caplog):
    gpu_with("short_of_memory")
    assert backends.select(GPU).name == "compiled"
    assert tried_here == ["compiled"]
    assert "tries compiled on cuda:0 in this process, as another one cannot: OutOfMemoryError: CUDA" in caplog.text


@pytest.mark.usefixtures("two_backends")
def test_a_process_that_was_killed_is_not_remembered(gpu_with, tried_here):
    gpu_with("killed")
    with pytest.raises(MemoryError):
        backends.select(GPU)
    assert not trial.verdicts
    assert not tried_here


@pytest.mark.usefixtures("two_backends", "fresh_choice")
def test_a_cpu_tries_all_backends_here(tried_here, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert backends.select(CPU).name == "compiled"
    assert tried_here == ["compiled"]


def test_kernels_of_gpus_may_crash():
    assert [backend.name for backend in backends.backends() if backend.may_crash] == ["cuda", "triton"]


@pytest.mark.parametrize(
    ("name", "found"), [("reference", []), ("abacus", ["ValueError: name must be one of .*, got abacus"])]
)
def test_a_backend_is_tried_elsewhere_by_its_name(name, found):
    wrong = trial_process.find_wrong("poc_kernels.backends:_wrong_by_name", name, CPU)
    assert len(wrong) == len(found)
    assert all(re.fullmatch(pattern, words) for pattern, words in zip(found, wrong, strict=True))


def test_what_draws_inputs_is_tried_elsewhere_by_its_name(gpu_with, monkeypatch):
    pytest.importorskip("triton")
    asked = []
    gpu_with("right")
    monkeypatch.setattr(trial_process, "find_wrong", lambda *arguments: asked.append(arguments) or ["hashes"])
    inputs._kernels.cache_clear()
    assert inputs._kernels(GPU) is None
    inputs._kernels.cache_clear()
    monkeypatch.undo()
    ((function, name, device),) = asked
    assert device == GPU
    (wrong,) = trial_process.find_wrong(function, "no_such_module", CPU)
    assert wrong == "ModuleNotFoundError: No module named 'no_such_module'"
    assert name == "poc_kernels.protocol.triton_inputs"
