"""What the reports of all suites are written with: numbers, tables, and the conditions of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def figures(value: float) -> str:
    """Three significant figures, no exponent."""
    return f"{float(f'{value:.3g}'):g}"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else figures(1e3 * seconds)


def size(count: float) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= unit_bytes:
            return f"{figures(count / unit_bytes)} {unit}"
    return f"{count} bytes"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"- GPU: {gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}, "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
    )


def header(results: dict[str, Any]) -> str:
    machine, commit = results["machine_info"], results["commit_info"]
    bfloat16 = ", ".join(machine["bfloat16_instructions"]) or "none"
    changed = ", with uncommitted changes" if commit["dirty"] else ""
    return "\n".join(
        [
            f"- CPU: {machine['cpu']} ({machine['architecture']}), {machine['logical_cores']} logical cores, "
            f"bfloat16 instructions: {bfloat16}",
            f"- backend: {machine['backend']}, {machine['threads']} threads; load average before the run: "
            f"{machine['load_before']:.2f}",
            f"- OS: {machine['os']}",
            f"- {machine['python']}, torch {machine['torch']}",
            f"- date: {results['datetime'][:16].replace('T', ' ')} UTC",
            f"- commit: {commit['id']}{changed}",
        ]
    )
