"""A PTX kernel as a Python generator function that runs one warp."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import fragments, lanes
from .arithmetic import Arithmetic
from .emitter import DTYPES, UNSIGNED, variable
from .findings import EmulationError
from .matrices import Matrices, check_wgmma_fences
from .syntax import Instruction, parse
from .transfers import Transfers

_NAMES = {
    **{name: function for module in (lanes, fragments) for name, function in vars(module).items() if name[0] != "_"},
    **DTYPES,
    "np": np,
}
"""What generated code calls."""


class Translation(Arithmetic, Transfers, Matrices):
    """A translated kernel. Labels become numbers of parts of a loop, a branch the next part's number.

    Raises:
        EmulationError: it has an instruction, modifier or operand that is not known.
    """

    run: Callable[[Any], Iterator[int | None]]
    """run(warp): the steps of a warp."""

    def __init__(self, ptx: str) -> None:
        super().__init__(parse(ptx))
        self.segments: list[list[Instruction]] = []
        """Instructions that are executed together, so that they can be counted together."""
        instructions = [each for each in self.kernel.statements if isinstance(each, Instruction)]
        check_wgmma_fences(self.kernel.statements)
        products = [each for each in instructions if each.opcode.startswith("wgmma.mma_async")]
        self.accumulators = {variable(name) for each in products for name in each.operands[0].registers()}
        self.a_registers = {variable(name) for each in products for name in each.operands[1].registers()}
        labels = [each for each in self.kernel.statements if isinstance(each, str)]
        self.labels = {label: number for number, label in enumerate(labels, 1)}
        self._begin(instructions)
        self._translate()
        self.file = f"<{self.kernel.name} {id(self)}>"
        names = {**_NAMES, **self.constants}
        exec(compile("\n".join(self.source), self.file, "exec"), names)
        self.run = names["run"]

    def _begin(self, instructions: list[Instruction]) -> None:
        held = sorted(self.accumulators | self.a_registers)
        self.defined |= set(held)
        self.source += ["def run(warp):", *(f"  {name} = UNDEFINED" for name in held)]
        written, read = (set().union(*sets) for sets in zip(*((s.written, s.read) for s in instructions), strict=True))
        for name in sorted(read - written):  # LLVM's undef, in a half of a pair that does not matter
            if re.match(r"%(r|rd|rs)\d", name):
                self.source.append(f"  {variable(name)} = warp.garbage({UNSIGNED[self.kernel.width(name)]})")
        self.source += ["  yield", "  pc = 0", "  while True:", "    if pc == 0:"]

    def _translate(self) -> None:
        self._begin_segment()
        for statement in self.kernel.statements:
            if isinstance(statement, str):
                self.emit(f"pc = {self.labels[statement]}")
                self.source.append(f"    if pc == {self.labels[statement]}:")
                self._begin_segment()
                continue
            self.segments[-1].append(statement)
            try:
                self._instruction(statement)
            except (EmulationError, KeyError, IndexError, ValueError, TypeError) as error:
                words = error if isinstance(error, EmulationError) else repr(error)
                raise EmulationError(f"line {statement.line}: {statement.text}: {words}") from error
            if statement.opcode.startswith("bra"):
                self._begin_segment()
        self.emit("raise EmulationError('ran off the end')")

    def _begin_segment(self) -> None:
        self.emit(f"warp.entered[{len(self.segments)}] += 1")
        self.segments.append([])

    def _instruction(self, statement: Instruction) -> None:
        opcode, *parts = statement.opcode.split(".")
        method = getattr(self, f"op_{opcode}", None)
        if method is None:
            raise EmulationError("unknown opcode")
        method(statement, parts)

    def executed(self, entered: np.ndarray) -> Counter[str]:
        """Return how many instructions of each opcode were executed, from how often each segment was entered."""
        counts: Counter[str] = Counter()
        for instructions, times in zip(self.segments, entered.tolist(), strict=True):
            for instruction in instructions:
                counts[instruction.opcode] += times
        return counts
