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

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binomtest, fisher_exact, kstest


def share_below(distance: float, dimensions: int) -> float:
    """Return the probability of a distance below ``distance``, in [0, 2], in at least 2 ``dimensions``."""
    half = (dimensions - 1) / 2
    return float(beta.cdf(distance**2 / 4, half, half))


def distance_at(share: float, dimensions: int) -> float:
    """Return the distance that a ``share`` in (0, 1) of nonces is below: the inverse of `share_below`."""
    half = (dimensions - 1) / 2
    return 2 * math.sqrt(float(beta.ppf(share, half, half)))


def density(distances: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    """Return the probability density at each of ``distances``, per unit of distance."""
    half = (dimensions - 1) / 2
    # d/dr of the distribution of (1 - c) / 2 = r**2 / 4, which is that of (1 + c) / 2 by symmetry.
    values: NDArray[np.float64] = beta.pdf(distances**2 / 4, half, half) * distances / 2
    return values


def agreement(distances: Sequence[float], dimensions: int) -> float:
    """Return the p-value of the Kolmogorov-Smirnov test of ``distances`` against the theory."""
    half = (dimensions - 1) / 2
    return float(kstest(np.square(distances) / 4, beta(half, half).cdf).pvalue)


def share_agreement(valid: int, checked: int, share: float) -> float:
    """Return the two-sided p-value of ``valid`` valid nonces among ``checked`` where a ``share`` is expected."""
    return float(binomtest(valid, checked, share).pvalue)


def same_share(valid: int, checked: int, other_valid: int, other_checked: int) -> float:
    """Return the p-value of Fisher's exact test that two samples of nonces have the same share of valid ones."""
    table = [[valid, checked - valid], [other_valid, other_checked - other_valid]]
    return float(fisher_exact(table).pvalue)
