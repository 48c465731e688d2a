"""Launches Triton kernels on the emulator, in place of Triton's JITFunction: specialised and compiled as it does."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import create_function_from_signature

from .findings import Findings
from .global_memory import GlobalMemory
from .grid import Launch
from .translation import Translation

Mutate = Callable[[str, str], str]
"""(name of a kernel, its PTX) -> the PTX that runs."""


def unchanged(kernel: str, ptx: str) -> str:
    """Run what was compiled."""
    return ptx


@dataclass(frozen=True)
class Record:
    """One launch that has run."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    """Per block."""
    executed: Counter[str]
    """Instructions that warps have executed, by opcode."""


class Emulator:
    """An NVIDIA GPU of one compute capability (90), with memory of its own and everything that went wrong on it.

    Args:
        capability: 10 * major + minor.
        seed: of garbage in memory and of the order in which blocks, warps and atomics run.
        mutate: makes what runs of what was compiled.
        padding: see `GlobalMemory`.
    """

    def __init__(
        self,
        capability: int,
        seed: int = 0,
        mutate: Mutate = unchanged,
        padding: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self.capability, self.mutate = capability, mutate
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.random = np.random.default_rng(seed)
        self.findings = Findings()
        self.memory = GlobalMemory(self.findings, dict(padding or {}))
        self.records: list[Record] = []

    def kernel(self, function: Any) -> EmulatedKernel:
        """Return what stands in for a kernel of Triton."""
        return EmulatedKernel(self, function)

    def empty(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Allocate as torch.empty does: with garbage in it, of which nothing has been written."""
        tensor = torch.zeros(*arguments, **options)
        self.memory.poison(tensor, self.random)
        return tensor

    def launch(self, function: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run a kernel to its end."""
        options = {"debug": False, **options}
        bound, specialisation, _ = _binder(function, self.capability)(*arguments, **options)
        parsed, signature, constants, attributes = function._pack_args(
            self.backend, options, bound, specialisation, None
        )
        ptx, shared_bytes = _compiled(
            _Source(function, signature, constants, attributes, parsed, self.target, str(specialisation))
        )
        translation = _translated(self.mutate(function.__name__, ptx))
        values = {name: value for name, value in bound.items() if signature[name] != "constexpr"}
        launch = Launch(
            translation,
            grid,
            self._passed(translation, values),
            shared_bytes,
            self.memory,
            self.findings,
            seed=int(self.random.integers(2**62)),
        )
        executed = launch.run()
        self.records.append(Record(function.__name__, tuple(launch.grid), translation.kernel.threads, executed))

    def _passed(self, translation: Translation, values: dict[str, Any]) -> dict[str, int]:
        """Return what the parameters of the PTX get: ``values`` in their order, then two pointers that are null."""
        *parameters, global_scratch, profile_scratch = translation.kernel.parameters
        passed = {global_scratch[0]: 0, profile_scratch[0]: 0}
        self.memory.begin_launch()
        for (parameter, kind), (name, value) in zip(parameters, values.items(), strict=True):
            if isinstance(value, torch.Tensor):
                assert kind == "u64", f"{name} is passed as {kind}"
                value = self.memory.address(value, name)
            else:
                bits = int(kind[1:])
                assert -(2 ** (bits - 1)) <= value < 2 ** (bits - 1), f"{name} = {value} does not fit {kind}"
            passed[parameter] = int(value)
        return passed


class EmulatedKernel:
    """Stands in for a JITFunction: kernel[grid](arguments) runs at once."""

    def __init__(self, emulator: Emulator, function: Any) -> None:
        self.emulator, self.function = emulator, function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.emulator.launch(self.function, grid, arguments, options)


class EmulatedTorch:
    """The torch module, except that its empty is the emulator's."""

    def __init__(self, emulator: Emulator) -> None:
        self.empty = emulator.empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Source:
    """What one specialisation of a kernel is compiled from; equal to another of the same key."""

    def __init__(
        self,
        function: Any,
        signature: dict[str, str],
        constants: dict[Any, Any],
        attributes: dict[Any, Any],
        options: Any,
        target: Any,
        specialisation: str,
    ) -> None:
        self.ast = ASTSource(function, signature, constants, attributes)
        self.options, self.target = options, target
        self._key = (function.__name__, target.arch, specialisation, str(options))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self._key == other._key


@functools.lru_cache(maxsize=64)
def _binder(function: Any, capability: int) -> Callable[..., Any]:
    backend = make_backend(GPUTarget("cuda", capability, 32))
    return create_function_from_signature(function.signature, function.params, backend)


@functools.lru_cache(maxsize=64)
def _compiled(source: _Source) -> tuple[str, int]:
    """Return (PTX, bytes of shared memory)."""
    compiled = triton_compile(source.ast, target=source.target, options=source.options.__dict__)
    return compiled.asm["ptx"], compiled.metadata.shared


@functools.lru_cache(maxsize=16)
def _translated(ptx: str) -> Translation:
    return Translation(ptx)
