"""python -m bench.interference.report RESULTS.json writes tables and plots of a run of the suite next to its JSON."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from bench.common.report_text import device_name, figures, milliseconds, model_header, read_results, table
from bench.interference.results import (
    ALONE,
    FEW_ABOVE,
    GRID,
    KEY,
    KINDS,
    NAMES,
    STEADY,
    STRETCH_SECONDS,
    VLLM,
    bound,
    engine_of,
    judge,
)

MET = {True: "**met**", False: "**missed**", None: "not shown"}
_COLOURS = {
    ALONE: "black",
    "no pacing": "tab:orange",
    "no pacing, no priorities": "tab:red",
    "no pacing, a part of the GPU": "tab:pink",
    "whole batches": "tab:red",
}
_RATES = {"light": "tab:blue", "half": "tab:orange", "near saturation": "tab:green", STEADY: "tab:purple"}
_MARKERS = "osDPv^Xx*"
SHOWN = (0.02, 0.998)
"""The quantiles that the plot of distributions shows."""


def _percentile(run: dict[str, Any], kind: str) -> str:
    """Return the percentile of a kind of times that is compared with that of chat alone: that of the engine's goals."""
    return "p95" if engine_of(run) == VLLM and kind == "first" else "p99"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _setting(run: dict[str, Any]) -> str:
    model = run["model"]
    where = "a node in a process of its own, over HTTP on loopback" if run["http"] else "in process, without HTTP"
    if engine_of(run) == VLLM:
        where = "vllm serve with the plugin, over HTTP on loopback; sched_yield is time.sleep(0) in it"
    slices = run["planned_slices"]
    planned = (
        ""
        if slices is None
        else f"; planned on their own: {len(slices)} slices of the forward, the longest {milliseconds(max(slices))} ms"
    )
    kept = "" if run["multiprocessors"] is None else f", validation kept to {run['multiprocessors']} SMs"
    answers = (
        "equal to those generated alone, token for token"
        if run["answers_exact"]
        else f"equal to those generated alone except {run['answers_near_ties']}, which differ where the likeliest "
        f"tokens are nearly tied (the farthest {max(0.0, -run['least_lead']):.3g} of the logits' spread under)"
    )
    return "\n".join(
        [
            f"- model: {model['name']}, {model['layers']} layers, {model['parameters']:,} parameters, random weights, "
            f"{model['dtype']}; {where}",
            f"- chat: {run['prompts']} prompts of about {run['prompt_tokens']} {_unit(run)}, "
            f"answers of {run['new_tokens']} tokens, greedy; Poisson arrivals, seed {run['seed']}; at most "
            f"{run['max_in_flight']} in flight",
            f"- saturation, chat alone: {figures(run['saturation_requests_per_second'])} requests/s in a closed loop "
            f"of {run['in_flight']} users",
            f"- proofs: {run['batch_size']} x {run['seq_len']}, projection {'on' if run['projection'] else 'off'}; "
            f"slices of at most {milliseconds(run['slice_seconds'])} ms wanted{planned}; "
            f"{run['slices_in_flight']} in flight on a GPU{kept}",
            f"- checks: every distance equal, bit for bit, to the one computed alone; every answer {answers}",
            f"- blocks of {run['block_seconds']:g} s; the whole run took {run['run_seconds']:.0f} s",
        ]
    )


def _unit(run: dict[str, Any]) -> str:
    return "words" if run["http"] and engine_of(run) != VLLM else "tokens"


# ---- tables ------------------------------------------------------------------------------------------------------


def _three(cell: dict[str, Any], kind: str) -> str:
    summary = cell[kind]
    return "" if summary is None else " / ".join(milliseconds(summary[name]) for name in ("p50", "p95", "p99"))


def _samples(cell: dict[str, Any], kind: str) -> str:
    summary = cell[kind]
    if summary is None:
        return ""
    few = " (few)" if summary["above_p99"] < FEW_ABOVE else ""
    return f"{summary['samples']}, {summary['above_p99']}{few}"


def _ratio(cell: dict[str, Any], kind: str, percentile: str) -> str:
    ratios = None if cell["ratios"] is None else cell["ratios"][kind]
    if ratios is None:
        return ""
    point, low, high = ratios[percentile]
    return f"{point:.2f} ({low:.2f} to {high:.2f})"


