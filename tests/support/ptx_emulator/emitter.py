"""Operands of PTX as Python expressions, and the lines of the function that a kernel becomes."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from . import lanes
from .findings import EmulationError
from .shared_memory import SHARED_BASE
from .syntax import Instruction, Kernel, Operand

UNSIGNED = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}
"""NumPy's unsigned type, as generated code calls it, by bits."""
DTYPES = {name: np.dtype(name).type for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}
"""What generated code calls NumPy's types."""


def bits_of(kind: str) -> int:
    """Return the bits of a PTX type ("s32": 32)."""
    found = re.fullmatch(r"[subf](8|16|32|64)", kind)
    if not found:
        raise EmulationError(f"type {kind}")
    return int(found[1])


def dtype_of(kind: str) -> str:
    """Return NumPy's type for a PTX type: b32 -> u4, s64 -> i8, f32 -> f4."""
    return {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(bits_of(kind) // 8)


def variable(register: str) -> str:
    """Return what generated code calls a register: no name of a function or type."""
    return "v_" + register.removeprefix("%")


class Emitter:
    """Source of ``run(warp)``: registers are its local variables, so that one which nothing has written is an error."""

    kernel: Kernel

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.source: list[str] = []
        self.constants: dict[str, np.ndarray] = {"k_bool_0": ~lanes.FULL, "k_bool_1": lanes.FULL}
        self.ptx_line: dict[int, int] = {}
        """By the line of the source, both from 1."""
        self.defined: set[str] = set()
        """Registers that something before has written."""

    def emit(self, code: str, instruction: Instruction | None = None) -> None:
        """Append a line."""
        self.source.append("      " + code)
        if instruction is not None:
            self.ptx_line[len(self.source)] = instruction.line

    # ---- operands ----

    def constant(self, value: int, dtype: str) -> str:
        """Return the name of a constant in all lanes."""
        name = f"k_{dtype}_{value}".replace("-", "m")
        if name not in self.constants:
            self.constants[name] = lanes.array(value, DTYPES[dtype])
        return name

    def register(self, operand: Operand) -> str:
        """Return the variable of a register."""
        if operand.kind != "register":
            raise EmulationError(f"not a register: {operand}")
        return variable(operand.name)

    def value(self, operand: Operand, kind: str, low_bits: bool = False) -> str:
        """Return the operand as an array of a PTX type; with ``low_bits`` a wider register is cut."""
        if kind == "pred":
            return f"k_bool_{int(operand.value != 0)}" if operand.kind == "number" else self.register(operand)
        dtype = dtype_of(kind)
        if operand.kind == "number":
            constant = self.constant(operand.value, "u" + dtype[1:])
            return constant if dtype[0] == "u" else f"{constant}.view({dtype})"
        if operand.kind == "symbol" and operand.name == "global_smem":
            return self.constant(SHARED_BASE, "u" + dtype[1:])
        name, width, bits = self.register(operand), self.kernel.width(operand.name), bits_of(kind)
        if width != bits:
            if not low_bits or width < bits:
                raise EmulationError(f"{operand.name} is not of {kind}")
            name = f"{name}.astype({UNSIGNED[bits]})"
        return name if dtype[0] == "u" else f"{name}.view({dtype})"

    def values(self, operands: Collection[Operand], kind: str) -> str:
        """Return the operands with commas."""
        return ", ".join(self.value(operand, kind) for operand in operands)

    def address(self, operand: Operand) -> str:
        """Return the operand as an array of addresses."""
        base = operand.items[0]
        if base.kind == "symbol":
            if base.name != "global_smem":
                raise EmulationError(f"unknown symbol {base.name}")
            return self.constant(SHARED_BASE + operand.value, "u4")
        name = self.register(base)
        if not operand.value:
            return name
        return f"({name} + {self.constant(operand.value, UNSIGNED[self.kernel.width(base.name)])})"

    def guard(self, instruction: Instruction) -> str:
        """Return where the instruction runs, as an array of bool."""
        if instruction.guard is None:
            return "FULL"
        return ("~" if instruction.negated else "") + variable(instruction.guard)

    # ---- results ----

    def assign(self, instruction: Instruction, operand: Operand, value: str) -> None:
        """Give a register a new value, of its unsigned type or bool, where the guard holds."""
        if operand.kind == "sink":
            return
        name = self.register(operand)
        if instruction.guard:
            dtype = UNSIGNED.get(self.kernel.width(operand.name))
            if name not in self.defined and dtype is None:
                raise EmulationError("a predicate that only a guarded instruction writes")
            old = name if name in self.defined else f"warp.garbage({dtype})"
            value = f"merged({self.guard(instruction)}, {value}, {old})"
        self.defined.add(name)
        self.emit(f"{name} = {value}", instruction)

    def result(self, instruction: Instruction, kind: str, expression: str) -> None:
        """Give the first operand a new value of a PTX type."""
        unsigned = "" if kind[0] in "ub" else f".view({UNSIGNED[bits_of(kind)]})"
        self.assign(instruction, instruction.operands[0], f"({expression}){unsigned}")

    # ---- checks ----

    @staticmethod
    def split_type(parts: list[str], modifiers: Collection[str], kinds: str) -> tuple[list[str], str]:
        """Return (modifiers, type) of an opcode; both have to be known."""
        *found, kind = parts
        if not set(found) <= set(modifiers) or not re.fullmatch(kinds, kind):
            raise EmulationError("unknown modifier or type")
        return found, kind

    @staticmethod
    def without_guard(instruction: Instruction) -> None:
        """Refuse a guard."""
        if instruction.guard is not None:
            raise EmulationError("guarded")
