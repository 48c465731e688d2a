"""A GPU that is none: a stand-in for the NVIDIA driver, whose launches run on the emulator of PTX and CPU tensors.

From a torch op to its bits everything is real but these two: the backend, the package with its machine code, the
launcher (the native core's, or that of `bench.gpu_check`), the arguments in memory. The emulator runs the PTX that the
code objects were assembled from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from ptx_emulator import cases, results
from ptx_emulator.cases import PADDING
from ptx_emulator.findings import Findings
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.grid import Launch
from ptx_emulator.translation import Translation
from torch import Tensor

from poc_kernels import machine_code
from poc_kernels.definition import Request
from poc_kernels.kernels import Backend
from poc_kernels.kernels.cuda import launcher, package, product
from poc_kernels.kernels.cuda.package import CodeObject, Package
from poc_kernels.kernels.triton import product as triton_product
from poc_kernels.kernels.triton.tiles import Tile
from poc_kernels.protocol import cuda_inputs

_IDENTIFY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_int)
_RUN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)
_LAUNCH_FAILED = 719
BY_BOTH_LAUNCHERS = pytest.mark.parametrize("classes", ["native", "ctypes"], indirect=True)
"""Runs a test with the CudaDriver and CudaKernel of the native core, and with those of `bench.gpu_check.driver`."""
STREAM = 0x5EED
"""The handle of the current stream."""
BACKEND = Backend("cuda", lambda *arguments: product.project(*arguments), product.entries, launcher.unavailable)


def compile_stand_in(folder: Path) -> Path | None:
    """Compile the driver; returns its library, or None without a compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


@functools.lru_cache(maxsize=16)
def _translated(ptx: str) -> Translation:
    return Translation(ptx)