def _columns(run: dict[str, Any]) -> list[str]:
    latencies = [
        column
        for kind in KINDS
        for column in (
            f"{NAMES[kind]}, p50 / p95 / p99, ms",
            "samples, above p99",
            f"{_percentile(run, kind)} / alone (95 %)",
        )
    ]
    return ["condition", *latencies, "output tokens/s", "requests done, refused", "nonces/s", "share of solo rate"]


def _row(run: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    latencies = [
        text
        for kind in KINDS
        for text in (_three(cell, kind), _samples(cell, kind), _ratio(cell, kind, _percentile(run, kind)))
    ]
    nonces = cell["nonces_per_second"]
    return [
        cell["condition"],
        *latencies,
        figures(cell["tokens_per_second"]) if cell["chat"] else "",
        f"{cell['done']}, {cell['refused']}" if cell["chat"] else "",
        "" if nonces is None else figures(nonces),
        _percent(cell["solo_share"]),
    ]


_SCHEDULE_COLUMNS = (
    "condition",
    "slices",
    "slice, p50 / p99 / max, ms",
    "slices' share of the time",
    "a step's wait, p50 / p99 / max, ms",
    "inference waited, share of the time",
    "a slice waited, p99 / max, ms",
    "arrivals late, p99, ms",
)


def _lengths(lengths: dict[str, float] | None, names: tuple[str, ...]) -> str:
    return "" if lengths is None else " / ".join(milliseconds(lengths[name]) for name in names)


def _schedule_row(cell: dict[str, Any]) -> list[str]:
    slices, step_waits, slice_waits = cell["slices"], cell["waits"], cell["held"]
    return [
        cell["condition"],
        "" if slices is None else str(slices["count"]),
        _lengths(slices, ("p50", "p99", "max")),
        "" if slices is None else _percent(slices["share_of_time"]),
        _lengths(step_waits, ("p50", "p99", "max")),
        "" if step_waits is None else _percent(step_waits["share_of_time"]),
        _lengths(slice_waits, ("p99", "max")),
        milliseconds(cell["late_p99"]),
    ]


_ENGINE_COLUMNS = (
    "condition",
    "steps",
    "tokens per step",
    "a step, mean, ms",
    "slices before a step, mean, ms",
    "a slice, mean, ms",
    "steps' share of the time",
    "slices' share of the time",
    "of it, before steps",
    "share of the time with neither",
)


def _engine_row(cell: dict[str, Any]) -> list[str]:
    engine = cell["engine"]
    return [
        cell["condition"],
        f"{engine['steps']:.0f}",
        "" if engine["tokens_per_step"] is None else figures(engine["tokens_per_step"]),
        milliseconds(engine["step_seconds"]),
        milliseconds(engine["seconds_before_steps"]),
        milliseconds(engine["slice_seconds"]),
        _percent(engine["steps_share"]),
        _percent(engine["slices_share"]),
        _percent(engine["slices_share_before_steps"]),
        _percent(1 - engine["steps_share"] - engine["slices_share"]),
    ]


def _bound(rate: dict[str, Any]) -> str:
    alone = next(cell for cell in rate["cells"] if cell["condition"] == ALONE)
    share = bound(alone)
    return (
        f"With chat alone, steps take {_percent(alone['engine']['steps_share'])} of the time. A schedule that never "
        f"idles and computes the same steps leaves validation **{_percent(share)}** of its solo rate, whatever it does "
        "to latencies."
    )


def _prefill(prefill: dict[str, Any]) -> str:
    ratio, low, high = prefill["ratio"]
    rounds = prefill["rounds"]
    mean = {name: sum(each[name] for each in rounds) / len(rounds) for name in rounds[0]}
    return (
        f"Proofs alone: {figures(mean['proof_tokens_per_second'])} tokens per second; prompts alone in the same "
        f"server: {figures(mean['tokens_per_second'])}, in steps of {figures(mean['tokens_per_step'])} tokens. The "
        f"median ratio of {len(rounds)} rounds of {prefill['seconds']:g} s each is "
        f"**{ratio:.3f}** ({low:.3f} to {high:.3f})."
    )


_NOTE = f"""\
All conditions of a rate get the same arrivals and take turns in blocks, whose order rotates; samples of all blocks are
pooled. Time to first token counts from when the request was due. The share of the solo rate is that of the blocks of
validation alone at the same rate of arrivals. Few: less than {FEW_ABOVE} samples lie above the p99, which then says
little. In brackets: an interval of 95 %, from rounds drawn again and in each of them stretches of
{STRETCH_SECONDS:g} s, since requests that share a batch share its gaps; with few rounds it is rough.

Paced (in earlier results: held): slices wait while inference computes, except for their share. Free: they run at the
same time as steps, and a step waits for them only where they got less than their share. No pacing: they run at the same
time as steps, and nothing is guaranteed. Validation has a stream of low priority on a GPU, and threads of low priority
on a CPU; with no priorities it has those of inference."""

_VLLM_NOTE = """\
Whole batches: each batch of proofs is computed in one call of the worker, whoever waits, and no other is put ahead:
what other stacks do. The engine's figures are its own counters, from the beginning of a block until its last request
has ended. A step's time is that from its beginning to the next step's, without slices, of steps that another follows
at once; the steps' share of the time is their number times that mean."""

_SCHEDULE_NOTE = """\
Times of slices and waits are taken on the host. There a step waits for a slice only with free pacing, where one is
owed; on a GPU its kernels may also wait for those of a slice, which shows in the latencies above. Arrivals late: how
long after it was due the load's own event loop submitted a request."""


def markdown(results: dict[str, Any], latency_plot: str, tradeoff_plot: str) -> str:
    """Return the report of a result; the plots are file names."""
    run = results[KEY]
    goals = [[each.what, each.limit, each.measured, MET[each.met]] for each in judge(run)]
    parts = [
        "# Interference: chat and validation on one device",
        model_header(results),
        _setting(run),
        *(["**A quick run of small cases: no figure here says anything about speed.**"] if run["quick"] else []),
        f"## Goals, with the default pacing ({run['default'].removesuffix(', the default')})",
        table(("figure", "goal", "measured", "met"), goals),
        f"![A percentile over that of chat alone, by the share of the solo rate of validation]({tradeoff_plot})",
        f"![Distributions of time to first token and between tokens]({latency_plot})",
    ]
    for rate in run["rates"]:
        title = (
            f"## {rate['name'].capitalize()}: {figures(rate['requests_per_second'])} requests/s, "
            f"{rate['fraction']:.0%} of saturation"
        )
        seconds = {cell["condition"]: cell["seconds"] for cell in rate["cells"]}
        parts += [
            title,
            f"{figures(min(seconds.values()))} s of each condition, in {rate['cells'][0]['blocks']} blocks.",
            table(_columns(run), [_row(run, cell) for cell in rate["cells"]]),
        ]
        if rate["cells"][0].get("engine") is not None:
            parts += [_bound(rate), "At the engine:", table(_ENGINE_COLUMNS, map(_engine_row, rate["cells"]))]
        if any(cell["slices"] is not None for cell in rate["cells"]):
            parts.append(table(_SCHEDULE_COLUMNS, map(_schedule_row, rate["cells"])))
    if run.get("prefill") is not None:
        parts += ["## Proofs alone beside vLLM's own prompts alone", _prefill(run["prefill"])]
    note = _VLLM_NOTE if engine_of(run) == VLLM else _SCHEDULE_NOTE
    return "\n\n".join([*parts, "## How to read it", _NOTE, note]) + "\n"


# ---- plots -------------------------------------------------------------------------------------------------------


def _where(results: dict[str, Any]) -> str:
    model = results[KEY]["model"]
    return f"{model['name']}, {model['dtype']}, {device_name(results['machine_info'])}"


def plot_latencies(results: dict[str, Any], path: Path) -> None:
    """Write the distributions of both kinds of times to ``path``, with a row of panels for each rate."""
    rates = results[KEY]["rates"]
    figure, panels = plt.subplots(
        len(rates), len(KINDS), figsize=(11, 3.4 * len(rates) + 0.6), squeeze=False, layout="constrained"
    )
    for row, rate in zip(panels, rates, strict=True):
        paced = [cell["condition"] for cell in rate["cells"] if cell["share"] is not None]
        shades = plt.get_cmap("viridis")
        colours = {name: shades(at / max(1, len(paced) - 1)) for at, name in enumerate(paced)} | _COLOURS
        for axes, kind in zip(row, KINDS, strict=True):
            for cell in rate["cells"]:
                if cell[kind] is not None:
                    milli = [1e3 * value for value in cell[kind]["quantiles"]]
                    width = 2 if cell["condition"] in _COLOURS else 1.2
                    axes.plot(milli, GRID, color=colours[cell["condition"]], label=cell["condition"], linewidth=width)
            axes.set_xscale("log")
            _log_ticks(axes.xaxis)
            shown = [cell[kind]["quantiles"] for cell in rate["cells"] if cell[kind] is not None]
            low, high = (np.searchsorted(GRID, share) for share in SHOWN)
            axes.set_xlim(0.9e3 * min(each[low] for each in shown), 1.1e3 * max(each[high] for each in shown))
            axes.set_yscale("logit", one_half="0.5")
            axes.set_ylim(*SHOWN)
            axes.set_yticks([0.1, 0.5, 0.9, 0.99], ["10 %", "50 %", "90 %", "99 %"])
            axes.set_yticks([], minor=True)
            axes.set_title(f"{NAMES[kind]}, {rate['name']}", fontsize=10)
            axes.set_xlabel("ms")
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel("samples at most this long")
        row[-1].legend(fontsize=7, loc="lower right")
    figure.suptitle(_where(results))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_tradeoff(results: dict[str, Any], path: Path) -> None:
    """Write a percentile over that of chat alone, by the share of the solo rate, to ``path``, a panel for each kind.

    Where the engine counts its steps, a line shows how much validation can have at all.
    """
    run = results[KEY]
    rates = run["rates"]
    co_located = [
        [cell for cell in rate["cells"] if None not in (cell["ratios"], cell["solo_share"])] for rate in rates
    ]
    names = list(dict.fromkeys(cell["condition"] for cells in co_located for cell in cells))
    markers = dict(zip(names, itertools.cycle(_MARKERS), strict=False))
    figure, panels = plt.subplots(1, len(KINDS), figsize=(11, 4.6), layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=True):
        for rate, cells in zip(rates, co_located, strict=True):
            for cell in cells:
                point, low, high = cell["ratios"][kind][_percentile(run, kind)]
                axes.errorbar(
                    100 * cell["solo_share"],
                    point,
                    # The point need not lie inside the interval of resampled requests.
                    yerr=[[max(0.0, point - low)], [max(0.0, high - point)]],
                    color=_RATES[rate["name"]],
                    marker=markers[cell["condition"]],
                    markersize=7,
                    linewidth=1,
                    capsize=2,
                )
        for rate in rates:
            most = bound(next(cell for cell in rate["cells"] if cell["condition"] == ALONE))
            if most is not None:
                axes.axvline(100 * most, color=_RATES[rate["name"]], linewidth=1, linestyle=":")
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
        axes.set_xlabel("validation, % of its solo rate")
        axes.set_ylabel(f"{_percentile(run, kind)} of {NAMES[kind]} / alone")
        axes.grid(alpha=0.3, which="both")
    of_rates = [Patch(color=_RATES[rate["name"]], label=rate["name"]) for rate in rates]
    of_names = [
        Line2D([], [], color="grey", marker=marker, linestyle="none", label=name) for name, marker in markers.items()
    ]
    panels[0].legend(handles=[*of_rates, *of_names], fontsize=7)
    figure.suptitle(f"{_where(results)}: the price of validation")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _log_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    """Write RESULTS.md, RESULTS.png and RESULTS-tradeoff.png next to RESULTS.json."""
    path, results = read_results(__doc__, "run of the suite", lambda results: results.get(KEY, {}).get("rates"))
    latency, tradeoff = path.with_suffix(".png"), path.with_name(f"{path.stem}-tradeoff.png")
    plot_latencies(results, latency)
    plot_tradeoff(results, tradeoff)
    path.with_suffix(".md").write_text(markdown(results, latency.name, tradeoff.name))


if __name__ == "__main__":
    main()
