"""The distribution of distances that geometry predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import trapezoid

from poc_kernels.demo import theory

DIMENSIONS = (3, 64, 2048, 151936)


def simulated(dimensions: int, count: int, seed: int = 0) -> np.ndarray:
    """Distances of random directions from a fixed one."""
    directions = np.random.default_rng(seed).standard_normal((count, dimensions))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    target = np.zeros(dimensions)
    target[0] = 1
    return np.linalg.norm(directions - target, axis=1)


def grid(dimensions: int) -> np.ndarray:
    deviation = (2 * dimensions) ** -0.5
    return np.linspace(max(0, math.sqrt(2) - 10 * deviation), min(2, math.sqrt(2) + 10 * deviation), 20001)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_density_integrates_to_one_and_to_the_share_below(dimensions):
    x = grid(dimensions)
    y = theory.density(x, dimensions)
    assert trapezoid(y, x) == pytest.approx(1, abs=1e-6)
    half = len(x) // 3
    below = trapezoid(y[: half + 1], x[: half + 1])
    assert below == pytest.approx(theory.share_below(x[half], dimensions), abs=1e-6)


def test_density_is_the_published_one():
    x = np.array([1.3, 1.38, 1.41, 1.45])
    cosine = 1 - x**2 / 2
    shape = (1 - cosine**2) ** ((2048 - 3) / 2) * x  # dc = -r dr
    y = theory.density(x, 2048)
    np.testing.assert_allclose(y / y[2], shape / shape[2], rtol=1e-9)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("share", [1e-4, 0.2, 0.5, 0.999])
def test_distance_at_inverts_share_below(dimensions, share):
    assert theory.share_below(theory.distance_at(share, dimensions), dimensions) == pytest.approx(share, rel=1e-6)


def test_half_lie_below_the_square_root_of_two():
    assert theory.distance_at(0.5, 2048) == pytest.approx(math.sqrt(2), abs=1e-12)


@pytest.mark.parametrize("dimensions", [3, 64, 512])
def test_simulation_agrees(dimensions):
    distances = simulated(dimensions, 4000)
    assert theory.agreement(distances.tolist(), dimensions) > 1e-3
    r = theory.distance_at(0.2, dimensions)
    assert theory.share_agreement(int((distances < r).sum()), 4000, 0.2) > 1e-3


def test_another_distribution_does_not():
    distances = simulated(512, 2000)
    assert theory.agreement((distances * 0.99).tolist(), 512) < 1e-6
    assert theory.agreement(distances.tolist(), 2048) < 1e-6
    assert theory.share_agreement(600, 2000, 0.2) < 1e-6


def test_two_samples_have_one_share_or_not():
    assert theory.same_share(200, 1000, 24, 100) > 0.2
    assert theory.same_share(200, 1000, 60, 100) < 1e-12