class StandIn:
    """The driver with the code objects of a package.

    Args:
        library: what `compile_stand_in` made.
        made: the package.
        ptx: of its forms, by name. Launches of other forms run nothing.
        version: of CUDA, as the driver says it.
    """

    def __init__(self, library: Path, made: Package, ptx: dict[str, str], version: int = 12000) -> None:
        self.path, self.made, self.ptx = library, made, ptx
        self.codes: list[CodeObject] = list(made.objects.values())
        self.findings = Findings()
        self.memory = GlobalMemory(self.findings, dict(PADDING))
        self.tensors: list[Tensor] = []
        self.random = np.random.default_rng(0)
        self.errors: list[Exception] = []
        self.launched: list[tuple[str, int, tuple[int, ...], int | None]] = []
        """Form, device, grid and stream of each launch."""
        self.numbers: list[dict[str, int]] = []
        """The numbers that each launch was given, by the names of the parameters."""
        self.calls = ctypes.CDLL(str(library))
        self.calls.stand_in_reset.restype = None
        self.calls.stand_in_calls.restype = ctypes.c_long
        self._callbacks = _IDENTIFY(self._identify), _RUN(self._run)  # kept: the driver has only their addresses
        self.calls.stand_in_reset(*self._callbacks, version)

    def give(self, *tensors: Tensor) -> None:
        """Have tensors lie in the memory of the GPU."""
        self.tensors.extend(tensors)

    def giving(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Have the tensors that a function is called with lie in the memory of the GPU."""

        def call(*arguments: Any, **options: Any) -> Tensor:
            given = [*arguments, *(each.row_mask for each in arguments if isinstance(each, Request))]
            self.give(*(each for each in given if isinstance(each, Tensor)))
            return function(*arguments, **options)

        return call

    def empty(self, *arguments: Any, **options: Any) -> Tensor:
        """Allocate on the GPU as torch.empty does: with garbage in it, of which nothing has been written."""
        tensor = torch.zeros(*arguments, **options)
        self.memory.poison(tensor, self.random)
        self.give(tensor)
        return tensor

    def fail(self, call: str, result: int) -> None:
        """Have every later call of an entry point fail; "" for none."""
        self.calls.stand_in_fail(call.encode(), result)

    def count(self, call: str) -> int:
        """Return how often an entry point was called."""
        count: int = self.calls.stand_in_calls(call.encode())
        return count

    def _identify(self, code: int, name: Any, size: int) -> int:
        for number, each in enumerate(self.codes):
            if ctypes.CDLL(None).memcmp(ctypes.c_void_p(code), each.code, len(each.code)) == 0:
                symbol = each.kernel.encode() + b"\0"
                ctypes.memmove(name, symbol, min(len(symbol), size))
                return number
        return -1

    def _run(
        self, number: int, device: int, grid: Any, threads: int, shared: int, stream: int | None, arguments: Any
    ) -> int:
        code = self.codes[number]
        self.launched.append((code.name, device, tuple(grid[:3]), stream))
        try:
            given = self._given(code, arguments)
            if code.name in self.ptx:
                self._emulate(code, given, tuple(grid[:3]), threads, shared)
        except Exception as error:  # no exception leaves a callback
            self.errors.append(error)
            return _LAUNCH_FAILED
        return 0

    def _given(self, code: CodeObject, arguments: Any) -> dict[str, int]:
        """Read what a launch was given, by the names of the parameters; check it against the manifest."""
        given, entry = {}, self.made.manifest["kernels"][code.name]
        for i, (name, kind) in enumerate(entry["parameters"]):
            integer = ctypes.c_int32 if kind == "i" else ctypes.c_uint64
            given[name] = ctypes.cast(arguments[i], ctypes.POINTER(integer)).contents.value
            assert given[name] % 16 == 0 or name not in entry["aligned_to_16"], f"{name} = {given[name]}"
            assert given[name] == 0 or kind != "0", name
        self.numbers.append({name: given[name] for name, kind in entry["parameters"] if kind == "i"})
        return given

    def _emulate(
        self, code: CodeObject, given: dict[str, int], grid: tuple[int, ...], threads: int, shared: int
    ) -> None:
        translation, entry = _translated(self.ptx[code.name]), self.made.manifest["kernels"][code.name]
        kernel = translation.kernel
        assert kernel.name == code.kernel
        assert (threads, shared) == (kernel.threads, entry["shared_bytes"])
        kinds = [{"p": "u64", "0": "u64", "i": "u32"}[kind] for _, kind in entry["parameters"]]
        assert [kind for _, kind in kernel.parameters] == kinds
        pointers = [name for name, kind in entry["parameters"] if kind == "p"]
        self.memory.begin_launch()
        places = {name: self._place(name, given[name], [given[each] for each in pointers]) for name in pointers}
        values = [places.get(name, value) for name, value in given.items()]
        passed = {name: value for (name, _), value in zip(kernel.parameters, values, strict=True)}
        seed = int(self.random.integers(2**62))
        Launch(translation, grid, passed, shared, self.memory, self.findings, seed).run()

    def _place(self, name: str, address: int, others: list[int]) -> int:
        """Return where the emulator has an address; up to the next one that a kernel is given it may be used."""
        for tensor in self.tensors:
            offset = address - tensor.data_ptr()
            if offset == 0 and tensor.dtype != torch.uint8:
                return self.memory.address(tensor, name)
            if tensor.dtype == torch.uint8 and 0 <= offset <= tensor.numel():
                end = min([other for other in others if other > address] + [tensor.data_ptr() + tensor.numel()])
                return self.memory.address(tensor[offset : end - tensor.data_ptr()], name)
        raise AssertionError(f"{name} = {address:#x} is in no memory of the GPU")


def _caches() -> list[Any]:
    return [launcher._driver, launcher._package, launcher._loaded, launcher.launch_of, product._launches]


class _Torch:
    """The torch module, except that its empty is the GPU's."""

    def __init__(self, stand_in: StandIn) -> None:
        self.empty = stand_in.empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def in_use(stand_in: StandIn, folder: Path, classes: Any = None) -> Iterator[None]:
    """Have the CPU pass for a GPU of compute capability 9.0 with 4 SMs, with this driver and the packages of a folder.

    ``classes`` has the CudaDriver and CudaKernel that launch; the native core's unless given. At the end nothing may
    have gone wrong, and nothing is remembered.
    """
    for cache in _caches():
        cache.cache_clear()
    with contextlib.ExitStack() as stack:
        for module in (product, cuda_inputs):
            stack.enter_context(mock.patch.object(module, "torch", _Torch(stand_in)))
        stack.enter_context(mock.patch.object(package, "FOLDER", folder))
        stack.enter_context(mock.patch.object(launcher, "DRIVER", str(stand_in.path)))
        stack.enter_context(mock.patch.object(launcher, "is_nvidia", return_value=True))
        if classes is not None:
            stack.enter_context(mock.patch.object(launcher, "classes", return_value=classes))
        stack.enter_context(mock.patch.object(launcher, "current_stream", return_value=(0, STREAM)))
        for module, name in (
            (product, "project"),
            (product, "entries"),
            (cuda_inputs, "normal"),
            (cuda_inputs, "hash32"),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in.giving(getattr(module, name))))
        try:
            yield
        finally:
            for cache in _caches():
                cache.cache_clear()
    assert not stand_in.errors, stand_in.errors
    assert not stand_in.findings.faults


