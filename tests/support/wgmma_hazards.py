"""Hazards of asynchronous matrix products (wgmma) that show in compiled code for sm_90 only."""

from __future__ import annotations

import re
from typing import NamedTuple

from triton_compiled import Code, Instruction

_GMMA = re.compile(r"R(\d+), R(\d+), gdesc")
_NUMBER_OF_A_REGISTERS = 4

# Of these no register of a thread is the result; uniform instructions begin with U.
_NO_RESULT = (
    *(
        "ST",
        "RED",
        "BAR",
        "BRA",
        "EXIT",
        "LDGSTS",
        "LDGDEPBAR",
        "DEPBAR",
        "WARPGROUP",
        "FENCE",
        "NOP",
        "U",
        "R2UR",
        "RET",
    ),
    *(
        "ISETP",
        "FSETP",
        "HSETP",
        "DSETP",
        "PLOP3",
        "WARPSYNC",
        "CCTL",
        "MEMBAR",
        "ERRBAR",
        "VOTEU",
        "BSYNC",
        "BSSY",
        "CALL",
    ),
)
_FOUR_WIDE = re.compile(r"\.128\b|\.4$")
_TWO_WIDE = re.compile(r"\.64\b|WIDE|^(DADD|DMUL|DFMA|CS2R)|\.2$")


def written_registers(instruction: Instruction) -> range:
    """The registers of a thread that a SASS instruction writes, more rather than fewer."""
    opcode = instruction.opcode
    found = re.match(r"(?:U?P\w+, )?R(\d+)", instruction.operands)
    if opcode.startswith(_NO_RESULT) or not found:
        return range(0)
    first = int(found[1])
    if "GMMA" in opcode:
        shape = re.search(r"64x(\d+)x", opcode)
        assert shape, opcode
        return range(first, first + int(shape[1]) // 2)
    width = 4 if _FOUR_WIDE.search(opcode) else 2 if _TWO_WIDE.search(opcode) else 1
    return range(first, first + width)


class Overwrites(NamedTuple):
    """What `overwritten_operands` finds."""

    products: int
    """wgmma with A in registers."""
    wrong: list[str]
    """"product <- instruction" for each write of a register of A before the product must have read it."""


def overwritten_operands(code: Code) -> Overwrites:
    """Find writes of registers of A that a wgmma may still be reading.

    ptxas of CUDA 12.9 and Triton 3.6 are known to make such code (triton-lang/triton#11781, #9433). From each product
    every path is followed until a wait leaves fewer groups under way than were committed after it.
    """
    products, wrong = 0, set()
    for start, product in enumerate(code.instructions):
        found = _GMMA.match(product.operands) if "GMMA" in product.opcode else None
        if found:
            products += 1
            a = set(range(int(found[2]), int(found[2]) + _NUMBER_OF_A_REGISTERS))
            wrong |= {f"{product} <- {other}" for other in _writes_before_the_wait(code, start, a)}
    return Overwrites(products, sorted(wrong))


def _writes_before_the_wait(code: Code, start: int, registers: set[int]) -> set[Instruction]:
    instructions = code.instructions
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    # Next instruction, and groups committed after the product's own; -1: its own is not committed yet.
    todo = [(start + 1, 0 if "gsb0" in instructions[start].operands else -1)]
    seen: set[tuple[int, int]] = set()
    writes = set()
    while todo:
        i, later = todo.pop()
        if (i, later) in seen or i >= len(instructions):
            continue
        seen.add((i, later))
        here = instructions[i]
        if here.opcode.startswith("WARPGROUP.DEPBAR") and later >= int(here.operands.split(",")[1], 16):
            continue
        if registers & set(written_registers(here)):
            writes.add(here)
            continue
        if "GMMA" in here.opcode and "gsb0" in here.operands:
            later = min(later + 1, 8)
        if here.opcode.startswith("EXIT") and not here.predicate:
            continue
        if here.target is not None:
            todo.append((at[here.target], later))
            if not here.predicate and not re.match(r"!?U?P", here.operands) and "U" not in here.opcode.split(".")[-1]:
                continue
        todo.append((i + 1, later))
    return writes


def products_without_proxy_fence(code: Code) -> list[str]:
    """Find wgmma that no proxy fence precedes since the last wait for copies, in the order of addresses.

    cp.async writes shared memory through the generic proxy, wgmma reads it through the async one.
    """
    fenced, wrong = False, []
    for instruction in code:
        if instruction.opcode.startswith("DEPBAR"):  # of copies; of products it is WARPGROUP.DEPBAR
            fenced = False
        elif instruction.opcode.startswith("FENCE.VIEW.ASYNC"):
            fenced = True
        elif "GMMA" in instruction.opcode and not fenced:
            wrong.append(str(instruction))
    return wrong
