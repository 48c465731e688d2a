"""Memory, atomics, copies, barriers and branches of PTX as Python.

The function yields where other warps may get ahead: at barriers (the number of the line), and around memory that
several warps share.
"""

from __future__ import annotations

from .emitter import UNSIGNED, Emitter, bits_of, dtype_of
from .findings import EmulationError
from .syntax import Instruction, Operand

_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared"}
_COPIES = (
    ["async", "cg", "shared", "global"],
    ["async", "cg", "shared", "global", "L2::128B"],
    ["async", "ca", "shared", "global"],
)
_ALL_LANES = 2**32 - 1


class Transfers(Emitter):
    """Methods ``op_ld``, ... for an opcode each: (instruction, its modifiers)."""

    labels: dict[str, int]

    # ---- loads and stores ----

    def _access(self, parts: list[str], caches: tuple[str, ...], registers: Operand) -> tuple[str, str, list[Operand]]:
        """Return (space, type of an element, registers) of ld and st."""
        space, *modifiers, kind = parts
        items = list(registers.items) if registers.kind == "list" else [registers]
        vectors = [modifier for modifier in modifiers if modifier in ("v2", "v4")]
        if space not in _SPACES or not set(modifiers) <= {*vectors, *caches}:
            raise EmulationError("unknown space or modifier")
        if len(items) != (int(vectors[0][1]) if vectors else 1):
            raise EmulationError("number of registers")
        return _SPACES[space], kind, items

    def op_ld(self, s: Instruction, parts: list[str]) -> None:
        if parts[0] == "param":
            _, kind = parts
            name = s.operands[1].items[0].name
            self.assign(s, s.operands[0], f"warp.parameter({name!r}, {UNSIGNED[bits_of(kind)]})")
            return
        space, kind, items = self._access(parts, ("cg",), s.operands[0])
        if space == "global":
            self.emit("yield", s)
        where = f"{self.address(s.operands[1])}, {self.guard(s)}"
        self.emit(f"parts = warp.load_{space}({where}, {dtype_of(kind)}, {len(items)}, {s.line})", s)
        for i, item in enumerate(items):
            width, bits = self.kernel.width(item.name), bits_of(kind)
            if width < bits:
                raise EmulationError("register is too narrow")
            extended = f".astype({'i' if kind[0] == 's' else 'u'}{width // 8})" if width > bits else ""
            self.assign(s, item, f"parts[{i}]{extended}.view({UNSIGNED[width]})")

    def op_st(self, s: Instruction, parts: list[str]) -> None:
        space, kind, items = self._access(parts, (), s.operands[1])
        values = ", ".join(self.value(item, f"u{bits_of(kind)}", low_bits=True) for item in items)
        self.emit(f"warp.store_{space}({self.address(s.operands[0])}, {self.guard(s)}, ({values},), {s.line})", s)

    # ---- atomics ----

    def _addition(self, s: Instruction, address: Operand, value: Operand) -> str:
        return f"{self.address(address)}, {self.guard(s)}, {self.value(value, 'u32')}, {s.line}"

    def op_atom(self, s: Instruction, parts: list[str]) -> None:
        to, address, value = s.operands
        if parts == ["global", "gpu", "acq_rel", "add", "u32"]:
            self.emit("yield", s)
            self.assign(s, to, f"warp.atomic_add({self._addition(s, address, value)})")
        elif parts == ["global", "gpu", "relaxed", "add", "u32"]:  # Triton before 3.7; nothing may use the result
            self.emit(f"warp.add_later({self._addition(s, address, value)})", s)
            self.emit(f"{self.register(to)} = UNDEFINED", s)
        else:
            raise EmulationError("unknown atomic")
        self.emit("yield", s)

    def op_red(self, s: Instruction, parts: list[str]) -> None:
        if parts != ["global", "gpu", "relaxed", "add", "u32"]:
            raise EmulationError("unknown reduction")
        self.emit(f"warp.add_later({self._addition(s, *s.operands)})", s)
        self.emit("yield", s)

    # ---- cp.async ----

    def op_cp(self, s: Instruction, parts: list[str]) -> None:
        if parts in _COPIES:
            size = s.operands[2].value
            given = self.value(s.operands[3], "u32") if len(s.operands) > 3 else self.constant(size, "u4")
            to, of = map(self.address, s.operands[:2])
            self.emit(f"warp.copy({to}, {of}, {size}, {given}, {self.guard(s)}, {s.line})", s)
            return
        self.without_guard(s)
        if parts == ["async", "commit_group"]:
            self.emit("warp.commit_copies()", s)
        elif parts == ["async", "wait_group"]:
            self.emit("yield", s)
            self.emit(f"warp.wait_copies({s.operands[0].value}, {s.line})", s)
        else:
            raise EmulationError("unknown cp")

    # ---- between lanes and warps ----

    def op_bar(self, s: Instruction, parts: list[str]) -> None:
        self.without_guard(s)
        (operand,) = s.operands
        if operand.kind != "number":
            raise EmulationError("barrier in a register")
        if parts == ["sync"] and operand.value == 0:
            self.emit(f"yield {s.line}", s)
        elif parts == ["warp", "sync"] and operand.value & _ALL_LANES == _ALL_LANES:
            self.emit("warp.sync_lanes()", s)
        else:
            raise EmulationError("unknown barrier")

    def _by_all_lanes(self, s: Instruction, mask: Operand) -> None:
        self.without_guard(s)
        self.emit(f"warp.all_lanes({self.value(mask, 'u32')}, {s.line})", s)

    def op_redux(self, s: Instruction, parts: list[str]) -> None:
        sync, operation, kind = parts
        if sync != "sync" or kind not in ("s32", "u32", "b32"):
            raise EmulationError("unknown redux")
        self._by_all_lanes(s, s.operands[2])
        self.result(s, kind, f"reduce({self.value(s.operands[1], kind)}, {operation!r})")

    def op_shfl(self, s: Instruction, parts: list[str]) -> None:
        whole_warp = Operand("number", value=31)
        if parts not in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]) or s.operands[3] != whole_warp:
            raise EmulationError("unknown shfl")
        self._by_all_lanes(s, s.operands[4])
        n = self.value(s.operands[2], "u32")
        lane = f"(LANES ^ {n} & u4(31)) & 31" if parts[1] == "bfly" else f"{n} & u4(31)"
        self.assign(s, s.operands[0], f"{self.value(s.operands[1], 'u32')}[{lane}]")

    # ---- control ----

    def op_bra(self, s: Instruction, parts: list[str]) -> None:
        if parts not in ([], ["uni"]):
            raise EmulationError("unknown branch")
        go = f"pc = {self.labels[s.operands[0].name]}; continue"
        self.emit(go if s.guard is None else f"if uniform({self.guard(s)}, {s.line}): {go}", s)

    def op_ret(self, s: Instruction, parts: list[str]) -> None:
        self.without_guard(s)
        if parts:
            raise EmulationError("unknown ret")
        self.emit("return", s)
