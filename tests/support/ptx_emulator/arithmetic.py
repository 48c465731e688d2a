"""Arithmetic, comparisons, conversions and moves of PTX as Python."""

from __future__ import annotations

from .emitter import UNSIGNED, Emitter, bits_of, dtype_of
from .findings import EmulationError
from .syntax import Instruction, Operand

_COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_FLOATS = ("f16", "f32", "f64", "f16x2", "f32x2")
_INTEGERS = "[sub](16|32|64)"
_LOGICAL = "b16|b32|b64|pred"
_ROUNDINGS = ("rzi", "rni", "rmi", "rpi")
_SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid")


class Arithmetic(Emitter):
    """Methods ``op_add``, ... for an opcode each: (instruction, its modifiers)."""

    # ---- sums and products ----

    def _binary(self, s: Instruction, parts: list[str], sign: str, kinds: str = _INTEGERS) -> None:
        a, b = s.operands[1:]
        if parts == ["rn", "f32", "f16"] and sign in "+-":  # 9.7.5: the first is converted, exactly
            mixed = f"{self.value(a, 'f16')}.astype(f4) {sign} {self.value(b, 'f32')}"
            self.assign(s, s.operands[0], f"canonical({mixed})")
        elif parts[-1] in _FLOATS and sign in "+-*":
            self._float(s, parts, sign, a, b)
        elif parts in (["s16x2"], ["u16x2"]) and sign in "+-":  # each half by itself
            self.assign(
                s, s.operands[0], f"({self.value(a, 'b32')}.view(u2) {sign} {self.value(b, 'b32')}.view(u2)).view(u4)"
            )
        else:
            _, kind = self.split_type(parts, (), kinds)
            if kind != "pred":
                kind = "u" + kind[1:]  # wraps all the same
            self.assign(s, s.operands[0], f"{self.value(a, kind)} {sign} {self.value(b, kind)}")

    def _float(self, s: Instruction, parts: list[str], sign: str, a: Operand, b: Operand) -> None:
        modifiers, kind = self.split_type(parts, ("rn",), "|".join(_FLOATS))
        if modifiers != ["rn"] and kind != "f16":
            raise EmulationError("may be contracted by the assembler")
        if kind.endswith("x2"):
            whole, part = ("b32", "f2") if kind == "f16x2" else ("b64", "f4")
            pair = f"{self.value(a, whole)}.view({part}) {sign} {self.value(b, whole)}.view({part})"
            self.assign(s, s.operands[0], f"canonical({pair}).view({dtype_of(whole)})")
        else:
            self.assign(s, s.operands[0], f"canonical({self.value(a, kind)} {sign} {self.value(b, kind)})")

    def op_add(self, s: Instruction, parts: list[str]) -> None:
        self._binary(s, parts, "+")

    def op_sub(self, s: Instruction, parts: list[str]) -> None:
        self._binary(s, parts, "-")

    def _product(self, parts: list[str], a: Operand, b: Operand) -> tuple[str, str]:
        """Return (type, expression) of the product in mul and mad of integers."""
        how, kind = parts
        if how == "lo":
            kind = "u" + kind[1:]  # wraps all the same
            return kind, f"{self.value(a, kind)} * {self.value(b, kind)}"
        if bits_of(kind) > 32 or how not in ("wide", "hi"):
            raise EmulationError("unknown product")
        wide = kind[0] + str(bits_of(kind) * 2)
        x, y = (f"{self.value(operand, kind)}.astype({dtype_of(wide)})" for operand in (a, b))
        if how == "wide":
            return wide, f"{x} * {y}"
        return kind, f"(({x} * {y}) >> {dtype_of(wide)}({bits_of(kind)})).astype({dtype_of(kind)})"

    def op_mul(self, s: Instruction, parts: list[str]) -> None:
        if parts[-1] in _FLOATS:
            self._binary(s, parts, "*")
        else:
            self.result(s, *self._product(parts, *s.operands[1:]))

    def op_mad(self, s: Instruction, parts: list[str]) -> None:
        kind, product = self._product(parts, *s.operands[1:3])
        self.result(s, kind, f"{product} + {self.value(s.operands[3], kind)}")

    def op_fma(self, s: Instruction, parts: list[str]) -> None:
        if parts != ["rn", "f64"]:
            raise EmulationError("unknown fma")
        self.assign(s, s.operands[0], f"canonical(fma64({self.values(s.operands[1:], 'f64')}))")

    def op_div(self, s: Instruction, parts: list[str]) -> None:
        if parts == ["full", "f32"]:
            quotient = f"about_quotient({self.values(s.operands[1:], 'f32')}, warp.random)"
            self.assign(s, s.operands[0], f"canonical({quotient})")
        else:
            self._divide(s, parts, False)

    def op_rem(self, s: Instruction, parts: list[str]) -> None:
        self._divide(s, parts, True)

    def _divide(self, s: Instruction, parts: list[str], remainder: bool) -> None:
        _, kind = self.split_type(parts, (), "[su]32|s64")
        self.result(s, kind, f"divide({self.values(s.operands[1:], kind)}, {s.line}, {remainder})")

    def op_sqrt(self, s: Instruction, parts: list[str]) -> None:
        if parts not in (["rn", "f32"], ["rn", "f64"]):
            raise EmulationError("unknown sqrt")
        self.assign(s, s.operands[0], f"canonical(np.sqrt({self.value(s.operands[1], parts[1])}))")

    # ---- least, largest, signs ----

    def _extreme(self, s: Instruction, parts: list[str], name: str) -> None:
        _, kind = self.split_type(parts, (), "[su](16|32|64)|f32")
        values = self.values(s.operands[1:], kind)
        if kind == "f32":
            self.assign(s, s.operands[0], f"canonical(np.f{name}({values}))")
        else:
            self.result(s, kind, f"np.{name}imum({values})")

    def op_min(self, s: Instruction, parts: list[str]) -> None:
        self._extreme(s, parts, "min")

    def op_max(self, s: Instruction, parts: list[str]) -> None:
        self._extreme(s, parts, "max")

    def op_neg(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "s(16|32|64)|f32|f64")
        unsigned = f"u{bits_of(kind)}"
        a = self.value(s.operands[1], unsigned)
        if kind[0] == "f":
            expression = f"{a} ^ {self.constant(1 << bits_of(kind) - 1, dtype_of(unsigned))}"
        else:
            expression = f"{self.constant(0, dtype_of(unsigned))} - {a}"
        self.assign(s, s.operands[0], expression)

    def op_abs(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "s(16|32|64)|f32|f16x2")
        if kind[0] == "f":  # of both halves
            without_sign = {"f32": 0x7FFFFFFF, "f16x2": 0x7FFF7FFF}[kind]
            self.assign(s, s.operands[0], f"{self.value(s.operands[1], 'u32')} & {self.constant(without_sign, 'u4')}")
        else:
            self.result(s, kind, f"np.abs({self.value(s.operands[1], kind)})")

    # ---- bits ----

    def op_and(self, s: Instruction, parts: list[str]) -> None:
        self._binary(s, parts, "&", _LOGICAL)

    def op_or(self, s: Instruction, parts: list[str]) -> None:
        self._binary(s, parts, "|", _LOGICAL)

    def op_xor(self, s: Instruction, parts: list[str]) -> None:
        self._binary(s, parts, "^", _LOGICAL)

    def op_not(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), _LOGICAL)
        self.assign(s, s.operands[0], f"~{self.value(s.operands[1], kind)}")

    def op_shl(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "b(16|32|64)")
        a, n = self.value(s.operands[1], kind), s.operands[2]
        if n.kind == "number" and 0 <= n.value < bits_of(kind):
            self.assign(s, s.operands[0], f"{a} << {self.constant(n.value, dtype_of(kind))}")
        else:
            self.assign(s, s.operands[0], f"shift_left({a}, {self.value(n, 'u32')})")

    def op_shr(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "[usb](16|32|64)")
        a, n = self.value(s.operands[1], kind), s.operands[2]
        if n.kind == "number" and 0 <= n.value < bits_of(kind):
            amount = self.constant(n.value, UNSIGNED[bits_of(kind)])
            self.result(s, kind, f"{a} >> {amount}.view({dtype_of(kind)})")
        else:
            self.result(s, kind, f"shift_right({a}, {self.value(n, 'u32')})")

    def op_shf(self, s: Instruction, parts: list[str]) -> None:
        if parts not in (["l", "wrap", "b32"], ["r", "wrap", "b32"]):
            raise EmulationError("unknown shf")
        self.assign(s, s.operands[0], f"funnel({self.values(s.operands[1:], 'u32')}, {parts[0] == 'l'})")

    def op_bfe(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "[su]32")
        value, where = self.value(s.operands[1], kind), self.values(s.operands[2:], "u32")
        self.result(s, kind, f"bit_field({value}, {where})")

    def op_prmt(self, s: Instruction, parts: list[str]) -> None:
        if parts != ["b32"]:
            raise EmulationError("unknown mode")
        self.assign(s, s.operands[0], f"permute_bytes({self.values(s.operands[1:], 'b32')})")

    def op_lop3(self, s: Instruction, parts: list[str]) -> None:
        if parts != ["b32"] or len(s.operands) != 5:
            raise EmulationError("unknown lop3")
        self.assign(s, s.operands[0], f"lop3({self.values(s.operands[1:4], 'b32')}, {s.operands[4].value})")

    # ---- comparisons and moves ----

    def op_setp(self, s: Instruction, parts: list[str]) -> None:
        comparison, kind = parts
        if len(s.operands) != 3:
            raise EmulationError("two results")
        a, b = (self.value(operand, kind) for operand in s.operands[1:])
        if kind[0] != "f":
            value = f"{a} {_COMPARISONS[comparison]} {b}"
        elif comparison == "nan":
            value = f"np.isnan({a}) | np.isnan({b})"
        elif comparison.endswith("u"):  # true as well where there is no order
            value = f"({a} {_COMPARISONS[comparison[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
        else:
            value = f"({a} {_COMPARISONS[comparison]} {b}) & ~np.isnan({a}) & ~np.isnan({b})"
        self.assign(s, s.operands[0], value)

    def op_selp(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "[bsuf](16|32|64)")
        predicate = self.value(s.operands[3], "pred")
        self.assign(s, s.operands[0], f"np.where({predicate}, {self.values(s.operands[1:3], 'u' + kind[1:])})")

    def op_mov(self, s: Instruction, parts: list[str]) -> None:
        _, kind = self.split_type(parts, (), "[bsuf](16|32|64)|pred")
        to, of = s.operands
        if of.kind == "register" and of.name.split(".")[0] in _SPECIAL:
            self.assign(s, to, f"warp.special({of.name!r})")
        elif of.kind == "register" and of.name == "%laneid":
            self.assign(s, to, "LANES.astype(u4)")
        elif of.kind == "register" and of.name == "%lanemask_lt":
            self.assign(s, to, "((1 << LANES.astype(u8)) - 1).astype(u4)")
        elif kind == "pred":
            self.assign(s, to, self.value(of, kind))
        elif to.kind == "list":  # the first part is the lowest
            n, part = len(to.items), UNSIGNED[bits_of(kind) // len(to.items)]
            self.emit(f"parts = {self.value(of, 'u' + kind[1:])}.view({part}).reshape(32, {n})", s)
            for i, item in enumerate(to.items):
                self.assign(s, item, f"parts[:, {i}].copy()")
        elif of.kind == "list":
            items = self.values(of.items, "u" + str(bits_of(kind) // len(of.items)))
            self.assign(s, to, f"np.stack([{items}], axis=1).reshape(-1).view({dtype_of('u' + kind[1:])})")
        else:
            self.assign(s, to, self.value(of, "u" + kind[1:]))

    # ---- conversions ----

    def op_cvt(self, s: Instruction, parts: list[str]) -> None:
        *modifiers, to, of = parts
        if to[0] == "f" or of[0] == "f" or to == "bf16":
            self._convert_float(s, modifiers, to, of)
            return
        if modifiers:
            raise EmulationError("unknown modifier")
        value = f"{self.value(s.operands[1], of, low_bits=True)}.astype({dtype_of(to)})"
        width = self.kernel.width(s.operands[0].name)
        if width > bits_of(to):  # the register is wider than the type: its sign goes on, or zeros
            value = f"{value}.astype({dtype_of(to[0] + str(width))})"
        self.assign(s, s.operands[0], f"{value}.view({UNSIGNED[width]})")

    def _convert_float(self, s: Instruction, modifiers: list[str], to: str, of: str) -> None:
        if (to, of, modifiers) == ("f16x2", "f32", ["rn"]):  # the first is the upper half
            high, low = (self.value(operand, of) for operand in s.operands[1:])
            halves = f"[canonical({low}.astype(f2)), canonical({high}.astype(f2))]"
            self.assign(s, s.operands[0], f"np.stack({halves}, axis=1).reshape(-1).view(u4)")
            return
        value = self.value(s.operands[1], of)
        if of[0] != "f" and modifiers == ["rn"]:
            expression = f"{value}.astype({dtype_of(to)}).view({UNSIGNED[bits_of(to)]})"
        elif of[0] == "f" and to[0] in "us" and len(modifiers) == 1 and modifiers[0] in _ROUNDINGS:
            expression = f"to_integer({value}, {dtype_of(to)}, {modifiers[0]!r}).view({UNSIGNED[bits_of(to)]})"
        elif (to, of, modifiers) == ("bf16", "f32", ["rn"]):
            expression = f"to_bfloat16({value})"
        elif to[0] == "f" and of[0] == "f" and modifiers == ([] if bits_of(to) > bits_of(of) else ["rn"]):
            expression = f"canonical({value}.astype({dtype_of(to)}))"
        else:
            raise EmulationError("unknown conversion")
        self.assign(s, s.operands[0], expression)
