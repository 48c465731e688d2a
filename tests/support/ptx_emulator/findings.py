"""What goes wrong under emulation."""

from __future__ import annotations

from collections import Counter


class EmulationError(Exception):
    """A GPU must not be asked to do this, or the emulator does not know it. The emulation ends."""


class Findings:
    """Faults that do not end the emulation, and notes, which are no faults: counts by (kernel, line of PTX, what)."""

    def __init__(self) -> None:
        self.faults: Counter[tuple[str, int, str]] = Counter()
        self.notes: Counter[tuple[str, int, str]] = Counter()
        self.kernel = ""
        """The kernel that runs."""

    def fault(self, what: str, line: int) -> None:
        """Count a fault."""
        self.faults[self.kernel, line, what] += 1

    def note(self, what: str, line: int) -> None:
        """Count what need not be wrong."""
        self.notes[self.kernel, line, what] += 1
