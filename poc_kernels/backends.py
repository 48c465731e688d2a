"""Which backend serves a device: the best one that runs there and is right there, as its first trial shows.

The choice is made once per device, at the first call. ``POC_KERNELS_BACKEND`` in the environment names the backend
to use in place of the best (``poc-kernels verify`` lists the names).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import reference
from .kernels import Backend, cpu, self_test, trial, trial_process
from .kernels.cuda import launcher

logger = logging.getLogger("poc_kernels")

_selected: dict[torch.device, Backend] = {}
_forced: str | None = None

_CUDA = "poc_kernels.kernels.cuda.product"
_TRITON = "poc_kernels.kernels.triton.product"


def _imported_when_called(module: str, name: str) -> Callable[..., Any]:
    """Return a function that calls the function ``name`` of ``module``, which is imported by the first call.

    Triton takes time to import, and a machine without a GPU may not have it.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and "TRITON_INTERPRET" in os.environ):
        return "runs on GPUs only"
    try:
        kernels = importlib.import_module(_TRITON)
    except Exception as error:  # a Triton that cannot be imported is one that is not there
        return f"Triton cannot be used: {type(error).__name__}: {error}"
    reason: str | None = kernels.unavailable(device)
    return reason


@functools.cache
def backends() -> tuple[Backend, ...]:
    """Return every backend of this installation, best first, whether or not this machine can run it."""
    return (
        *cpu.backends(),
        Backend(
            name="cuda",
            project=_imported_when_called(_CUDA, "project"),
            entries=_imported_when_called(_CUDA, "entries"),
            unavailable=launcher.unavailable,
            by_name_only=("cpu",),  # by a stand-in for the driver
            wrong=_imported_when_called(_CUDA, "wrong_tiles"),
            may_crash=True,
            warmup=_imported_when_called(_CUDA, "warmup"),
        ),
        Backend(
            name="triton",
            project=_imported_when_called(_TRITON, "project"),
            entries=_imported_when_called(_TRITON, "entries"),
            unavailable=_triton_unavailable,
            by_name_only=("cpu",),  # by Triton's interpreter
            wrong=_imported_when_called(_TRITON, "wrong_tiles"),
            may_crash=True,
            warmup=_imported_when_called(_TRITON, "warmup"),
        ),
        Backend("reference", project=reference.project, entries=reference.entries, unavailable=lambda device: None),
    )


def _named(name: str, argument: str = "name") -> Backend:
    for backend in backends():
        if backend.name == name:
            return backend
    raise ValueError(f"{argument} must be one of {', '.join(each.name for each in backends())}, got {name}")


def _asked_for() -> str | None:
    return _forced or os.environ.get("POC_KERNELS_BACKEND")


def unavailable(backend: Backend, device: torch.device) -> str | None:
    """Return why ``backend`` does not serve ``device``, whatever its answers, or None if it can."""
    reason = backend.unavailable(device)
    if reason is None and device.type in backend.by_name_only and _asked_for() != backend.name:
        return f"serves a {device.type} only where it is asked for by name"
    return reason


def verdict(backend: Backend, device: torch.device) -> list[str]:
    """Return what ``backend`` gets wrong on ``device``: known answers, or else what the backend itself finds.

    It is tried once, and logged as an error if anything is wrong. One that `may_crash` is tried in another process if
    the device is a GPU; if it ends that process, that is what is wrong.

    Raises:
        RuntimeError: it was not tried yet and a CUDA graph is being captured, in which it cannot be.
        MemoryError: memory is too short to try it.
    """

    def find_wrong() -> list[str]:
        return _wrong(backend, device)

    def find_wrong_apart() -> list[str]:
        return trial_process.on_gpu_apart(f"{__name__}:_wrong_by_name", backend.name, device, find_wrong)

    return trial.verdict(_trial_name(backend), device, find_wrong_apart if backend.may_crash else find_wrong)


def _wrong(backend: Backend, device: torch.device) -> list[str]:
    return self_test.wrong_answers(backend, device) or backend.wrong(device)


def _wrong_by_name(name: str, device: torch.device) -> list[str]:
    """Try a backend, as another process has this one do."""
    return _wrong(_named(name), device)


def trust(name: str, device: torch.device) -> None:
    """Take the backend ``name`` to be right on ``device`` (with its index), untried, in this process.

    For a process in which a trial would take too long, as under compute-sanitizer, after another has made it.

    Raises:
        ValueError: no backend has that name.
    """
    trial.trust(_trial_name(_named(name)), device)


def _trial_name(backend: Backend) -> str:
    return f"backend {backend.name}"


def _choose(device: torch.device) -> Backend:
    name = _asked_for()
    candidates = (_named(name, "the backend asked for"),) if name else backends()
    reasons = []
    for backend in candidates:
        reason = unavailable(backend, device)
        if reason is None and not verdict(backend, device):
            return backend
        reasons.append(f"{backend.name}: {reason or 'wrong answers in its self-test'}")
    raise RuntimeError(f"no poc_kernels backend can be used on {device} ({'; '.join(reasons)})")


def select(device: torch.device) -> Backend:
    """Return the backend for ``device``.

    Raises:
        ValueError: POC_KERNELS_BACKEND names none of this installation, or POC_KERNELS_TRITON_ARITHMETIC no arithmetic.
        RuntimeError: none, or not the one asked for, is available on the device and passes its self-test there; or
            none was chosen before a CUDA graph is captured.
    """
    backend = _selected.get(device)
    if backend is None:
        with trial.lock:
            backend = _selected[device] = _choose(device)
            logger.info("poc_kernels uses backend %s on %s", backend.name, device)
    return backend


def warmup(
    device: torch.device | str, dim: int, *, dtype: torch.dtype = torch.bfloat16, activation_bits: int = 16
) -> None:
    """Choose the backend of ``device`` and have everything compiled that ``residual_projection`` takes there.

    No call with activations [..., dim] in ``dtype`` waits for a compiler afterwards, and each may be captured in a
    CUDA graph.

    Raises:
        ValueError, RuntimeError: as for `select`.
    """
    device = torch.empty(0, device=device).device  # with its index
    select(device).warmup(device, dim, dtype=dtype, activation_bits=activation_bits)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend ``name`` on every device inside the block, in all threads: for tests and measurements.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: at the first op, if it is not available on the device or fails its self-test there.
    """
    global _forced
    _named(name)
    with trial.lock:
        before, _forced = _forced, name
        _selected.clear()
    try:
        yield
    finally:
        with trial.lock:
            _forced = before
            _selected.clear()
