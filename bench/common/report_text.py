"""What all reports are made with: their command line, numbers, tables, and the conditions of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_results(description: str | None, wanted: str, has: Callable[[dict[str, Any]], Any]) -> tuple[Path, Any]:
    """Read the results file that the command line names; ends the program if ``has`` finds nothing ``wanted`` in it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="JSON that the suite wrote")
    path = parser.parse_args().results
    results = json.loads(path.read_text())
    if not has(results):
        parser.error(f"{path} has no {wanted}")
    return path, results


def figures(value: float) -> str:
    """Format with three significant figures and no exponent."""
    return f"{float(f'{value:.3g}'):g}"


def milliseconds(seconds: float | None) -> str:
    """Format seconds as milliseconds; empty for None."""
    return "" if seconds is None else figures(1e3 * seconds)


def size(count: float) -> str:
    """Format bytes in the largest unit that they fill."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= unit_bytes:
            return f"{figures(count / unit_bytes)} {unit}"
    return f"{count} bytes"


def ratio(spread: Mapping[str, float] | None) -> str:
    """Format the median of a ratio and its percentiles; empty for None."""
    return "" if spread is None else f"{spread['median']:.2f} ({spread['p10']:.2f}-{spread['p90']:.2f})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_line(gpu: dict[str, Any]) -> str:
    """Describe a GPU in one line."""
    return (
        f"- GPU: {gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}, "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
    )


def header(results: dict[str, Any]) -> str:
    """Describe the machine, versions, date and commit of a run."""
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


def model_header(results: dict[str, Any]) -> str:
    """Describe the same of a run that serves a model: with the GPU, if there was one, and transformers."""
    machine = results["machine_info"]
    gpu = [] if machine["gpu"] is None else [gpu_line(machine["gpu"])]
    return "\n".join([header(results), *gpu, f"- transformers {machine['transformers']}"])


def device_name(machine: dict[str, Any]) -> str:
    """Return the name of the device that a run measured."""
    name: str = machine["cpu"] if machine["gpu"] is None else machine["gpu"]["name"]
    return name
