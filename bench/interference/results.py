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
        "late_p99": float(np.percentile(late, 99)) if late else None,
    }


class Goal(NamedTuple):
    """The limits of the default pacing at one request rate."""

    device: str
    rate: str
    p99: dict[str, float]
    """By kind of times: the largest 99th percentile, over that of chat alone, that meets the goal."""
    solo_share: float
    """The smallest share of its solo rate that validation must have."""


GOALS = (
    Goal("cpu", "light", {"between": 1.25}, 0.40),
    Goal("cuda", "half", {"between": 1.05, "first": 1.05}, 0.80),
)
NAMES = {"first": "time to first token", "between": "time between tokens"}


class Verdict(NamedTuple):
    """One limit of a goal, and what was measured."""

    what: str
    limit: str
    measured: str
    met: bool | None
    """None where nothing was measured."""


def judge(run: dict[str, Any]) -> list[Verdict]:
    """Judge each limit for the run's device by the cell of the default pacing."""
    verdicts = []
    for goal in GOALS:
        if goal.device != run["device"]:
            continue
        cell = next(
            (
                cell
                for rate in run["rates"]
                if rate["name"] == goal.rate
                for cell in rate["cells"]
                if cell["condition"] == run["default"]
            ),
            None,
        )
        for kind, limit in goal.p99.items():
            what, limit_text = f"p99 of {NAMES[kind]}, {goal.rate} rate", f"at most {limit:g} of chat alone"
            ratio = None if cell is None or cell["ratios"] is None else cell["ratios"][kind]["p99"]
            if ratio is None:
                verdicts.append(Verdict(what, limit_text, "not measured", None))
                continue
            few = cell[kind]["above_p99"] < FEW_ABOVE
            note = f"; rests on {cell[kind]['above_p99']} samples above it" if few else ""
            text = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}{note})"
            verdicts.append(Verdict(what, limit_text, text, ratio[0] <= limit))
        what = f"validation while users are served, {goal.rate} rate"
        limit_text = f"at least {goal.solo_share:.0%} of its solo rate"
        if cell is None or cell["solo_share"] is None:
            verdicts.append(Verdict(what, limit_text, "not measured", None))
        else:
            share = cell["solo_share"]
            verdicts.append(Verdict(what, limit_text, f"{share:.1%}", share >= goal.solo_share))
    return verdicts
