"""The report of the demonstration: one HTML file that needs no network and no script."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from . import plots
from .results import Results

MAX_CALLBACKS = 40
"""Maximum number of callbacks that the report lists: the first and the last ones."""


def html(results: Results) -> str:
    """Return the report as HTML; all text of ``results`` is escaped."""
    source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    calls, half = results.callbacks, MAX_CALLBACKS // 2
    omitted = max(0, len(calls) - MAX_CALLBACKS)
    return environment.from_string(source).render(
        results=results,
        states=plots.STATES,
        plots={name: Markup(svg) for name, svg in plots.plots(results).items()},
        callbacks=calls[:half] + calls[-half:] if omitted else calls,
        omitted=omitted,
    )


def write(path: Path, results: Results) -> None:
    """Write the report to ``path``, completely or not at all."""
    text = html(results)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
