"""The figures of a run: percentiles, their ratios to those of chat alone, shares of the solo rate, and the goals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.interference.load import Block, Condition, Request

KEY = "beside"
"""The key of the run in a result file. Keys in these files stay as they are, so that published figures can be read."""
KINDS = ("first", "between")
"""Time to first token, counted from when the request was due; time between the tokens of a request."""
PERCENTILES = (50, 95, 99)
GRID = np.concatenate([np.linspace(0, 0.95, 96), np.linspace(0.951, 1, 50)])
"""Quantiles that are kept of a distribution, more finely in its tail."""
FEW_ABOVE = 10
"""A 99th percentile with fewer samples above it is marked as resting on few."""
RESAMPLES = 400
STRETCH_SECONDS = 1.0
"""Requests that arrive in one stretch of a block are drawn together, since requests in one batch share its gaps."""
ALONE, SOLO = "chat alone", "validation alone"


def times(blocks: Sequence[Block]) -> dict[str, list[np.ndarray]]:
    """Return each request's time to first token and its times between tokens, in seconds."""
    return times_of([request for block in blocks for request in block.requests])


def times_of(requests: Sequence[Request]) -> dict[str, list[np.ndarray]]:
    """Return the same for some requests."""
    return {
        "first": [np.array([request.times[0] - request.due]) for request in requests],
        "between": [np.diff(request.times) for request in requests],
    }


