"""PTX text to statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .findings import EmulationError

_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "s32": 32, "u32": 32}


@dataclass(frozen=True)
class Operand:
    """An operand of an instruction."""

    kind: str
    """register, number, symbol, list (items in braces), address ([items[0] + value]) or sink ("_")."""
    name: str = ""
    value: int = 0
    """Of a number; an address's offset in bytes. Floats are the integers of their bits."""
    items: tuple[Operand, ...] = ()

    def registers(self) -> set[str]:
        """Return the names of all registers in it."""
        return {self.name} if self.kind == "register" else set().union(*(item.registers() for item in self.items))


# Of these the first operand is no result.
_NO_RESULT = ("st.", "red.", "bra", "cp.", "stmatrix", "bar")


@dataclass(frozen=True)
class Instruction:
    """One instruction with its guard."""

    opcode: str
    """With its modifiers: "ld.global.v4.b32"."""
    operands: tuple[Operand, ...]
    line: int
    """Of the PTX, from 1."""
    text: str
    guard: str | None = None
    """The predicate register that it depends on."""
    negated: bool = False
    """It runs where the guard is false."""

    @property
    def written(self) -> set[str]:
        """Registers that it writes."""
        return self.operands[0].registers() if self._has_result else set()

    @property
    def read(self) -> set[str]:
        """Registers that it reads, its guard not included."""
        return set().union(*(operand.registers() for operand in self.operands[self._has_result :]))

    @property
    def _has_result(self) -> bool:
        return bool(self.operands) and self.operands[0].kind != "address" and not self.opcode.startswith(_NO_RESULT)


@dataclass
class Kernel:
    """The one entry of a module."""

    name: str
    parameters: list[tuple[str, str]]
    """Name and type ("u64", "u32") of each."""
    threads: int
    """Per block."""
    lines: list[str]
    """Of the PTX."""
    widths: dict[str, int] = field(default_factory=dict)
    """Bits of a register, by the letters that its name begins with."""
    statements: list[Instruction | str] = field(default_factory=list)
    """In their order; a str is a label."""

    def width(self, register: str) -> int:
        """Return the bits of a register."""
        found = re.match(r"%[a-zA-Z]+", register)
        if found is None or found[0] not in self.widths:
            raise EmulationError(f"register {register} is not declared")
        return self.widths[found[0]]


def parse(ptx: str) -> Kernel:
    """Read the one entry of a module."""
    # A scope of inline assembly with one register of its own, as Triton writes it.
    ptx = re.sub(r"\{ \.reg \.u32 t; (.*?) \}", lambda scope: re.sub(r"\bt\b", "%scoped1", scope[1]), ptx)
    entries = list(re.finditer(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, re.S))
    if len(entries) != 1 or ".func" in ptx:
        raise EmulationError(f"{len(entries)} entries, or functions besides")
    (entry,) = entries
    parameters = []
    for parameter in entry[2].split(","):
        kind = re.search(r"\.param \.([ubsf]\d+)", parameter)
        if kind is None:
            raise EmulationError(f"parameter {parameter!r}")
        parameters.append((parameter.split()[-1], kind[1]))
    threads = re.search(r"\.reqntid (\d+)", entry[3])
    if threads is None:
        raise EmulationError("no .reqntid")
    kernel = Kernel(entry[1], parameters, int(threads[1]), ptx.split("\n"), {"%scoped": 32})
    first, pending = ptx.count("\n", 0, entry.start(4)) + 1, ""
    for line, whole in enumerate(entry[4].split("\n"), first):
        text = re.sub(r"//.*", "", whole).strip()
        if not text or re.match(r"\.(loc|pragma|file|section)\b", text):
            continue
        if declared := re.fullmatch(r"\.reg \.(\w+)\s+(%[a-z]+)<\d+>;", text):
            kernel.widths[declared[2]] = _WIDTHS[declared[1]]
        elif label := re.fullmatch(r"([$\w]+):", text):
            kernel.statements.append(label[1])
        else:
            *done, pending = f"{pending} {text}".split(";")
            kernel.statements += [_instruction(each.strip(), line) for each in done if each.strip()]
            pending = pending.strip()
    if pending:
        raise EmulationError(f"statement without an end: {pending!r}")
    return kernel


def _instruction(text: str, line: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if not found:
        raise EmulationError(f"line {line}: {text!r}")
    return Instruction(found[3], tuple(map(_operand, _split(found[4]))), line, text, found[2], bool(found[1]))


def _split(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> Operand:
    if text == "_":
        return Operand("sink")
    if text.startswith("{"):
        return Operand("list", items=tuple(map(_operand, _split(text[1:-1]))))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Operand("address", items=(_operand(base),), value=int(offset or "0", 0))
    if text.startswith("%"):
        return Operand("register", text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Operand("number", value=int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Operand("number", value=int(text.rstrip("U"), 0))
    if re.fullmatch(r"[\w$.]+", text):
        return Operand("symbol", text)
    raise EmulationError(f"operand {text!r}")
