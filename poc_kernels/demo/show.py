"""The demonstration's output in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

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
            self._console.print(Padding(Text(check.detail, style="dim"), (0, 0, 0, 10)))

    @contextmanager
    def progress(self, seconds: float, proofs: int) -> Iterator[Callable[[float, dict[str, Any]], None]]:
        """Show a progress bar, which the yielded function updates with the seconds elapsed and the node's status."""
        columns = (
            BarColumn(bar_width=30),
            TextColumn("{task.fields[checked]} nonces checked, {task.fields[valid]} valid"),
            TextColumn("{task.fields[rate]:.0f} per second"),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("", total=1.0, checked=0, valid=0, rate=0.0)

            def update(elapsed: float, status: dict[str, Any]) -> None:
                done = min(1.0, status["total_valid"] / proofs, elapsed / seconds if seconds > 0 else 1.0)
                bar.update(
                    task,
                    completed=done,
                    checked=status["total_checked"],
                    valid=status["total_valid"],
                    rate=status["rate_per_second"],
                )

            yield update

    def summary(self, results: Results) -> None:
        """Write the closing table, and whether all checks passed."""
        table = Table(show_header=False)
        for name, value in results.summary():
            table.add_row(Text(name), Text(value))
        self._console.print()
        self._console.print(table)
        failed = sum(not check.passed for check in results.checks)
        if failed:
            self._console.print(Text(f"{failed} of {len(results.checks)} checks FAILED", style="bold red"))
        else:
            self._console.print(Text(f"all {len(results.checks)} checks passed", style="bold green"))
