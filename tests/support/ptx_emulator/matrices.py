"""Matrix instructions of PTX as Python: mma, ldmatrix, stmatrix, and wgmma with its fences."""

from __future__ import annotations

import re

from .emitter import Emitter
from .findings import EmulationError
from .syntax import Instruction, Operand

_MMA = {
    ("m16n8k32", "satfinite", "s32", "s8", "s8", "s32"): ("i1", "i4", True),
    ("m16n8k32", "s32", "s8", "s8", "s32"): ("i1", "i4", False),
    ("m16n8k16", "f32", "f16", "f16", "f32"): ("f2", "f4", False),
}
"""Element, total and whether sums saturate, of mma by shape and types."""

_WGMMA = {
    ("k32", "s32", "s8", "s8"): ("i1", "i4", []),
    ("k16", "f32", "f16", "f16"): ("f2", "f4", [1, 1, 0]),
}
"""Element, total, and the operands after the predicate (signs of A and B, order of B)."""


class Matrices(Emitter):
    """Methods ``op_mma``, ... for an opcode each: (instruction, its modifiers)."""

    accumulators: set[str]
    """Variables of the registers of D of all wgmma."""
    a_registers: set[str]
    """Variables of the registers of A of all wgmma."""

    def _list(self, operand: Operand) -> str:
        return ", ".join(map(self.register, operand.items))

    def _by_name(self, names: list[str]) -> str:
        return f"dict({', '.join(f'{name}={name}' for name in names)})"

    # ---- mma.sync ----

    def op_mma(self, s: Instruction, parts: list[str]) -> None:
        self.without_guard(s)
        sync, aligned, shape, *order = parts[:5]
        types = (shape, *parts[5:])
        if (sync, aligned, order) != ("sync", "aligned", ["row", "col"]) or types not in _MMA:
            raise EmulationError("unknown mma")
        element, total, saturate = _MMA[types]
        d, a, b, c = s.operands
        left, right = f"matrix_a([{self._list(a)}], {element})", f"matrix_b([{self._list(b)}], {element})"
        added = f"from_accumulator([{self._list(c)}], {total})"
        product = f"multiply({added}, {left}, {right}, warp, {s.line}, {saturate})"
        self.emit(f"{self._list(d)} = to_accumulator({product})", s)
        self.defined |= set(map(self.register, d.items))

    def _matrix_transfer(self, s: Instruction, parts: list[str]) -> tuple[int, bool]:
        """Return (number of matrices, whether they are transposed) of ldmatrix and stmatrix."""
        self.without_guard(s)
        transposed = "trans" in parts
        count = {"x1": 1, "x2": 2, "x4": 4}.get(parts[3])
        expected = ["sync", "aligned", "m8n8", parts[3], *["trans"] * transposed, "shared", "b16"]
        if parts != expected or count is None:
            raise EmulationError("unknown transfer of matrices")
        return count, transposed

    def op_ldmatrix(self, s: Instruction, parts: list[str]) -> None:
        count, transposed = self._matrix_transfer(s, parts)
        loaded = f"load_matrices(warp, {self.address(s.operands[1])}, {count}, {transposed}, {s.line})"
        self.emit(f"{self._list(s.operands[0])}, = {loaded}", s)
        self.defined |= set(map(self.register, s.operands[0].items))

    def op_stmatrix(self, s: Instruction, parts: list[str]) -> None:
        _, transposed = self._matrix_transfer(s, parts)
        to, of = self.address(s.operands[0]), self._list(s.operands[1])
        self.emit(f"store_matrices(warp, {to}, [{of}], {transposed}, {s.line})", s)

    # ---- wgmma ----

    def op_fence(self, s: Instruction, parts: list[str]) -> None:
        self.without_guard(s)
        if parts != ["proxy", "async", "shared::cta"]:
            raise EmulationError("unknown fence")
        self.emit("warp.block.shared.fence(warp)", s)

    def op_wgmma(self, s: Instruction, parts: list[str]) -> None:
        self.without_guard(s)
        what, *modifiers = parts
        if modifiers[:2] != ["sync", "aligned"]:
            raise EmulationError("unknown wgmma")
        if what == "mma_async":
            self._multiply_async(s, modifiers[2:])
        elif what == "commit_group":
            self.emit("warp.commit_products()", s)
        elif what == "wait_group":
            self.emit("yield", s)
            held, read = sorted(self.accumulators), sorted(self.a_registers)
            waited = f"{s.operands[0].value}, {self._by_name(held)}, {self._by_name(read)}, {s.line}"
            self.emit(f"{', '.join(held)}, = warp.wait_products({waited})", s)
        elif what != "fence":  # what a fence orders is checked by `check_wgmma_fences`
            raise EmulationError("unknown wgmma")

    def _multiply_async(self, s: Instruction, parts: list[str]) -> None:
        shape = re.fullmatch(r"m64n(\d+)(k\d+)", parts[0])
        types = (shape[2], *parts[1:]) if shape else ()
        if types not in _WGMMA:
            raise EmulationError("unknown wgmma")
        element, total, rest = _WGMMA[types]
        d, a, descriptor, added, *others = s.operands
        if [operand.value for operand in others] != rest:
            raise EmulationError("signs or order of the operands")
        if a.kind != "list":
            raise EmulationError("A in shared memory")
        names = (self._by_name([self.register(item) for item in operand.items]) for operand in (d, a))
        how = f"{self.value(descriptor, 'u64')}, {self.value(added, 'pred')}, {shape[1]}, {element}, {total}, {s.line}"
        self.emit("yield", s)
        self.emit(f"{self._list(d)}, = warp.multiply_async({', '.join(names)}, {how})", s)


def check_wgmma_fences(statements: list[Instruction | str]) -> None:
    """Check that nothing writes the registers of a wgmma between it and the wgmma.fence before it (9.7.15.6).

    What may not happen between a wgmma and its completion is checked while it runs.
    """
    for i, s in enumerate(statements):
        if isinstance(s, str) or not s.opcode.startswith("wgmma.mma_async"):
            continue
        d, a = (operand.registers() for operand in s.operands[:2])
        for other in reversed(statements[:i]):
            if isinstance(other, str):
                if other.startswith("$L__tmp"):  # a place of debug information, no target
                    continue
                raise EmulationError(f"line {s.line}: wgmma without wgmma.fence")
            if other.opcode.startswith("wgmma.fence"):
                break
            if other.opcode.startswith("bra"):
                raise EmulationError(f"line {s.line}: wgmma without wgmma.fence")
            if other.written & a or (other.written & d and not other.opcode.startswith("wgmma.mma_async")):
                raise EmulationError(f"line {s.line}: {other.text!r} after wgmma.fence")
        else:
            raise EmulationError(f"line {s.line}: wgmma without wgmma.fence")
