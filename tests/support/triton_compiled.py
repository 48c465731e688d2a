"""Triton kernels compiled ahead of time for GPUs that need not be there, and what their machine code holds.

Compilation runs in a process of its own, so that it works in tests that run the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CAPABILITIES = (80, 89, 90, 100)
"""A100; L4 and RTX 40; H100 and H200; B200."""

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_BRANCH_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    opcode: str
    """With its modifiers: "IMAD.WIDE.U32"."""
    operands: str
    predicate: str = ""

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _BRANCH_TARGET.search(self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    def __str__(self) -> str:
        return " ".join(part for part in (self.predicate, self.opcode, self.operands.strip()) if part)


@dataclass(frozen=True)
class Code:
    """Instructions in the order of their addresses: a kernel, or a loop of one."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def count(self, pattern: str) -> int:
        """How many instructions match the regular expression: searched in "@P0 IMAD.WIDE.U32 R4, R5, 0x7, R8"."""
        return sum(1 for instruction in self if re.search(pattern, str(instruction)))

    @property
    def histogram(self) -> Counter[str]:
        """Number of instructions by opcode without modifiers."""
        return Counter(instruction.opcode.split(".")[0] for instruction in self)

    @property
    def loops(self) -> tuple[Code, ...]:
        """Every backward branch with what it jumps over, shortest first. (The trap behind the end is none.)"""
        loops = [
            Code(tuple(inside for inside in self if last.target <= inside.address <= last.address))
            for last in self
            if last.target is not None and self.instructions[0].address <= last.target < last.address
        ]
        return tuple(sorted(loops, key=len))

    def loop_with(self, pattern: str) -> Code:
        """The shortest loop that has an instruction that matches."""
        for loop in self.loops:
            if loop.count(pattern):
                return loop
        raise AssertionError(f"no loop holds {pattern}: loops of {[len(loop) for loop in self.loops]} instructions")

    @property
    def text(self) -> str:
        return "\n".join(map(str, self))


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of GPU."""

    capability: int
    num_warps: int
    ptx: str
    sass: str
    """As cuobjdump prints it."""
    ttgir: str
    registers: int
    """Of each thread."""
    spills: int
    """Bytes of local memory of each thread: registers that did not fit, and arrays that could not be registers."""
    shared_bytes: int
    """Static and dynamic."""

    @functools.cached_property
    def code(self) -> Code:
        found = (
            Instruction(int(address, 16), opcode, operands, predicate)
            for address, predicate, opcode, operands in _INSTRUCTION.findall(self.sass)
        )
        return Code(tuple(found))

    def count(self, pattern: str) -> int:
        """`Code.count` over the whole kernel."""
        return self.code.count(pattern)

    def loop_with(self, pattern: str) -> Code:
        """`Code.loop_with` of the whole kernel."""
        return self.code.loop_with(pattern)

    def warps_per_sm(self) -> int:
        """Warps that registers and shared memory leave room for on one SM."""
        shared = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}[self.capability] * 1024
        most = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}[self.capability]
        per_warp = -(-self.registers // 8) * 8 * 32
        blocks = min(65536 // (per_warp * self.num_warps), shared // (self.shared_bytes + 1024), most // self.num_warps)
        return blocks * self.num_warps


# ---- compilation, in the other process -----------------------------------------------------------------------------


def _tool(name: str) -> str:
    """A CUDA tool of Triton's package, else of this machine."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(bundled) if bundled.exists() else shutil.which(name)
    assert path is not None, f"Triton's package has no {name}"
    return path


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """SASS and resources of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        environment = {**os.environ, "PATH": f"{Path(_tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
        sass, usage = (
            subprocess.run(
                [_tool("cuobjdump"), option, str(path)], capture_output=True, text=True, check=True, env=environment
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    return sass, {name: int(value) for name, value in _RESOURCE.findall(usage)}


def _compiled_by_triton(
    module: str,
    name: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: tuple[str, ...],
    target: tuple[str, int | str, int],
    options: dict[str, Any],
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    unknown = {*signature, *constants, *aligned} - set(kernel.arg_names)
    missing = set(kernel.arg_names) - {*signature, *constants}
    assert not unknown, f"{name} has no arguments {sorted(unknown)}"
    assert not missing, f"no type or constant for the arguments {sorted(missing)} of {name}"
    plain = {param.name for param in kernel.params if param.do_not_specialize or param.do_not_specialize_on_alignment}
    source = ASTSource(
        kernel,
        {arg: "constexpr" if arg in constants else signature[arg] for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        attrs={(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned if arg not in plain},
    )
    return triton.compile(source, target=GPUTarget(*target), options=options)


def _compile(*request: Any) -> Compiled | int:
    """Code and resources for NVIDIA's GPUs; for AMD's the bytes of shared memory alone."""
    compiled, target = _compiled_by_triton(*request), request[-2]
    if target[0] != "cuda":
        return int(compiled.metadata.shared)
    sass, resources = _disassemble(compiled.asm["cubin"])
    return Compiled(
        capability=target[1],
        num_warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
        sass=sass,
        ttgir=compiled.asm["ttgir"],
        registers=resources["REG"],
        spills=resources["STACK"] + resources["LOCAL"],
        shared_bytes=max(compiled.metadata.shared, resources["SHARED"]),
    )


# ---- interface -----------------------------------------------------------------------------------------------------


_making_compiler = threading.Lock()


def _compiler() -> concurrent.futures.ProcessPoolExecutor:
    """Other processes, in which kernels are compiled and not interpreted."""
    with _making_compiler:  # two threads at once would restore the environment wrongly, for good
        return _made_compiler()


@functools.cache
def _made_compiler() -> concurrent.futures.ProcessPoolExecutor:
    workers = min(4, os.cpu_count() or 1)
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):  # they start as work comes, so all of them here
        concurrent.futures.wait([pool.submit(time.sleep, 0.1) for _ in range(workers)])
    return pool


_done: dict[str, Any] = {}


def compile_for(
    kernel: Callable[..., Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """``kernel`` compiled for the NVIDIA GPUs of one compute capability (80, ..., 120), kept for this process.

    Args:
        kernel: an @triton.jit function at the top of a module that can be imported, interpreted here or not.
        signature: type of each argument that is no constant: "*bf16", "*i8", "i32", "fp32", ...
        constants: value of each tl.constexpr argument, and of those that Triton would make one (a stride of 1).
        aligned: arguments divisible by 16, as Triton finds when it is called; every pointer unless given. Those that
            the kernel is not specialised for are left out.
        options: more options of the launch: {"enable_fp_fusion": False, "maxnreg": 128}.
    """
    if aligned is None:
        aligned = [name for name, type_name in signature.items() if type_name.startswith("*")]
    options = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    compiled: Compiled = _kept(kernel, signature, constants, aligned, ("cuda", capability, 32), options)
    return compiled


def shared_bytes_on_amd(
    kernel: Callable[..., Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    aligned: Sequence[str],
    **options: Any,
) -> int:
    """Shared memory of a block of ``kernel`` compiled for an AMD GPU ("gfx942"); arguments as for `compile_for`."""
    shared: int = _kept(kernel, signature, constants, aligned, ("hip", arch, 64), options)
    return shared


def _kept(
    kernel: Callable[..., Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    target: tuple[str, int | str, int],
    options: Mapping[str, Any],
) -> Any:
    function = getattr(kernel, "fn", kernel)
    request = (
        *(function.__module__, function.__name__),
        *(dict(signature), dict(constants), tuple(aligned), target, dict(options)),
    )
    key = repr(request)
    if key not in _done:
        _done[key] = _compiler().submit(_compile, *request).result()
    return _done[key]
