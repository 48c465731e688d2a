"""The report of the demonstration: one HTML file that needs no network and no script."""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path

import jinja2

from . import plots
from .results import Results

MAX_CALLBACKS = 40
"""Maximum number of callbacks that the report lists: the first and the last ones."""


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def html(results: Results) -> str:
    """Return the report as HTML; all text of ``results`` is escaped."""
    source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    calls, half = results.callbacks, MAX_CALLBACKS // 2
    omitted = max(0, len(calls) - MAX_CALLBACKS)
    return template.render(
        results=results,
        figures={plot.__name__: _data_uri(plot(results)) for plot in (plots.distances, plots.timeline, plots.latency)},
        total_seconds=sum(results.parts.values()) or 1.0,
        callbacks=calls[:half] + calls[-half:] if omitted else calls,
        omitted=omitted,
    )


def write(path: Path, results: Results) -> None:
    """Write the report to ``path``, completely or not at all."""
    text = html(results)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
