"""python -m bench.projection.cpu_report RESULTS.json writes tables and a plot of a run on a CPU next to its JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.report_text import figures, header, milliseconds, ratio, read_results, table
from bench.projection.plots import Line, plot_ratios

_VARIANTS = {
    ("bfloat16", 16): ("bfloat16, 16 bits", "tab:blue", "o"),
    ("bfloat16", 8): ("bfloat16, 8 bits", "tab:orange", "s"),
    ("float32", 16): ("float32, 16 bits", "tab:green", "^"),
}
"""By the dtype of x and activation_bits: label, colour and marker."""


@dataclass(frozen=True)
class Case:
    """The op against its peers in one case: ``size`` is D, ``rows`` is M, times are medians in seconds."""

    size: int
    rows: int
    variant: tuple[str, int]
    op: float
    stored: dict[str, float]
    """By the form of P: bfloat16, bfloat16_transposed, bfloat16_prepacked, float32, float32_prepacked."""
    best: str
    ratios: dict[str, dict[str, float]]
    """Op / stored, the median, p10 and p90 of the rounds, by "bfloat16" (if x is) and "best"."""
    generation_share: float
    stored_bytes: dict[str, int]
    held_bytes: int
    rounds: int
    threads: int
    cpu: float | None
    """CPU time of the op, which older results do not have."""
    cpu_ratios: dict[str, dict[str, float]]
    """As ``ratios``, of CPU times and with the form that takes least of it; empty in older results."""

    @property
    def best_dtype(self) -> str:
        """The dtype of the best stored form, bfloat16 or float32."""
        return self.best.split("_")[0]

    def stored_in(self, dtype: str) -> float | None:
        """Return the seconds of the fastest product with P in ``dtype``, in any form; None if not a peer."""
        return min((time for form, time in self.stored.items() if form.startswith(dtype)), default=None)


@dataclass(frozen=True)
class Bounds:
    """The rates of one D, each per second."""

    size: int
    product_rows: int
    entries: float
    multiply_adds: dict[str, float]
    """By activation_bits."""
    read_bytes: dict[str, float]
    """By the dtype whose P was read."""


def read_cases(results: dict[str, Any]) -> list[Case]:
    """Read the cases of a pytest-benchmark result, ordered by D, threads, variant and M."""
    cases = [
        Case(
            size=info["D"],
            rows=info["M"],
            variant=(info["dtype"], info["activation_bits"]),
            op=bench["stats"]["median"],
            stored=info["stored_seconds"],
            best=info["best_stored"],
            ratios=info["ratios"],
            generation_share=info["generation_share"],
            stored_bytes=info["stored_bytes"],
            held_bytes=info["held_bytes"],
            rounds=bench["stats"]["rounds"],
            threads=info["threads"],
            cpu=info.get("cpu_seconds"),
            cpu_ratios=info.get("cpu_ratios", {}),
        )
        for bench in results["benchmarks"]
        if bench["group"] == "projection"
        for info in [bench["extra_info"]]
    ]
    return sorted(cases, key=lambda case: (case.size, case.threads, list(_VARIANTS).index(case.variant), case.rows))


def read_bounds(results: dict[str, Any]) -> list[Bounds]:
    """Read the rates of a pytest-benchmark result, ordered by D."""
    bounds = [
        Bounds(
            size=info["D"],
            product_rows=info["product_rows"],
            entries=info["generated_entries_per_second"],
            multiply_adds=info["multiply_adds_per_second"],
            read_bytes=info["read_bytes_per_second"],
        )
        for bench in results["benchmarks"]
        if bench["group"] == "bounds"
        for info in [bench["extra_info"]]
    ]
    return sorted(bounds, key=lambda bound: bound.size)


# ---- text --------------------------------------------------------------------------------------------------------


def _case_row(case: Case) -> list[str]:
    times = {dtype: milliseconds(case.stored_in(dtype)) for dtype in ("bfloat16", "float32")}
    times[case.best_dtype] = f"**{times[case.best_dtype]}**"
    sizes = [
        f"{figures(case.stored_bytes[dtype] / 2**20)} {label}"
        for dtype, label in (("bfloat16", "bf16"), ("float32", "f32"))
        if dtype in case.stored_bytes
    ]
    return [
        str(case.size),
        str(case.rows),
        str(case.threads),
        _VARIANTS[case.variant][0],
        milliseconds(case.op),
        times["bfloat16"],
        times["float32"],
        ratio(case.ratios.get("bfloat16")),
        ratio(case.ratios["best"]),
        milliseconds(case.cpu),
        ratio(case.cpu_ratios.get("bfloat16")),
        ratio(case.cpu_ratios.get("best")),
        f"{case.generation_share:.2f}",
        ", ".join(sizes),
        figures(case.held_bytes / 2**20),
        str(case.rounds),
    ]


_CASE_COLUMNS = (
    "D",
    "M",
    "threads",
    "x",
    "op, ms",
    "stored bf16, ms",
    "stored f32, ms",
    "op / stored bf16 (p10-p90)",
    "op / best stored (p10-p90)",
    "CPU: op, ms",
    "CPU: op / stored bf16 (p10-p90)",
    "CPU: op / best stored (p10-p90)",
    "generation / op",
    "P stored, MiB",
    "P held by the op, MiB",
    "rounds",
)

_CASE_NOTE = """\
Times are medians. Stored bf16 and stored f32 are the fastest of P row-major, P transposed (bfloat16) and P in oneDNN's
own layout; the best stored form is bold. A ratio is the median over rounds, with its 10th and 90th percentile; under 1
the op is faster. CPU times are those of the calling thread with one thread, and of the process with more, where waiting
threads of OpenMP may count. Generation is the op on one row at 8 bits, as a stand-in for drawing P once."""

_BOUND_NOTE = """\
Generation: entries of P drawn by the op on one row at 8 bits, its one row of products included. Products: multiply-adds
of x @ P, D * D * M of them, over the time of the whole call; at 16 bits each is two of bytes. Read: torch.sum over the
bytes of the stored P. Stored: the bytes of P over the time of addmm with one row. Where P fits the caches, both are
rates of the caches. A stored product near the read rate is bound by reading P; far under it, by something else."""


def _most_threads(cases: list[Case]) -> int:
    return max(case.threads for case in cases)


def _stored_rate(cases: list[Case], size: int, dtype: str) -> str:
    """Format the G bytes of stored P per second in a product with one row; empty if the run has none."""
    for case in cases:
        seconds = case.stored_in(dtype)
        if (case.size, case.rows, case.threads) == (size, 1, _most_threads(cases)) and seconds is not None:
            return figures(case.stored_bytes[dtype] / seconds / 1e9)
    return ""


def _bound_row(bound: Bounds, cases: list[Case]) -> list[str]:
    return [
        str(bound.size),
        figures(bound.entries / 1e9),
        *(figures(bound.multiply_adds[bits] / 1e9) for bits in ("16", "8")),
        *(
            rate
            for dtype in ("bfloat16", "float32")
            for rate in (figures(bound.read_bytes[dtype] / 1e9), _stored_rate(cases, bound.size, dtype))
        ),
    ]


def _bound_columns(product_rows: int) -> list[str]:
    return [
        "D",
        "generation, G entries/s",
        f"16 bits, M = {product_rows}, G multiply-adds/s",
        f"8 bits, M = {product_rows}, G multiply-adds/s",
        "read bf16 P, GB/s",
        "stored bf16, M = 1, GB/s",
        "read f32 P, GB/s",
        "stored f32, M = 1, GB/s",
    ]


def markdown(results: dict[str, Any], plot: str) -> str:
    """Return the report of a result; ``plot`` is the file name of its plot."""
    cases, bounds = read_cases(results), read_bounds(results)
    parts = [
        "# x + x @ P: drawn in the product against stored",
        header(results),
        f"![op / best stored by M]({plot})",
        table(_CASE_COLUMNS, map(_case_row, cases)),
        _CASE_NOTE,
    ]
    if bounds:
        rows = [_bound_row(bound, cases) for bound in bounds]
        parts += ["## What bounds it", table(_bound_columns(bounds[0].product_rows), rows), _BOUND_NOTE]
    return "\n\n".join(parts) + "\n"


# ---- plot --------------------------------------------------------------------------------------------------------


def plot(results: dict[str, Any], path: Path) -> None:
    """Write op / best stored by M to ``path``."""
    cases, machine = read_cases(results), results["machine_info"]
    cases = [case for case in cases if case.threads == _most_threads(cases)]

    def line(size: int, variant: tuple[str, int]) -> Line:
        chosen = [case for case in cases if (case.size, case.variant) == (size, variant)]
        return Line(*_VARIANTS[variant], [case.rows for case in chosen], [case.ratios["best"] for case in chosen])

    plot_ratios(
        {size: [line(size, variant) for variant in _VARIANTS] for size in sorted({case.size for case in cases})},
        path,
        title=f"{machine['cpu']}, {machine['threads']} threads, {machine['backend']}",
        label="time of op / best stored",
        legend="x",
        every_row_count=True,
    )


def main() -> None:
    """Write RESULTS.md and RESULTS.png next to RESULTS.json."""
    path, results = read_results(__doc__, "benchmarks of the projection on a CPU", read_cases)
    picture = path.with_suffix(".png")
    plot(results, picture)
    path.with_suffix(".md").write_text(markdown(results, picture.name))


if __name__ == "__main__":
    main()