def summary(samples: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """Return the percentiles, how many samples lie above the last, and the quantiles of `GRID`; None if empty."""
    values = np.concatenate([*samples, np.empty(0)])
    if len(values) == 0:
        return None
    at = {f"p{percentile}": float(np.percentile(values, percentile)) for percentile in PERCENTILES}
    return {
        "samples": len(values),
        **at,
        "above_p99": int((values > at["p99"]).sum()),
        "quantiles": [float(f"{value:.5g}") for value in np.quantile(values, GRID)],
    }


def ratios(co_located: Sequence[Block], alone: Sequence[Block], seed: int) -> dict[str, dict[str, list[float]]] | None:
    """Return each percentile of each kind over that of chat alone, and its interval of 95 %.

    The interval comes from rounds drawn again, and in each round from stretches of its time; both sides, which had the
    same arrivals, get the same draws. So it includes what requests in a batch share, and what lasted for a block. With
    few rounds it is rough.

    Args:
        co_located, alone: blocks; those at the same place belong to the same round.
    """
    both = [[_stretches(block) for block in blocks] for blocks in (co_located, alone)]
    point = _percentile_ratios(*([cut for block in blocks for cut in block] for blocks in both))
    if point is None:
        return None
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        drawn: tuple[list[Any], list[Any]] = ([], [])
        for turn in generator.integers(0, len(alone), len(alone)):
            cuts = len(both[1][turn])
            for cut in generator.integers(0, cuts, cuts):
                for samples, blocks in zip(drawn, both, strict=True):
                    samples.append(blocks[turn][cut])
        ratio = _percentile_ratios(*drawn)
        if ratio is not None:
            resampled.append(ratio)
    low, high = np.percentile(np.array(resampled), (2.5, 97.5), axis=0)
    return {
        kind: {
            f"p{percentile}": [float(part[row, column]) for part in (point, low, high)]
            for column, percentile in enumerate(PERCENTILES)
        }
        for row, kind in enumerate(KINDS)
    }


def _stretches(block: Block) -> list[dict[str, np.ndarray]]:
    """Return the times of the requests that arrived in each stretch of a block."""
    cuts: list[list[Request]] = [[] for _ in range(max(1, math.ceil(block.seconds / STRETCH_SECONDS)))]
    for request in block.requests:
        cuts[min(int((request.due - block.begin) / STRETCH_SECONDS), len(cuts) - 1)].append(request)
    nothing = np.empty(0)
    return [
        {kind: np.concatenate([nothing, *samples]) for kind, samples in times_of(requests).items()} for requests in cuts
    ]


def _percentile_ratios(co_located: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Return a row for each kind of times, with a column for each percentile; None if one has no samples."""
    rows = []
    for kind in KINDS:
        pair = [np.concatenate([cut[kind] for cut in cuts]) for cuts in (co_located, alone)]
        if any(len(values) == 0 for values in pair):
            return None
        rows.append(np.percentile(pair[0], PERCENTILES) / np.percentile(pair[1], PERCENTILES))
    return np.array(rows)


def _lengths(values: Sequence[float], seconds: float) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {
        "count": len(values),
        "p50": float(p50),
        "p99": float(p99),
        "max": float(max(values)),
        "share_of_time": float(sum(values) / seconds),
    }


def _engine(blocks: Sequence[Block]) -> dict[str, float | None] | None:
    """Return what the engine counted in blocks; None where it counts nothing.

    A step's seconds are those without slices, of steps that another follows at once: the engine knows no others. The
    share of the time that steps take is an estimate, by their mean.
    """
    counted = [block.counters for block in blocks if block.counters is not None]
    if not counted:
        return None
    total = {name: sum(each[name] for each in counted) for name in counted[0]}
    steps, slices, seconds = total["steps"], total["slices"], total["seconds"]
    step_seconds = total["step_seconds"] / max(total["steps_followed"], 1)
    return {
        "steps": steps,
        "tokens_per_step": total["tokens"] / steps if steps else None,
        "step_seconds": step_seconds or None,
        "seconds_before_steps": total["seconds_between_steps"] / steps if steps else None,
        "steps_share": steps * step_seconds / seconds,
        "slices": slices,
        "slice_seconds": total["slice_seconds"] / slices if slices else None,
        "slices_share": total["slice_seconds"] / seconds,
        "slices_share_before_steps": total["seconds_between_steps"] / seconds,
    }


def cells(blocks: dict[Condition, list[Block]], seed: int) -> list[dict[str, Any]]:
    """Return the figures of one request rate, a cell for each condition, including `ALONE` and `SOLO`."""
    by_name = {condition.name: pooled for condition, pooled in blocks.items()}
    solo = _nonces_per_second(by_name[SOLO])
    return [_cell(condition, pooled, by_name[ALONE], solo, seed) for condition, pooled in blocks.items()]


def _nonces_per_second(blocks: Sequence[Block]) -> float:
    return sum(block.nonces for block in blocks) / sum(block.seconds for block in blocks)


def _cell(condition: Condition, blocks: list[Block], alone: list[Block], solo: float, seed: int) -> dict[str, Any]:
    seconds = sum(block.seconds for block in blocks)
    own = times(blocks)
    co_located = condition.chat and condition.validation
    late = [request.submitted - request.due for block in blocks for request in block.requests]
    nonces = _nonces_per_second(blocks)
    return {
        "condition": condition.name,
        "chat": condition.chat,
        "validation": condition.validation,
        "share": condition.share,
        "paced": condition.paced,
        "blocks": len(blocks),
        "seconds": seconds,
        "done": sum(len(block.requests) for block in blocks),
        "refused": sum(block.refused for block in blocks),
        "tokens_per_second": sum(block.tokens for block in blocks) / seconds,
        "nonces_per_second": nonces if condition.validation else None,
        "solo_share": nonces / solo if co_located and solo > 0 else None,
        **{kind: summary(own[kind]) for kind in KINDS},
        "ratios": ratios(blocks, alone, seed) if co_located else None,
        "slices": _lengths([value for block in blocks for value in block.slices], seconds),
        "waits": _lengths([value for block in blocks for value in block.step_waits], seconds),
        "held": _lengths([value for block in blocks for value in block.slice_waits], seconds),
        "engine": _engine(blocks),
        "late_p99": float(np.percentile(late, 99)) if late else None,
    }


class Goal(NamedTuple):
    """The limits of the default pacing at one request rate."""

    engine: str
    device: str
    rate: str
    limits: dict[tuple[str, str], float]
    """By kind of times and percentile: the largest, over that of chat alone, that meets the goal."""
    solo_share: float
    """The smallest share of its solo rate that validation must have."""


TRANSFORMERS, VLLM = ENGINES = ("transformers", "vllm")
LIGHT, HALF, NEAR_SATURATION = "light", "half", "near saturation"
STEADY = "one chat every 0.25 s"
"""A rate of vLLM's that does not depend on the machine's speed."""
_VLLM_LIMITS = {("between", "p99"): 1.25, ("first", "p95"): 1.25}
GOALS = (
    Goal(TRANSFORMERS, "cpu", LIGHT, {("between", "p99"): 1.25}, 0.40),
    Goal(TRANSFORMERS, "cuda", HALF, {("between", "p99"): 1.05, ("first", "p99"): 1.05}, 0.80),
    Goal(VLLM, "cpu", LIGHT, _VLLM_LIMITS, 0.40),
    Goal(VLLM, "cpu", STEADY, _VLLM_LIMITS, 0.40),
)
PREFILL_GOAL = 0.9
"""The least tokens per second of proofs alone, over those of the same server's prompts alone."""
NAMES = {"first": "time to first token", "between": "time between tokens"}


class Verdict(NamedTuple):
    """One limit of a goal, and what was measured."""

    what: str
    limit: str
    measured: str
    met: bool | None
    """None where nothing was measured, or where the figure meets the limit and its interval does not."""


def judge(run: dict[str, Any]) -> list[Verdict]:
    """Judge each limit for the run's engine and device by the cell of the default pacing."""
    engine = engine_of(run)
    verdicts = []
    for goal in GOALS:
        if (goal.engine, goal.device) != (engine, run["device"]):
            continue
        cell = cell_of(run, goal.rate, run["default"])
        for (kind, percentile), limit in goal.limits.items():
            what, limit_text = f"{percentile} of {NAMES[kind]}, {goal.rate} rate", f"at most {limit:g} of chat alone"
            ratio = None if cell is None or cell["ratios"] is None else cell["ratios"][kind][percentile]
            if cell is None or ratio is None:
                verdicts.append(Verdict(what, limit_text, "not measured", None))
                continue
            above = _above(cell[kind], percentile)
            note = f"; rests on {above} samples above it" if above < FEW_ABOVE else ""
            text = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}{note})"
            shown = None if ratio[0] <= limit < ratio[2] else ratio[0] <= limit
            verdicts.append(Verdict(what, limit_text, text, shown))
        what = f"validation while users are served, {goal.rate} rate"
        limit_text = f"at least {goal.solo_share:.0%} of its solo rate"
        if cell is None or cell["solo_share"] is None:
            verdicts.append(Verdict(what, limit_text, "not measured", None))
        else:
            share = cell["solo_share"]
            verdicts.append(Verdict(what, limit_text, f"{share:.1%}", share >= goal.solo_share))
    if run.get("prefill") is not None:
        ratio, low, high = run["prefill"]["ratio"]
        verdicts.append(
            Verdict(
                "proofs alone, tokens per second",
                f"at least {PREFILL_GOAL:g} of the same server's prompts alone",
                f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                ratio >= PREFILL_GOAL,
            )
        )
    return verdicts


def engine_of(run: dict[str, Any]) -> str:
    """Return the engine of a run; older files have no word for it."""
    return str(run.get("engine", TRANSFORMERS))


def cell_of(run: dict[str, Any], rate: str, condition: str) -> dict[str, Any] | None:
    """Return the cell of a condition at a rate; None where it was not measured."""
    found = [cell for each in run["rates"] if each["name"] == rate for cell in each["cells"]]
    return next((cell for cell in found if cell["condition"] == condition), None)


def _above(summary: dict[str, Any], percentile: str) -> int:
    """Return how many samples lie above a percentile."""
    if percentile == "p99":
        return int(summary["above_p99"])
    return int(summary["samples"] * (100 - int(percentile[1:])) // 100)


def bound(alone: dict[str, Any]) -> float | None:
    """Return the largest share of its solo rate that validation can have without taking time from the steps of users.

    It is the part of the time in which the engine computes no steps with chat alone: a schedule that never idles and
    whose steps are those of chat alone gives validation that much, whatever it does to latencies.
    """
    return None if alone.get("engine") is None else max(0.0, 1 - alone["engine"]["steps_share"])
