"""python -m bench.round.report RESULTS.json writes tables and a plot of a run of the suite next to its JSON."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from bench.common.report_text import device_name, figures, milliseconds, model_header, read_results, size, table
from bench.common.spread import Spread, spread
from bench.round.results import GOALS, PARTS, Batch, Case, Difference, Goal, applies, judge, read_cases

_COLOURS = {"inputs": "tab:gray", "projection": "tab:red", "forward": "tab:blue", "distance": "tab:olive"}
_REST = "between parts"


def _percent(value: float) -> str:
    return f"{figures(100 * value)} %"


def _spread(value: Spread, scale: float) -> str:
    return f"{figures(scale * value.median)} ({figures(scale * value.p10)} to {figures(scale * value.p90)})"


def _model(case: Case) -> str:
    if case.computed:
        return f"{case.model}, all {case.whole_layers} layers, **computed**"
    if not case.is_whole:
        return f"{case.model}, {case.layers} of {case.whole_layers} layers"
    return f"{case.model}, all {case.layers} layers"


def _seconds(batches: list[Batch]) -> Spread:
    return spread([batch.seconds for batch in batches])


def _difference(value: Difference, scale: float) -> str:
    text = f"{figures(scale * value.median)} ({figures(scale * value.low)} to {figures(scale * value.high)})"
    return f"{text}, below the noise" if value.below_noise else text


# ---- tables ------------------------------------------------------------------------------------------------------

_TIME_COLUMNS = (
    "model",
    "batch x positions",
    "dtype",
    "off, ms (p10 to p90)",
    "on, ms (p10 to p90)",
    "on - off, ms (95 %)",
    "on - off, % of off (95 %)",
    "batches on",
)


def _time_row(case: Case) -> list[str]:
    off, on = (_spread(_seconds(batches), 1e3) for batches in (case.off, case.on))
    return [
        _model(case),
        f"{case.batch_size} x {case.seq_len}",
        case.dtype,
        off,
        on,
        "as measured" if case.computed else _difference(case.difference, 1e3),
        _difference(case.relative_difference, 100),
        str(len(case.on)),
    ]


_PART_COLUMNS = ("model", *(f"{part}, ms" for part in PARTS), "share of projections, % (p10 to p90)")


def _part_row(case: Case) -> list[str]:
    medians = [statistics.median(batch.parts[part] for batch in case.on) for part in PARTS]
    return [_model(case), *map(milliseconds, medians), _spread(case.share, 100)]


_MEMORY_COLUMNS = (
    "model",
    "D",
    "P held",
    "held: the seed",
    "for a while: result of the projection",
    "for a while: workspace",
    "both P stored, bfloat16",
)


def _memory_row(case: Case) -> list[str]:
    memory = case.memory
    return [
        case.model,
        str(case.hidden_size),
        "0",
        *(size(memory[name]) for name in ("held", "result", "workspace", "stored")),
    ]


_GOAL_COLUMNS = ("goal: share of a round", "model", "share", "on - off (95 %)", "met")


def _goal_rows(goal: Goal, cases: list[Case]) -> list[list[str]]:
    name = f"under {_percent(goal.share)} {goal.where}"
    judged = [case for case in cases if applies(goal, case)]
    if not judged:
        return [[name, "none in this run", "", "", "not measured"]]
    rows = []
    for case in judged:
        verdict = judge(goal, case)
        met = "**met**" if verdict.met else "**not met**"
        difference = case.relative_difference
        rows.append(
            [
                name,
                _model(case),
                _percent(case.share.median),
                f"{_percent(difference.low)} to {_percent(difference.high)}",
                f"{met}: {verdict.reason}",
            ]
        )
    return rows


_TIME_NOTE = """\
Off and on take turns, two managers on one engine; a difference is a batch on, less the mean of the batches off before
and after it. In brackets after it: the interval that holds the median difference with 95 % (sign test). Where that
holds zero the difference is below the noise, and the share of the parts, next table, is the better figure."""

_COMPUTED_NOTE = """\
**Computed**, not measured: of such a model only a few layers ran, with its own head and vocabulary. To each batch was
added, for each layer that did not run, the time of a layer that ran in that batch."""

_PART_NOTE = """\
Medians of the batches with the projection on. Inputs: random numbers and permutations; projection: both, before and
after the model; forward: the model with its logits."""

_MEMORY_NOTE = """\
Results and workspace are those of the projection before the model, whose x has a row for each position of the batch;
the one after it has a row for each nonce. The result takes the place of x. Workspace is what the process's peak
grows by beyond the result, to a quarter of a MiB or so (on a GPU: the allocator's peak); it is given back when the
call returns."""


def markdown(results: dict[str, Any], plot: str) -> str:
    """Return the report of a result; ``plot`` is the file name of its plot."""
    cases = read_cases(results)
    measured = [case for case in cases if not case.computed]
    warnings = dict.fromkeys(f"- {case.model}: {warning}" for case in measured for warning in case.warnings)
    by_size = {(case.model, case.batch_size, case.seq_len): case for case in measured}
    parts = [
        "# A round with the random projection: off against on",
        model_header(results),
        "Models have real configurations and random weights.",
        table(_GOAL_COLUMNS, [row for goal in GOALS for row in _goal_rows(goal, cases)]),
        f"![Parts of a batch, and the share of the projections]({plot})",
        "## Time of a batch",
        table(_TIME_COLUMNS, map(_time_row, cases)),
        _TIME_NOTE,
        *([_COMPUTED_NOTE] if len(measured) < len(cases) else []),
        "## Parts",
        table(_PART_COLUMNS, map(_part_row, cases)),
        _PART_NOTE,
        "## Memory",
        table(_MEMORY_COLUMNS, map(_memory_row, by_size.values())),
        _MEMORY_NOTE,
        *(["## Warnings of the run", "\n".join(warnings)] if warnings else []),
    ]
    return "\n\n".join(parts) + "\n"


# ---- plot --------------------------------------------------------------------------------------------------------


def _label(case: Case) -> str:
    layers = "computed" if case.computed else "" if case.is_whole else f"{case.layers} of {case.whole_layers} layers"
    return "\n".join(filter(None, [case.model, f"{case.batch_size} x {case.seq_len}", layers]))


def _plot_parts(axes: Any, cases: list[Case]) -> None:
    """Draw two stacked bars for each case, off and on; 100 % is its median time off."""
    for at, case in enumerate(cases):
        base = _seconds(case.off).median
        for side, batches in ((-0.2, case.off), (0.2, case.on)):
            medians = {part: statistics.median(batch.parts[part] for batch in batches) for part in PARTS}
            medians[_REST] = statistics.median(batch.seconds - sum(batch.parts.values()) for batch in batches)
            bottom = 0.0
            for part, seconds in medians.items():
                height = 100 * max(0.0, seconds) / base
                axes.bar(at + side, height, 0.36, bottom=bottom, color=_COLOURS.get(part, "lightgray"))
                bottom += height
            axes.text(at + side, bottom + 1, "off" if side < 0 else "on", ha="center", fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=_COLOURS.get(part, "lightgray")) for part in (*PARTS, _REST)]
    axes.legend(handles, (*PARTS, _REST), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=5, fontsize=8)
    axes.set_ylabel("time, % of a batch off")
    axes.set_xticks(range(len(cases)), map(_label, cases), fontsize=8)


def _plot_shares(axes: Any, cases: list[Case]) -> None:
    """Draw the share of each case and the goals: hollow where only some layers ran, square where it is computed."""
    for at, case in enumerate(cases):
        share = Spread(*(100 * value for value in case.share))
        bars = [[share.median - share.p10], [share.p90 - share.median]]
        fill = "tab:red" if case.is_whole else "white"
        marker = "s" if case.computed else "o"
        axes.errorbar(at, share.median, yerr=bars, fmt=marker, color="tab:red", markerfacecolor=fill, capsize=4)
    for goal in GOALS:
        axes.axhline(100 * goal.share, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"goal {goal.where}", (0.01, 100 * goal.share), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("share of projections, % of a batch on")
    axes.set_xticks(range(len(cases)), map(_label, cases), fontsize=8)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.grid(alpha=0.3)


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the parts of a batch, off and on, and the share of the projections to ``path``."""
    cases, machine = read_cases(results), results["machine_info"]
    width = max(1.4 * len(cases) + 1.5, 4.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * width, 4.6), layout="constrained")
    _plot_parts(left, cases)
    _plot_shares(right, cases)
    figure.suptitle(f"{device_name(machine)}, {machine['threads']} threads, {machine['backend']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Write RESULTS.md and RESULTS.png next to RESULTS.json."""
    path, results = read_results(__doc__, "benchmarks of a round", read_cases)
    picture = path.with_suffix(".png")
    plot(results, picture)
    path.with_suffix(".md").write_text(markdown(results, picture.name))


if __name__ == "__main__":
    main()
