"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import CPU, backend_named

import poc_kernels
from poc_kernels import backends
from poc_kernels.kernels import Backend, native, trial

# What tests share asserts too: pytest says what each side was.
pytest.register_assert_rewrite(
    *(path.stem for path in (Path(__file__).parent / "support").glob("*.py") if path.stem not in sys.modules)
)
# `bench` is not installed. Last, so that the sources of the package do not hide the installed one.
sys.path.append(str(Path(__file__).parents[1]))
pytest_plugins = ["shared_fixtures"]  # "fixtures" is the name of a plugin of pytest's own

# The reference is many small operators: more threads make it slower, much slower on a busy machine. Tests of threads
# say how many they take.
torch.set_num_threads(1)

# Without a GPU, Triton's interpreter runs its kernels; Triton asks when it is imported, so before any test imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests interrupt processes, which would inherit that a shell has what it starts in the background ignore it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Only make gpu-check goes on without it, where nothing can be built.
missing = native.load() is None and os.environ.get("POC_TESTS_WITHOUT_NATIVE") != "1"
if missing and (Path(poc_kernels.__file__).parents[1] / "pyproject.toml").exists():
    raise pytest.UsageError("the tests import the sources, which have no native core: run them as `make test` does")

# The same examples in every run, on every machine.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=60,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as "summary": figures to be seen whether or not they fail."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "summary"
    ]
    if lines:
        terminalreporter.section("measured by tests")
    for line in lines:
        terminalreporter.write_line(str(line))


@pytest.fixture(params=[backend.name for backend in backends.backends()])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of this installation that this CPU can run."""
    backend = backend_named(request.param)
    reason = backends.unavailable(backend, CPU)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    return backend


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the ops can be asked to run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter, as kernels with loops need it."""
    from triton.runtime import interpreter

    from bench.common.interpreter import counting

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", counting(interpreter._patch_lang_tensor))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NumPy's, on overflow
        yield


_installed_backends = backends.backends


def _forget_choices() -> None:
    _installed_backends.cache_clear()
    backends._selected.clear()
    trial.verdicts.clear()
    native.load.cache_clear()


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend has been found, tried or chosen yet, and none is asked for; forgotten again afterwards."""
    monkeypatch.delenv("POC_KERNELS_BACKEND", raising=False)
    _forget_choices()
    yield
    _forget_choices()


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """torch's settings of the process are after each test what they were before it."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.set_flush_denormal(False)
