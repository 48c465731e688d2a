"""The distribution of distances that geometry predicts for any weights: random directions in V dimensions.

The cosine c of a random direction with a fixed one has a density proportional to (1 - c**2)**((V - 3) / 2), that is,
(1 + c) / 2 has the beta distribution with both parameters (V - 1) / 2. The distance of the two unit vectors is
sqrt(2 - 2c): near sqrt(2), with a standard deviation of about 1 / sqrt(2V).

Permuted logits have such a direction if their mean is near zero compared with their standard deviation. A permutation
keeps the mean: logits with another mean, which many trained models have, give distances that lie closer together,
around a centre that moves a little from block to block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binomtest, fisher_exact, kstest


def _of_directions(dimensions: int) -> Any:
    """Return the distribution of (1 + c) / 2, and by symmetry of (1 - c) / 2 = distance**2 / 4."""
    return beta((dimensions - 1) / 2, (dimensions - 1) / 2)


def share_below(distance: float, dimensions: int) -> float:
    """Return the probability of a distance below ``distance``, in [0, 2], in at least 2 ``dimensions``."""
    return float(_of_directions(dimensions).cdf(distance**2 / 4))


def distance_at(share: float, dimensions: int) -> float:
    """Return the distance that a ``share`` in (0, 1) of nonces is below: the inverse of `share_below`."""
    return 2 * math.sqrt(float(_of_directions(dimensions).ppf(share)))


def density(distances: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    """Return the probability density at each of ``distances``, per unit of distance."""
    values: NDArray[np.float64] = _of_directions(dimensions).pdf(distances**2 / 4) * distances / 2
    return values


def agreement(distances: Sequence[float], dimensions: int) -> float:
    """Return the p-value of the Kolmogorov-Smirnov test of ``distances`` against the theory."""
    return float(kstest(np.square(distances) / 4, _of_directions(dimensions).cdf).pvalue)


def share_agreement(valid: int, checked: int, share: float) -> float:
    """Return the two-sided p-value of ``valid`` valid nonces among ``checked`` where a ``share`` is expected."""
    return float(binomtest(valid, checked, share).pvalue)


def same_share(valid: int, checked: int, other_valid: int, other_checked: int) -> float:
    """Return the p-value of Fisher's exact test that two samples of nonces have the same share of valid ones."""
    table = [[valid, checked - valid], [other_valid, other_checked - other_valid]]
    return float(fisher_exact(table).pvalue)
