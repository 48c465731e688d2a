"""What is told of a run: lines for a terminal, and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .outcome import Outcome, Result
from .plan import Plan

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """All results of a run.

    Attributes:
        plan: what was played.
        model: name of the served model; "" where it was not found.
        began: when, as in ISO 8601.
        seconds: how long it took.
        results: one per check.
    """

    plan: Plan
    model: str
    began: str
    seconds: float
    results: Sequence[Result]

    @property
    def counts(self) -> dict[str, int]:
        """How many checks ended how."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome.value: counted[outcome] for outcome in Outcome}

    def conforms(self, *, strict: bool = False) -> bool:
        """Return whether nothing failed; with ``strict`` no hole was found either."""
        counts = self.counts
        return counts["fail"] == 0 and not (strict and counts["hole"])

    def to_json(self) -> str:
        """Return the report as docs/conform.md describes it."""
        plan = asdict(self.plan)
        del plan["token"]
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "plan": {**plan, "model": self.model, "k_dim": self.plan.form.k_dim},
            "began": self.began,
            "seconds": round(self.seconds, 3),
            "counts": self.counts,
            "checks": [
                {**asdict(result), "outcome": result.outcome.value, "seconds": round(result.seconds, 3)}
                for result in self.results
            ],
        }
        return json.dumps(content, indent=1) + "\n"

    def summary(self) -> str:
        """Return the last line of the table."""
        counted = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        return f"{len(self.results)} checks in {self.seconds:.1f} s: {counted}"


def line(result: Result, width: int) -> str:
    """Return a line of the table, with names of ``width`` columns; what the wire says where that is not met."""
    told = f"{result.outcome.value:<7}  {result.name:<{width}}  {result.seen}"
    if result.outcome in (Outcome.FAIL, Outcome.HOLE):
        told += f"\n{'':<7}  {'':<{width}}  the wire says: {result.says}"
    return told
