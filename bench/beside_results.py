"""What a run of the suite beside inference says: percentiles, ratios to chat alone, shares of the solo rate, goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from beside_load import Block, Condition

KINDS = ("first", "between")
"""Time to first token, from when the request was due; time between the tokens of a request."""
PERCENTILES = (50, 95, 99)
GRID = np.concatenate([np.linspace(0, 0.95, 96), np.linspace(0.951, 1, 50)])
"""Quantiles that are kept of a distribution: its tail more finely."""
FEW_ABOVE = 10
"""A 99th percentile with fewer samples above it is told to rest on few."""
RESAMPLES = 400
ALONE, SOLO = "chat alone", "validation alone"


def times(blocks: Sequence[Block]) -> dict[str, list[np.ndarray]]:
    """Of each request, its time to first token and its times between tokens, in seconds."""
    requests = [request for block in blocks for request in block.requests]
    return {
        "first": [np.array([request.times[0] - request.due]) for request in requests],
        "between": [np.diff(request.times) for request in requests],
    }


def summary(samples: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """Percentiles of all samples, how many lie above the last of them, and the quantiles of `GRID`; None of nothing."""
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


def ratios(beside: Sequence[np.ndarray], alone: Sequence[np.ndarray], seed: int) -> dict[str, list[float]] | None:
    """Each percentile over that of chat alone, and the interval that holds 95 % of the ratios of resampled requests."""
    both = [np.concatenate([*samples, np.empty(0)]) for samples in (beside, alone)]
    if any(len(values) == 0 for values in both):
        return None
    point = np.percentile(both[0], PERCENTILES) / np.percentile(both[1], PERCENTILES)
    generator = np.random.default_rng(seed)
    resampled = np.array(
        [_resampled(beside, generator) / _resampled(alone, generator) for _ in range(RESAMPLES)], dtype=float
    )
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    return {
        f"p{percentile}": [float(value) for value in triple]
        for percentile, triple in zip(PERCENTILES, zip(point, low, high, strict=True), strict=True)
    }


def _resampled(samples: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    chosen = generator.integers(0, len(samples), len(samples))
    return np.percentile(np.concatenate([samples[index] for index in chosen]), PERCENTILES)


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
    """The figures of one request rate, a cell for each condition; `ALONE` and `SOLO` are among them."""
    by_name = {condition.name: pooled for condition, pooled in blocks.items()}
    alone = times(by_name[ALONE])
    solo = _nonces_per_second(by_name[SOLO])
    return [_cell(condition, pooled, alone, solo, seed) for condition, pooled in blocks.items()]


def _nonces_per_second(blocks: Sequence[Block]) -> float:
    return sum(block.nonces for block in blocks) / sum(block.seconds for block in blocks)


def _cell(
    condition: Condition, blocks: list[Block], alone: dict[str, list[np.ndarray]], solo: float, seed: int
) -> dict[str, Any]:
    seconds = sum(block.seconds for block in blocks)
    own = times(blocks)
    beside = condition.chat and condition.validation
    late = [request.submitted - request.due for block in blocks for request in block.requests]
    nonces = _nonces_per_second(blocks)
    return {
        "condition": condition.name,
        "chat": condition.chat,
        "validation": condition.validation,
        "share": condition.share,
        "blocks": len(blocks),
        "seconds": seconds,
        "done": sum(len(block.requests) for block in blocks),
        "refused": sum(block.refused for block in blocks),
        "tokens_per_second": sum(block.tokens for block in blocks) / seconds,
        "nonces_per_second": nonces if condition.validation else None,
        "solo_share": nonces / solo if beside and solo > 0 else None,
        **{kind: summary(own[kind]) for kind in KINDS},
        "ratios": {kind: ratios(own[kind], alone[kind], seed) for kind in KINDS} if beside else None,
        "slices": _lengths([value for block in blocks for value in block.slices], seconds),
        "waits": _lengths([value for block in blocks for value in block.waits], seconds),
        "held": _lengths([value for block in blocks for value in block.held], seconds),
        "late_p99": float(np.percentile(late, 99)) if late else None,
    }


class Goal(NamedTuple):
    """Limits of the default pacing at one request rate."""

    device: str
    rate: str
    p99: dict[str, float]
    """Of each kind of times, the largest 99th percentile over that of chat alone."""
    solo_share: float
    """What validation must have of its solo rate, at least."""


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
    """Each limit that is for the run's device, by the cell of the default pacing."""
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
                if cell["share"] == run["default_share"]
            ),
            None,
        )
        for kind, limit in goal.p99.items():
            what, most = f"p99 of {NAMES[kind]}, {goal.rate} rate", f"at most {limit:g} of chat alone"
            ratio = None if cell is None or cell["ratios"][kind] is None else cell["ratios"][kind]["p99"]
            if ratio is None:
                verdicts.append(Verdict(what, most, "not measured", None))
                continue
            few = cell[kind]["above_p99"] < FEW_ABOVE
            note = f"; rests on {cell[kind]['above_p99']} samples above it" if few else ""
            text = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}{note})"
            verdicts.append(Verdict(what, most, text, ratio[0] <= limit))
        what, least = f"validation beside chat, {goal.rate} rate", f"at least {goal.solo_share:.0%} of its solo rate"
        if cell is None or cell["solo_share"] is None:
            verdicts.append(Verdict(what, least, "not measured", None))
        else:
            share = cell["solo_share"]
            verdicts.append(Verdict(what, least, f"{share:.1%}", share >= goal.solo_share))
    return verdicts
