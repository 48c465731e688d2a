"""python -m bench.projection.gpu_report RESULTS.json writes tables and a plot of a run on a GPU next to its JSON.

It prints a short table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.report_text import (
    device_name,
    figures,
    gpu_line,
    header,
    milliseconds,
    ratio,
    read_results,
    size,
    table,
)
from bench.projection.plots import Line, plot_ratios

_FORMS = {
    "op_16": ("op, 16 bits", "tab:blue", "o"),
    "op_8": ("op, 8 bits", "tab:orange", "s"),
    "normals": ("normals drawn in a product", "tab:gray", "^"),
}
_ELEMENT_BYTES = 2  # of bfloat16

_GOALS = (
    ("op_16", "D = 8192, M <= 64", lambda case: case.size == 8192 and case.rows <= 64, 2.5),
    ("op_8", "D = 8192, M <= 64", lambda case: case.size == 8192 and case.rows <= 64, 2.5),
    ("op_16", "M >= 2048", lambda case: case.rows >= 2048, 0.8),
    ("op_8", "M >= 2048", lambda case: case.rows >= 2048, 1.4),
)
"""Speed against stored P that an H200 is meant to reach."""


@dataclass(frozen=True)
class Bounds:
    """The best rates of the device in the same run."""

    copy_bytes: float
    """Bytes read and written per second."""
    multiply_adds: float
    """Multiply-adds in bfloat16 per second."""
    generation: dict[int, float]
    """Seconds to draw P in order to store it, by D."""


@dataclass(frozen=True)
class Case:
    """One D (``size``) and M (``rows``); seconds and speedups have a median, p10 and p90."""

    size: int
    rows: int
    cold: bool
    graphs: bool
    rounds: int
    backend: str
    seconds: dict[str, dict[str, float]]
    speedups: dict[str, dict[str, float]]
    """By form: the time of the stored product over that of the form."""
    kernels: dict[str, dict[str, float]]
    workspace: dict[str, int | None]
    held: dict[str, int]

    def median(self, name: str) -> float | None:
        """Return the seconds of a form, None if it was not measured."""
        return self.seconds[name]["median"] if name in self.seconds else None

    def share_of_ceiling(self, name: str, bounds: Bounds) -> float:
        """Return the time that copying and multiplying take at the device's measured rates, over the time taken."""
        moved = 2 * self.rows * self.size * _ELEMENT_BYTES + (self.held["stored"] if name == "stored" else 0)
        # Two products of bytes for each of the op's at 16 bits; bytes have twice the rate of bfloat16.
        work = self.rows * self.size**2 * (0.5 if name == "op_8" else 1.0)
        floor = max(work / bounds.multiply_adds, moved / bounds.copy_bytes)
        return floor / self.seconds[name]["median"]

    def quantise_share(self, name: str) -> float | None:
        """Return the part of the kernels' time that rounding x takes, None if it was not measured."""
        kernels = self.kernels[name]
        quantise = sum(seconds for kernel, seconds in kernels.items() if "quantise" in kernel)
        return quantise / sum(kernels.values()) if quantise else None


def read(results: dict[str, Any]) -> tuple[list[Case], Bounds | None]:
    """Read the cases of a pytest-benchmark result, ordered by D and M, and the bounds."""
    cases, bounds = [], []
    for bench in results["benchmarks"]:
        info = dict(bench["extra_info"])
        if bench["group"] == "projection-gpu":
            cases.append(Case(size=info.pop("D"), rows=info.pop("M"), **info))
        if bench["group"] == "bounds-gpu":
            bounds.append(info)
    best = Bounds(
        copy_bytes=max((info["copy_bytes_per_second"] for info in bounds), default=0.0),
        multiply_adds=max((info["product_multiply_adds_per_second"] for info in bounds), default=0.0),
        generation={info["D"]: info["generation_seconds"] for info in bounds},
    )
    return sorted(cases, key=lambda case: (case.size, case.rows)), best if bounds else None