def compiled_package(folder: Path, names: tuple[str, ...]) -> tuple[Package, dict[str, str]]:
    """Compile some forms for compute capability 9.0 into a folder; returns the package and their PTX."""
    capability = (9, 0)
    with machine_code.processes(1) as pool:
        path = machine_code.build(capability, folder, pool, names)
        made = package.read(path)
        wanted = [form for form in machine_code.all_forms(capability) if form.name in names]
        compiled = pool.map(machine_code.compiled, wanted, [capability] * len(wanted))
        ptx = {form.name: each.ptx for form, each in zip(wanted, compiled, strict=True)}
    for name, text in ptx.items():
        assert hashlib.sha256(text.encode()).hexdigest() == made.manifest["kernels"][name]["ptx_sha256"]
    return made, ptx


def compiled_anew(folder: Path, names: tuple[str, ...]) -> Package:
    """Compile some forms for compute capability 9.0 without anything that was kept."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder / "cache")), machine_code.processes(1) as pool:
        return package.read(machine_code.build((9, 0), folder, pool, names))


def empty_package(folder: Path) -> Package:
    """Write a package for compute capability 9.0 that has every form and no code."""
    entries, codes = {}, []
    for form in machine_code.all_forms((9, 0)):
        made = machine_code.Compiled("", f"{form.name}\n".encode(), 98304 if form.constants.get("ROWS", 0) > 64 else 0)
        entries[form.name], code = machine_code.described(form, made)
        codes.append(code)
    path = package.path_of((9, 0), folder)
    manifest = {"sources": package.sources_digest(), "arithmetic": "int8", "kernels": entries}
    package.write(path, manifest, codes)
    return package.read(path)


Recorded = tuple[str, tuple[int, ...], dict[str, Any]]


class _Recording:
    """Stands in for a kernel of Triton, and runs nothing."""

    def __init__(self, kernel: Any, given: list[Recorded]) -> None:
        self.kernel, self.given = kernel, given

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            by_name = dict(zip(self.kernel.arg_names, arguments, strict=False))
            self.given.append((self.kernel.__name__, grid, {**by_name, **options}))

        return launch


def triton_launches(x: Tensor, seed: Tensor, request: Request, tile: Tile) -> list[Recorded]:
    """Return what Triton's launcher launches: kernel, grid, and arguments with options by name."""
    given: list[Recorded] = []
    names = ("quantise_kernel", "product_kernel")
    kernels = {name: _Recording(getattr(triton_product, name), given) for name in names}
    with mock.patch.multiple(triton_product, _BYTE_PERM=True, **kernels):
        triton_product.project(x, seed, request, tile=tile)
    return given


def ptx_of_case(case: tuple[Any, ...], kernel: str) -> str:
    """Return the PTX of a kernel in a case of the emulator: its class and fields."""
    kind, *fields = case
    return results.processes().submit(results.ptx_of, getattr(cases, kind)(*fields), kernel).result()
