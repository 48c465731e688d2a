"""The last lines of first light: what is wrong, rates against those assumed, and times against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.gpu_check.apart import OUT_OF_TIME
from bench.gpu_check.light_checks import Form
from bench.gpu_check.light_times import SIZE, variants
from bench.projection import model

FASTEST = 5
"""Forms that are named for each number of rows."""


def text(
    facts: Mapping[str, Any],
    checks: Mapping[str, str | None],
    rates: Mapping[str, float],
    times: Mapping[str, list[dict[str, Any]]],
) -> str:
    """Return the table of what `first_light.Light` has found."""
    if not facts:
        return "FIRST LIGHT: no device"
    wrong, late = not_right(checks), [name for name, verdict in checks.items() if _is_late(verdict)]
    right = len(checks) - len(wrong) - len(late)
    lines = [f"FIRST LIGHT on {facts['name']}: {right} checks are right, {len(wrong)} are not, {len(late)} not made"]
    lines += [f"  NOT RIGHT {name}: {verdict}" for name, verdict in wrong.items()]
    lines += [f"  not made: {'; '.join(late)}"] * bool(late)
    lines += _rates(rates)
    measured = measured_rates(rates)
    for group, found in times.items():
        bits, rows = map(int, group.split())
        forms = {str(form): form for form in variants(tuple(facts["capability"]), bits, rows, SIZE, facts["sms"])}
        lines += _group(bits, rows, found, forms, measured)
    return "\n".join(lines)


def _is_late(verdict: str | None) -> bool:
    return verdict is not None and verdict.startswith(OUT_OF_TIME)


def not_right(checks: Mapping[str, str | None]) -> dict[str, str]:
    """Return what is wrong by check; what there was no time for is not."""
    return {name: verdict for name, verdict in checks.items() if verdict and not _is_late(verdict)}


def measured_rates(rates: Mapping[str, float]) -> model.Rates:
    """Return the rates that were measured, and those assumed of an H200 where none was."""
    names = {field.name for field in dataclasses.fields(model.Rates)}
    found = {name: value for name, value in rates.items() if name in names}
    if "clock_hz" in found:
        found["busy_clock_hz"] = min(found["clock_hz"], model.H200.busy_clock_hz)
    return dataclasses.replace(model.H200, **found)  # type: ignore[arg-type]


def _rates(rates: Mapping[str, float]) -> list[str]:
    if not rates:
        return ["rates: not measured"]
    assumed = dataclasses.asdict(model.H200)
    return ["rates, and what the model assumes of an H200:"] + [
        f"  {name:<45} {value:12.4g}" + (f"  assumed {assumed[name]:.4g}" if name in assumed else "")
        for name, value in rates.items()
    ]


def _group(
    bits: int, rows: int, found: list[dict[str, Any]], forms: Mapping[str, Form], rates: model.Rates
) -> list[str]:
    timed = {each["name"]: each["seconds"] for each in found if each["seconds"] is not None}
    peer = timed.pop("stored", None)
    chosen = next(iter(forms))
    first = "" if peer is None else f"stored {1e6 * peer:.1f} us, "
    lines = [f"{bits} bits, M = {rows}: {first}model {1e6 * model.stored(rows, SIZE, rates):.1f}"]
    fastest = sorted(timed, key=lambda name: timed[name])
    for name in fastest[:FASTEST] + [chosen] * (chosen in fastest[FASTEST:]):
        ratio = "" if peer is None else f" {timed[name] / peer:5.2f}x"
        lines.append(
            f"  {1e6 * timed[name]:9.1f} us{ratio}  {_predicted(rows, forms.get(name), rates)}  {name}"
            + (" <- the table's" if name == chosen else "")
        )
    lines += [f"  NOT TIMED {each['name']}: {each['error']}" for each in found if each["error"]]
    return lines


def _predicted(rows: int, form: Form | None, rates: model.Rates) -> str:
    """Return the model's time of a form, blank where its machine code has not been counted."""
    counts = form and model.COUNTS.get((form.bits, form.tile.columns, form.tile.rows))
    if not form or not counts or form.tile.turn != (2 if counts.hidden > 100 else 1):
        return " " * 13
    times = model.product(rows, SIZE, form.bits, form.tile, form.parts, counts, rates)
    return f"model {1e6 * times.total:7.1f}"
