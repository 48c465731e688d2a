"""The figures of the report, as SVG that adapts to the reader's light or dark colour scheme."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from . import theory
from .results import Results

BLUE, ORANGE, GREEN, RED, GREY = "#4a90d9", "#e08a2e", "#3f9e63", "#d64f4f", "#8a8a8a"
STATE_COLOURS = {"IDLE": GREY, "GENERATING": ORANGE, "VALIDATING": BLUE, "STOPPED": "#9a6fc0"}

# A placeholder for the reader's text colour while matplotlib draws.
_INK = "#010203"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "poc_kernels",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
}
_STYLE = "<style>svg{color:#222}@media (prefers-color-scheme:dark){svg{color:#ddd}}</style>"
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _svg(figure: Figure) -> str:
    """Return the figure as one SVG element that is drawn in the reader's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r"(<svg[^>]*>)", rf"\1{_STYLE}", text, count=1)


def distances(results: Results) -> str:
    """Plot the distances of consecutive nonces and the density that theory predicts."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        deviation = (2 * results.vocab_size) ** -0.5
        low, high = np.sqrt(2) - 4.5 * deviation, min(2.0, np.sqrt(2) + 4.5 * deviation)
        x = np.linspace(max(low, 0.0), high, 400)
        y = theory.density(x, results.vocab_size)
        if results.survey:
            axes.hist(
                results.survey,
                bins=min(40, max(8, len(results.survey) // 8)),
                density=True,
                color=BLUE,
                alpha=0.45,
                label=f"{len(results.survey)} nonces recomputed",
            )
        axes.plot(x, y, color=BLUE, label=f"theory, {results.vocab_size} dimensions")
        inside = x < results.r_target
        axes.fill_between(x[inside], y[inside], color=GREEN, alpha=0.35, linewidth=0)
        found = results.valid / results.checked if results.checked else 0.0
        axes.axvline(
            results.r_target,
            color=GREEN,
            label=f"r_target {results.r_target:.4f}: {results.expected_share:.1%} expected, {found:.1%} found",
        )
        axes.set(xlabel="distance to the target", ylabel="density", xlim=(x[0], x[-1]))
        figure.legend(loc="outside upper center", ncols=3)
        return _svg(figure)


def timeline(results: Results) -> str:
    """Plot states as bands, nonces checked and found over time, and every chat as a mark."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for axes in (upper, lower):
            for band in results.bands:
                axes.axvspan(band.began, band.ended, color=STATE_COLOURS.get(band.state, GREY), alpha=0.18, linewidth=0)
        at = [sample.at for sample in results.samples]
        upper.plot(at, [sample.checked for sample in results.samples], color=ORANGE, label="nonces checked")
        upper.plot(at, [sample.valid for sample in results.samples], color=GREEN, label="valid nonces found")
        states = list(dict.fromkeys(band.state for band in results.bands))
        patches = [Patch(color=STATE_COLOURS.get(state, GREY), alpha=0.3, label=state) for state in states]
        figure.legend(handles=[*upper.get_lines(), *patches], loc="outside upper center", ncols=6, columnspacing=1.2)
        upper.set(ylabel="nonces")
        served = [chat for chat in results.chats if chat.served]
        began = [chat.began for chat in served]
        refused = [chat.began for chat in results.chats if chat.status == 503]
        lower.hlines([1.0] * len(served), began, [chat.ended for chat in served], color=BLUE, linewidth=5, alpha=0.5)
        lower.plot(began, [1.0] * len(served), "|", color=BLUE, markersize=12)
        lower.plot(refused, [0.0] * len(refused), "x", color=RED)
        lower.set(xlabel="seconds", ylim=(-0.6, 1.6))
        lower.set_yticks([0, 1], ["503", "chat served"])
        lower.grid(visible=False)
        return _svg(figure)


def latency(results: Results) -> str:
    """Plot the distributions of times to the first token and between tokens, idle and validating."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, title, values in (
            (left, "time to the first token", results.firsts),
            (right, "time between tokens", results.gaps),
        ):
            counts: list[str] = []
            for state in ("IDLE", "VALIDATING"):
                milliseconds = [value * 1e3 for value in values(state)]
                counts.append(f"{len(milliseconds)} {state.lower()}")
                if milliseconds:
                    axes.ecdf(milliseconds, color=STATE_COLOURS[state])
            axes.set(title=f"{title}: {', '.join(counts)}", xlabel="milliseconds", xscale="log")
            axes.margins(x=0.2)  # wide enough for a few ticks, which are at 1, 2 and 5 times powers of ten
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        left.set(ylabel="cumulative share")
        handles = [Line2D([], [], color=STATE_COLOURS[state], label=state) for state in ("IDLE", "VALIDATING")]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        return _svg(figure)
