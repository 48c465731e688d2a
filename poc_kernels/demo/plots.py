"""The plots of the report: SVG in the page's own colours and font, once for wide screens and once for narrow ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from . import theory
from .results import ALONE, BETWEEN, FIRST, Results

STATES = {"IDLE": "idle", "GENERATING": "generating", "VALIDATING": "validating", "STOPPED": "stopped"}
"""Each state's colour, a variable of the page's style sheet."""
_WIDTHS = {"wide": 9.0, "narrow": 4.7}
"""Inches: of 72 points, as the font's size."""

# What matplotlib draws with, and what stands for it in the page.
_COLOURS = {name: f"#0102{number:02x}" for number, name in enumerate(("ink", "bad", "good", *STATES.values()))}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.12,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _COLOURS["ink"]),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _COLOURS["ink"]),
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _svg(draw: Callable[[Figure, Results], None], height: float, size: str, results: Results) -> str:
    """Return what ``draw`` draws as an SVG element of class ``size``.

    Its groups have classes for ids: two elements of one page must not share an id.
    """
    buffer = io.StringIO()
    with rc_context({**_SETTINGS, "svg.hashsalt": f"{draw.__name__} {size}"}):
        figure = Figure(figsize=(_WIDTHS[size], height), layout="constrained")
        draw(figure, results)
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg class="{size}"', 1).replace('<g id="', '<g class="')
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _bands(axes: Axes, results: Results) -> None:
    for band in results.bands:
        colour = _COLOURS[STATES[band.state]]
        axes.axvspan(band.began, band.ended, color=colour, alpha=0.15, linewidth=0, gid=f"band-{STATES[band.state]}")


def _timeline(figure: Figure, results: Results) -> None:
    """Plot states as bands, the nonces of each phase over time, and every chat as a mark."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _bands(upper, results)
    _bands(lower, results)
    at = [sample.at for sample in results.samples]
    for name, colour in (("checked", "generating"), ("valid", "good"), ("recomputed", "validating")):
        counts = [getattr(sample, name) for sample in results.samples]
        upper.plot(at, counts, color=_COLOURS[colour], linewidth=2, gid=name)
    upper.set(ylabel="nonces", ylim=(0, None))
    served = [chat for chat in results.chats if chat.served]
    began = [chat.began for chat in served]
    refused = [chat.began for chat in results.chats if chat.status == 503]
    blue = _COLOURS["validating"]
    lower.hlines([1.0] * len(served), began, [chat.ended for chat in served], color=blue, linewidth=5, alpha=0.5)
    lower.plot(began, [1.0] * len(served), "|", color=blue, markersize=12, gid="served")
    lower.plot(refused, [0.0] * len(refused), "x", color=_COLOURS["bad"], gid="refused")
    lower.set(xlabel="seconds", ylim=(-0.6, 1.6))
    lower.set_yticks([0, 1], ["503", "chats"])
    lower.grid(visible=False)
    upper.margins(x=0.005)


def _claims(figure: Figure, results: Results) -> None:
    """Plot how far each claimed fingerprint is from the node's own, a line per claim, and the threshold."""
    axes = figure.subplots()
    for line, judged in enumerate(results.judged):
        colour, gid = ("good", "honest") if judged.claim.honest else ("bad", "cheat")
        lines = [line] * len(judged.distances)
        axes.plot(judged.distances, lines, "o", color=_COLOURS[colour], alpha=0.35, markersize=5, gid=gid)
    axes.axvline(results.dist_threshold, color=_COLOURS["ink"], linestyle="--", gid="threshold")
    axes.set(xlabel="distance from the node's fingerprint", xlim=(0, 2), ylim=(max(1, len(results.judged)) - 0.5, -0.5))
    axes.set_yticks(range(len(results.judged)), [judged.claim.name for judged in results.judged])
    axes.grid(visible=False, axis="y")


def _distances(figure: Figure, results: Results) -> None:
    """Plot the distances of consecutive nonces and the density that theory predicts."""
    axes = figure.subplots()
    centre, deviation = np.sqrt(2), (2 * results.vocab_size) ** -0.5
    shown = [centre - 4.5 * deviation, min(2.0, centre + 4.5 * deviation), results.r_target, *results.survey]
    x = np.linspace(min(shown), max(shown), 400)
    if results.survey:
        bins = min(40, max(8, len(results.survey) // 8))
        axes.hist(results.survey, bins=bins, density=True, color=_COLOURS["validating"], alpha=0.5, gid="survey")
    axes.plot(x, theory.density(x, results.vocab_size), color=_COLOURS["generating"], linewidth=2, gid="theory")
    axes.axvline(results.r_target, color=_COLOURS["ink"], linestyle="--", gid="r-target")
    axes.set(xlabel="distance to the target", ylabel="density", xlim=(x[0], x[-1]))
    axes.locator_params(axis="x", nbins=6)


def _latency(figure: Figure, results: Results) -> None:
    """Plot the distributions of waits for first tokens and for later ones, users alone and while validating."""
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    waits = results.latencies()
    for axes, what in zip(panels, (FIRST, BETWEEN), strict=True):
        axes.set_title(f"time to the {what}" if what == FIRST else f"time {what}", loc="left", fontsize=10)
        axes.set(ylabel="share of waits", ylim=(0, 1.04))
        for wait in waits:
            if wait.what == what and wait.milliseconds:
                colour, line = ("ink", "--") if wait.when == ALONE else ("validating", "-")
                gid = f"{what} {wait.when}".replace(" ", "-")
                axes.ecdf(wait.milliseconds, color=_COLOURS[colour], linestyle=line, linewidth=2, gid=gid)
    # Tokens that arrive together are hardly any time apart: the axis begins at 1 ms, or where the distributions do.
    starts = [wait.percentile(2) for wait in waits if wait.milliseconds]
    ends = [max(wait.milliseconds) for wait in waits if wait.milliseconds]
    start, end = max(1, 0.8 * min(starts, default=1)), max([2, *ends])
    axes.set(xlabel="milliseconds", xscale="log", xlim=(start, end))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if end < 1000 * start else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


_HEIGHTS = {_timeline: 3.6, _claims: 3.0, _distances: 3.0, _latency: 4.2}


def plots(results: Results) -> dict[str, str]:
    """Return the SVG elements of the plots: timeline, claims, distances and latency."""
    return {
        draw.__name__[1:]: "\n".join(_svg(draw, height, size, results) for size in _WIDTHS)
        for draw, height in _HEIGHTS.items()
    }
