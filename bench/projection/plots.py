"""The plot of both reports: ratios by the number of rows M, a panel for each D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Line(NamedTuple):
    """The ratios of one form of the product, each with its median, p10 and p90."""

    label: str
    colour: str
    marker: str
    rows: Sequence[int]
    ratios: Sequence[Mapping[str, float]]


def plot_ratios(
    panels: Mapping[int, Sequence[Line]],
    path: Path,
    *,
    title: str,
    label: str,
    legend: str | None = None,
    every_row_count: bool = False,
) -> None:
    """Write a panel for each D to ``path``; shades reach from the 10th to the 90th percentile.

    Args:
        panels: the lines of each D.
        path: of the picture.
        title: above all panels.
        label: what the ratios are.
        legend: title of the legend.
        every_row_count: whether every M has its tick.
    """
    figure, axes_of_sizes = plt.subplots(
        1, len(panels), figsize=(max(4.2 * len(panels), 6), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (size, lines) in zip(axes_of_sizes[0], panels.items(), strict=True):
        for line in lines:
            medians, lows, highs = ([ratio[name] for ratio in line.ratios] for name in ("median", "p10", "p90"))
            axes.plot(line.rows, medians, color=line.colour, marker=line.marker, label=line.label)
            axes.fill_between(line.rows, lows, highs, color=line.colour, alpha=0.2, linewidth=0)
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        if every_row_count:
            ticks = sorted({rows for line in lines for rows in line.rows})
            axes.set_xticks(ticks, [str(rows) for rows in ticks])
        axes.set_xlabel("rows M")
        axes.set_title(f"D = {size}")
        axes.grid(alpha=0.3)
    axes_of_sizes[0][0].set_ylim(bottom=0)
    axes_of_sizes[0][0].set_ylabel(label)
    axes_of_sizes[0][0].legend(title=legend, loc="best")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
