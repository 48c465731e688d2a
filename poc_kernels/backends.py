"""Which backend serves a device: the best one that gives the known answers there, the Triton one by every tile.

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
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .kernels import Backend, native, self_test

logger = logging.getLogger("poc_kernels")

_lock = threading.RLock()
_selected: dict[torch.device, Backend] = {}
_verdicts: dict[tuple[str, torch.device], list[str]] = {}
_forced: str | None = None


def _native_unavailable(supported: bool, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on the CPU only"
    return None if supported else "this processor lacks the instructions"


def _asked_for() -> str | None:
    return _forced or os.environ.get("POC_KERNELS_BACKEND")


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and (device.type != "cpu" or _asked_for() != "triton"):
        return "runs on GPUs only"
    try:
        kernels = _triton()
    except Exception as error:  # a Triton that cannot be imported is one that is not there
        return f"Triton cannot be used: {type(error).__name__}: {error}"
    reason: str | None = kernels.unavailable(device)
    return reason


# Imported when a GPU asks: Triton takes time to import, and a machine without a GPU may not have it.
def _triton() -> ModuleType:
    return importlib.import_module("poc_kernels.kernels.triton.product")


def _triton_project(*arguments: Any, **options: Any) -> Tensor:
    result: Tensor = _triton().project(*arguments, **options)
    return result


def _triton_entries(*arguments: Any, **options: Any) -> Tensor:
    result: Tensor = _triton().entries(*arguments, **options)
    return result


def _wrong_tiles(backend: Backend, device: torch.device) -> list[str]:
    wrong: list[str] = _triton().wrong_tiles(device) if backend.name == "triton" else []
    return wrong


@functools.cache
def backends() -> tuple[Backend, ...]:
    """Every backend of this installation, best first, whether or not this machine can run it."""
    natives = tuple(
        Backend(
            name=f"native-{name}",
            project=functools.partial(native.project, instruction_set=name),
            entries=functools.partial(native.entries, instruction_set=name),
            unavailable=functools.partial(_native_unavailable, supported),
        )
        for name, supported in native.instruction_sets()
    )
    plain = Backend("reference", reference.project, reference.entries, unavailable=lambda device: None)
    gpu = Backend("triton", _triton_project, _triton_entries, unavailable=_triton_unavailable)
    return (*natives, gpu, plain)


def _named(name: str) -> Backend:
    for backend in backends():
        if backend.name == name:
            return backend
    raise ValueError(f"name must be one of {', '.join(each.name for each in backends())}, got {name}")


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise where the current stream is being captured: ``what`` reads results back, which no graph can hold.

    Raises:
        RuntimeError: ``device`` is a GPU, and a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} on {device} cannot be chosen while a CUDA graph is being captured: make one call before the "
            "capture, as poc_kernels.backends.warmup does for the projection"
        )


def verdict(backend: Backend, device: torch.device) -> list[str]:
    """What ``backend`` gets wrong on ``device``: known answers, or else its tiles if it is the Triton backend.

    It is tried once, and logged as an error if anything is wrong.

    Raises:
        RuntimeError: it was not tried yet and a CUDA graph is being captured, in which it cannot be.
    """
    with _lock:
        key = (backend.name, device)
        if key not in _verdicts:
            refuse_capture(device, "the backend")
            wrong = self_test.wrong_answers(backend, device)
            wrong = wrong or self_test.found_wrong(lambda: _wrong_tiles(backend, device))
            if wrong:
                logger.error(
                    "poc_kernels backend %s gives wrong answers on %s and will not be used there: %s",
                    backend.name,
                    device,
                    "; ".join(wrong),
                )
            _verdicts[key] = wrong
        return _verdicts[key]


def trust(name: str, device: torch.device) -> None:
    """Take the backend ``name`` to be right on ``device`` (with its index), untried, in this process.

    For a process in which trying it would take too long, as under compute-sanitizer, after another has tried it.

    Raises:
        ValueError: no backend has that name.
    """
    with _lock:
        _verdicts[_named(name).name, device] = []


def _choose(device: torch.device) -> Backend:
    name = _asked_for()
    candidates = [backend for backend in backends() if name in (None, "", backend.name)]
    if not candidates:
        names = ", ".join(backend.name for backend in backends())
        raise ValueError(f"the backend asked for must be one of {names}, got {name}")
    reasons = []
    for backend in candidates:
        reason = backend.unavailable(device)
        if reason is None and not verdict(backend, device):
            return backend
        reasons.append(f"{backend.name}: {reason or 'wrong answers in its self-test'}")
    raise RuntimeError(f"no poc_kernels backend can be used on {device} ({'; '.join(reasons)})")


def select(device: torch.device) -> Backend:
    """The backend for ``device``.

    Raises:
        ValueError: POC_KERNELS_BACKEND names none of this installation, or POC_KERNELS_TRITON_ARITHMETIC no arithmetic.
        RuntimeError: none, or not the one asked for, is available on the device and passes its self-test there; or
            none was chosen before a CUDA graph is captured.
    """
    backend = _selected.get(device)
    if backend is None:
        with _lock:
            backend = _selected[device] = _choose(device)
            logger.info("poc_kernels uses backend %s on %s", backend.name, device)
    return backend


def warmup(
    device: torch.device | str, dim: int, *, dtype: torch.dtype = torch.bfloat16, activation_bits: int = 16
) -> None:
    """Choose the backend of ``device`` and have all compiled that ``residual_projection`` takes there.

    No call with activations [..., dim] in ``dtype`` waits for a compiler afterwards, and each may be captured in a
    CUDA graph.

    Raises:
        ValueError, RuntimeError: as for `select`.
    """
    device = torch.empty(0, device=device).device  # with its index
    if select(device).name == "triton":
        _triton().warmup(device, dim, dtype=dtype, activation_bits=activation_bits)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend ``name`` on every device inside the block, in all threads: for tests and measurements.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: at the first op, if it is not available on the device or fails its self-test there.
    """
    global _forced
    _named(name)
    with _lock:
        before, _forced = _forced, name
        _selected.clear()
    try:
        yield
    finally:
        with _lock:
            _forced = before
            _selected.clear()
