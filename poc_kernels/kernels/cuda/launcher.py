"""Kernels of the package's machine code on this machine's GPUs: loaded through the driver, once per device."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from .. import native
from ..triton import plan
from . import package
from .package import CodeObject, Package, PackageError

DRIVER = "libcuda.so.1"
INSTEAD = "POC_BENCH_CUDA_LAUNCHER"
"""The variable in which benchmarks name a module with a CudaDriver and a CudaKernel, where nothing can be built."""


def classes() -> Any:
    """Return what has CudaDriver and CudaKernel: the native core, or else the module of INSTEAD; None without either.

    Raises:
        ImportError: the module of INSTEAD cannot be imported.
    """
    core, instead = native.load(), os.environ.get(INSTEAD)
    if hasattr(core, "CudaDriver"):
        return core
    return importlib.import_module(instead) if instead else None


@functools.cache
def _driver(library: str) -> Any:
    return classes().CudaDriver(library)


@functools.cache
def _package(capability: tuple[int, int]) -> Package:
    return package.read(package.path_of(capability))


def is_nvidia(device: torch.device) -> bool:
    """Tell whether a device is a GPU of NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None


def unavailable(device: torch.device) -> str | None:
    """Return why the package's machine code cannot run on a device, or None if it can.

    Raises:
        ValueError: POC_KERNELS_TRITON_ARITHMETIC names no arithmetic.
    """
    if not is_nvidia(device):
        return "runs on NVIDIA's GPUs only"
    try:
        if classes() is None:
            return "the native core was built without it"
        _driver(DRIVER)
        capability, _ = plan.hardware(device)
        arithmetic = _package(capability).manifest["arithmetic"]
    except (PackageError, RuntimeError, ImportError) as error:
        return str(error)
    asked_for = plan.choose_arithmetic(capability)
    if asked_for != arithmetic:
        return f"its machine code multiplies in {arithmetic}, POC_KERNELS_TRITON_ARITHMETIC asks for {asked_for}"
    return None


def current_stream(device: torch.device) -> tuple[int, int]:
    """Return the number of a GPU, and the handle of torch's current stream there."""
    index = device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


@functools.cache
def _loaded(capability: tuple[int, int], name: str) -> Any:
    code: CodeObject = _package(capability).objects[name]
    return classes().CudaKernel(
        driver=_driver(DRIVER),
        code=code.code,
        name=code.kernel,
        parameters=code.parameters,
        threads=32 * code.warps,
        shared_bytes=code.shared_bytes,
    )


@functools.cache
def launch_of(device: torch.device, name: str) -> Any:
    """Return ``launch(number of the GPU, stream, grid x, grid y, *arguments)`` of a form's code, loaded on a device.

    Raises:
        RuntimeError: the driver's, such as that a graph is being captured, in which nothing can be loaded.
    """
    capability, _ = plan.hardware(device)
    kernel = _loaded(capability, name)
    kernel.prepare(current_stream(device)[0])
    return kernel.launch