def splits(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the columns and rows of the table of few rows with K in parts; no rows if that was not measured."""
    infos = [bench["extra_info"] for bench in results["benchmarks"] if bench["group"] == "splits-gpu"]
    infos.sort(key=lambda info: (info["D"], info["M"]))
    parts = sorted({count for info in infos for form in info["seconds"].values() for count in form}, key=int)
    columns = ("D", "M", "op, bits", *(f"K / {count}, ms" for count in parts), "rounds")
    rows = [
        [
            str(info["D"]),
            str(info["M"]),
            form.removeprefix("op_"),
            *(milliseconds(seconds[count]["median"]) for count in parts),
            str(info["rounds"]),
        ]
        for info in infos
        for form, seconds in info["seconds"].items()
    ]
    return columns, rows


# ---- text --------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "" if value is None else figures(value)


def _once_a_round(case: Case, bounds: Bounds | None) -> str:
    """Format the time of a stored product and of drawing P for one use of it, over that of the op."""
    if bounds is None or case.size not in bounds.generation:
        return ""
    return figures((case.seconds["stored"]["median"] + bounds.generation[case.size]) / case.seconds["op_16"]["median"])


_COLUMNS = (
    *("D", "M", "op 16, ms", "op 8, ms", "stored, ms", "normals, ms"),
    *("stored / op 16 (p10-p90)", "stored / op 8 (p10-p90)", "stored / normals (p10-p90)"),
    *("stored + drawn once / op 16", "ceiling: op 16", "op 8", "stored", "quantise / op 16", "quantise / op 8"),
    *("P stored", "P held by the op", "workspace 16", "rounds"),
)


def _row(case: Case, bounds: Bounds | None) -> list[str]:
    shares = [
        "" if bounds is None else f"{case.share_of_ceiling(name, bounds):.2f}" for name in ("op_16", "op_8", "stored")
    ]
    workspace = case.workspace["op_16"]
    return [
        str(case.size),
        f"{case.rows}{' (cold)' if case.cold else ''}",
        *(milliseconds(case.median(name)) for name in ("op_16", "op_8", "stored", "normals")),
        *(ratio(case.speedups.get(name)) for name in ("op_16", "op_8", "normals")),
        _once_a_round(case, bounds),
        *shares,
        *(_number(case.quantise_share(name)) for name in ("op_16", "op_8")),
        size(case.held["stored"]),
        size(case.held["op"]),
        "" if workspace is None else size(workspace),
        str(case.rounds),
    ]


_NOTE = """\
Times are medians, of replays of CUDA graphs that are all enqueued before the first of a round begins, so that launches
are not in them. "Cold" cases start from an L2 without P or x. Stored is torch.addmm with P in bfloat16. A ratio is the
median over rounds with its 10th and 90th percentile: above 1 the op, or the product that draws normals, is faster.
"Stored + drawn once" adds the time to draw P into memory, for a round that uses it once: by the op projection_matrix,
which writes integers and then scales and rounds them in passes of their own, so a kernel that did it in one would take
less. Normals: P drawn by tl.randn inside a product. Ceiling: the least time that the multiply-adds at the measured
bfloat16 rate (twice that for the op at 8 bits) or the bytes at the measured copy rate take, over the time taken.
Quantise is its part of the time of the op's kernels, by the profiler; empty where that was not allowed."""


_MODEL_NOTE = """\
Times by `bench/projection/model.py`, from counts of the machine code and rates assumed of an H200, and what was
measured over them. Where a ratio is far from 1, `make gpu-first-light` says which rate is not what was assumed."""


_MODEL_COLUMNS = [f"{name}, {what}" for name in ("op 16", "op 8", "stored") for what in ("model, ms", "measured / it")]


def _against_the_model(cases: list[Case]) -> str:
    """Return a table of the times that the model of an H200 predicts, and of what was measured over them."""
    from bench.projection import model  # takes Triton, with whose table of tiles it counts

    rows = []
    for case in cases:
        predicted = {f"op_{bits}": model.call(case.rows, case.size, bits).total for bits in (16, 8)}
        predicted["stored"] = model.stored(case.rows, case.size)
        row = [str(case.size), str(case.rows)]
        for name, seconds in predicted.items():
            row += [milliseconds(seconds), f"{case.seconds[name]['median'] / seconds:.2f}"]
        rows.append(row)
    return table(("D", "M", *_MODEL_COLUMNS), rows)


def _bounds_text(bounds: Bounds) -> str:
    drawn = ", ".join(f"D = {size}: {milliseconds(seconds)} ms" for size, seconds in sorted(bounds.generation.items()))
    return "\n".join(
        [
            f"- copy: {figures(bounds.copy_bytes / 1e9)} GB/s, read and written",
            f"- bfloat16 product: {figures(bounds.multiply_adds / 1e12)} T multiply-adds/s",
            f"- P drawn into memory by projection_matrix: {drawn}",
        ]
    )


def goals(cases: list[Case]) -> list[str]:
    """Return a line for each goal: the slowest of its measured cases, or that none was measured."""
    lines = []
    for name, where, applies, limit in _GOALS:
        judged = [case for case in cases if applies(case)]
        label = f"{_FORMS[name][0]}, {where}: at least {limit} times the speed of stored"
        if not judged:
            lines.append(f"- {label}: not measured")
            continue
        worst = min(judged, key=lambda case: case.speedups[name]["median"])
        value = worst.speedups[name]["median"]
        verdict = "met" if value >= limit else "NOT met"
        lines.append(
            f"- {label}: {verdict}, at worst {value:.2f} of {len(judged)} cases (D = {worst.size}, M = {worst.rows})"
        )
    return lines


def markdown(results: dict[str, Any], plot: str) -> str:
    """Return the report of a result; ``plot`` is the file name of its plot."""
    cases, bounds = read(results)
    machine = results["machine_info"]
    gpu = "- no GPU: a rehearsal on a CPU" if machine["gpu"] is None else gpu_line(machine["gpu"])
    parts = [
        "# x + x @ P on a GPU: drawn in the product against stored",
        f"{gpu}\n- Triton {machine['triton']}\n{header(results)}",
        f"![stored / op by M]({plot})",
        table(_COLUMNS, (_row(case, bounds) for case in cases)),
        _NOTE if all(case.graphs for case in cases) else f"{_NOTE} **Not here: these calls are from Python.**",
    ]
    if bounds is not None:
        parts += ["## What bounds it", _bounds_text(bounds)]
    columns, rows = splits(results)
    if rows:
        parts += ["## Few rows with K in parts, from a cold L2", table(columns, rows)]
    if machine["gpu"] is not None and machine["gpu"]["compute_capability"] == "9.0" and machine["triton"]:
        parts += ["## Against the model of time", _against_the_model(cases), _MODEL_NOTE]
    parts += ["## Goals, on an H200", "\n".join(goals(cases))]
    return "\n\n".join(parts) + "\n"


def short(results: dict[str, Any]) -> str:
    """Return the speed of each case against stored P, and the goals, as a few lines for a terminal."""
    cases, _ = read(results)
    lines = [f"backend {', '.join(sorted({case.backend for case in cases}))}; times in ms, x: speed against stored"]
    forms = ("op_16", "op_8", "normals")
    lines.append(f"{'D':>6}{'M':>7}{'stored':>9}" + "".join(f"{form.replace('_', ' '):>9}{'x':>6}" for form in forms))
    for case in cases:
        line = f"{case.size:>6}{case.rows:>7}{milliseconds(case.median('stored')):>9}"
        for form in forms:
            speedup = f"{case.speedups[form]['median']:.2f}" if form in case.speedups else ""
            line += f"{milliseconds(case.median(form)):>9}{speedup:>6}"
        lines.append(line)
    columns, rows = splits(results)
    if rows:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines += ["  ".join(map(str.rjust, line, widths)) for line in (columns, *rows)]
    return "\n".join([*lines, *goals(cases)])


# ---- plot --------------------------------------------------------------------------------------------------------


def plot(results: dict[str, Any], path: Path) -> None:
    """Write stored / form by M to ``path``."""
    cases, _ = read(results)

    def line(size: int, name: str) -> Line:
        chosen = [case for case in cases if case.size == size and name in case.speedups]
        return Line(*_FORMS[name], [case.rows for case in chosen], [case.speedups[name] for case in chosen])

    plot_ratios(
        {size: [line(size, name) for name in _FORMS] for size in sorted({case.size for case in cases})},
        path,
        title=device_name(results["machine_info"]),
        label="speed against stored P in bfloat16",
    )


def main() -> None:
    """Write RESULTS.md and RESULTS.png next to RESULTS.json, and print the short table."""
    path, results = read_results(__doc__, "benchmarks of the projection on a GPU", lambda results: read(results)[0])
    picture = path.with_suffix(".png")
    plot(results, picture)
    path.with_suffix(".md").write_text(markdown(results, picture.name))
    print(short(results))


if __name__ == "__main__":
    main()
