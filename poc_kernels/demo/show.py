"""The demonstration's output in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .client import Progress
from .results import Check, Results


class Show:
    """Writes to a console; text is shown as it is, even if it looks like markup."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        """Write a line."""
        self._console.print(Text(text))

    def note(self, text: str) -> None:
        """Write a remark, dimmed."""
        self._console.print(Padding(Text(text, style="dim"), (0, 0, 0, 10)))

    def act(self, state: str, text: str) -> None:
        """Write the heading of an act: the node's state and what happens."""
        self._console.print()
        self._console.print(Text.assemble((state, "bold"), f"  {text}"))

    def check(self, check: Check) -> None:
        """Write a check and its outcome."""
        outcome = ("ok      ", "green") if check.passed else ("FAILED  ", "bold red")
        self._console.print(Text.assemble("  ", outcome, check.name))
        if check.detail:
            self.note(check.detail)

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """Show a line that the yielded function updates by a round's progress."""
        with self._console.status("") as line:

            def update(progress: Progress) -> None:
                found = f"{progress.checked} nonces checked, {progress.valid} valid"
                line.update(f"{found}, {progress.rate:.0f} per second")

            yield update

    def summary(self, results: Results) -> None:
        """Write the closing table, and whether all checks passed."""
        table = Table(show_header=False)
        for name, value in results.summary():
            table.add_row(Text(name), Text(value))
        self._console.print()
        self._console.print(table)
        outcome = Text(f"all {len(results.checks)} checks passed", style="bold green")
        if results.failed:
            outcome = Text(f"{results.failed} of {len(results.checks)} checks FAILED", style="bold red")
        self._console.print(outcome)
