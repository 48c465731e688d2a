"""How repeated measurements are summed up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median, and the percentiles that a tenth of the values lies below and a tenth above."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def ratio_spread(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of two series, round by round, as result files have it."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])._asdict()
