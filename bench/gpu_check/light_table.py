"""The last lines of first light: what is wrong, rates against those assumed, and times against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.gpu_check.apart import OUT_OF_TIME
from bench.gpu_check.light_checks import Form
from bench.gpu_check.light_times import SIZE, shipped_variants, variants
from bench.projection import model

FASTEST = 5
"""Forms that are named for each number of rows, besides those of the table."""


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
    lines += _codes(facts, checks)
    failed = failures(facts, checks)
    lines += [f"  NOT RIGHT {name}: {verdict}" for name, verdict in failed.items()]
    lines += [f"  refused, and not right: {name}: {verdict}" for name, verdict in wrong.items() if name not in failed]
    lines += [f"  not made: {'; '.join(late)}"] * bool(late)
    lines += _rates(rates)
    measured = measured_rates(rates)
    for group, found in times.items():
        bits, rows = map(int, group.split())
        case = tuple(facts["capability"]), bits, rows, SIZE, facts["sms"]
        shipped, compiled = shipped_variants(*case), variants(*case)
        forms = {str(form): form for form in (*shipped, *compiled)}
        lines += _group(bits, rows, found, forms, [str(shipped[0]), str(compiled[0])], measured)
    return "\n".join(lines)


def _is_shipped(check: str) -> bool:
    return check.startswith("shipped ")


def _codes(facts: Mapping[str, Any], checks: Mapping[str, str | None]) -> list[str]:
    """Return a line for the machine code that is shipped, and one for what Triton compiles where that is refused."""
    reasons, lines = facts.get("backends", {}), []
    if reasons.get("cuda") is not None:
        lines.append(f"  SHIPPED CODE NOT CHECKED: {reasons['cuda']}")
    elif shipped := {name: verdict for name, verdict in checks.items() if _is_shipped(name)}:
        right = sum(verdict is None for verdict in shipped.values())
        lines.append(f"  shipped code, launched by {facts.get('launcher')}: {right} of {len(shipped)} checks are right")
    if reasons.get("triton") is not None:
        lines.append(f"  Triton's code is not used here, whatever its checks say: {reasons['triton']}")
    return lines


def _is_late(verdict: str | None) -> bool:
    return verdict is not None and verdict.startswith(OUT_OF_TIME)


def not_right(checks: Mapping[str, str | None]) -> dict[str, str]:
    """Return what is wrong by check; what there was no time for is not."""
    return {name: verdict for name, verdict in checks.items() if verdict and not _is_late(verdict)}


def failures(facts: Mapping[str, Any], checks: Mapping[str, str | None]) -> dict[str, str]:
    """Return what is wrong by check, except what Triton compiles where that is refused."""
    refused = facts.get("backends", {}).get("triton") is not None
    return {
        name: verdict
        for name, verdict in not_right(checks).items()
        if not refused or _is_shipped(name) or name == "torch"
    }


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
    bits: int,
    rows: int,
    found: list[dict[str, Any]],
    forms: Mapping[str, Form],
    chosen: list[str],
    rates: model.Rates,
) -> list[str]:
    timed = {each["name"]: each["seconds"] for each in found if each["seconds"] is not None}
    peer = timed.pop("stored", None)
    first = "" if peer is None else f"stored {1e6 * peer:.1f} us, "
    lines = [f"{bits} bits, M = {rows}: {first}model {1e6 * model.stored(rows, SIZE, rates):.1f}"]
    fastest = sorted(timed, key=lambda name: timed[name])
    for name in fastest[:FASTEST] + [name for name in fastest[FASTEST:] if name in chosen]:
        ratio = "" if peer is None else f" {timed[name] / peer:5.2f}x"
        lines.append(
            f"  {1e6 * timed[name]:9.1f} us{ratio}  {_predicted(rows, forms.get(name), rates)}  {name}"
            + (" <- the table's" if name in chosen else "")
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
