"""Proof batches, the binomial test, and its rates by simulation."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from poc_kernels.protocol import ProofBatch, probability_honest, validate_distances
from poc_kernels.protocol.honesty import HONEST_INVALID_RATE


def batch(nonces=(1, 2, 3), dist=(1.0, 1.1, 1.2), **changes):
    return ProofBatch(
        **{
            "public_key": "key",
            "block_hash": "block",
            "block_height": 7,
            "nonces": list(nonces),
            "dist": list(dist),
            "node_id": 4,
            **changes,
        }
    )


def test_a_batch_as_json():
    assert json.loads(json.dumps(batch().to_dict())) == {
        "public_key": "key",
        "block_hash": "block",
        "block_height": 7,
        "nonces": [1, 2, 3],
        "dist": [1.0, 1.1, 1.2],
        "node_id": 4,
    }


def test_below_keeps_what_is_strictly_nearer():
    kept = batch().below(1.1)
    assert (kept.nonces, kept.dist, len(kept)) == ([1], [1.0], 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nonces": [1, 1, 2]}, ValueError, "nonces must be distinct, got 1 repeated"),
        ({"nonces": [1, -2, 3]}, ValueError, "nonces must be in"),
        ({"nonces": [1, 2**63, 3]}, ValueError, "nonces must be in"),
        ({"nonces": [1, "2", 3]}, TypeError, "nonces must be an int, got str"),
        ({"dist": [1.0]}, ValueError, "dist must be empty or have a distance for each of the 3 nonces, got 1"),
        ({"dist": [1.0, math.nan, 1]}, ValueError, "dist must be finite, got nan"),
        ({"dist": [1.0, -0.5, 1]}, ValueError, "dist must hold distances of at least 0, got -0.5"),
        ({"dist": [1.0, None, 1]}, TypeError, "dist must be a float, got NoneType"),
        ({"node_id": -2}, ValueError, "node_id must be in"),
        ({"public_key": ""}, ValueError, "public_key must have"),
        ({"block_height": "7"}, TypeError, "block_height must be an int, got str"),
    ],
)
def test_bad_batches_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        batch(**changes)


def test_lists_are_asked_for():
    with pytest.raises(TypeError, match="nonces must be a list, got tuple"):
        ProofBatch("key", "block", 7, (1, 2), [])


def _exact_tail(k, n):
    p = Fraction(HONEST_INVALID_RATE).limit_denominator(10**6)
    return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 32), (1, 32), (2, 32), (3, 1000), (5, 200), (32, 32)])
def test_probability_is_the_binomial_tail(k, n):
    assert probability_honest(k, n) == pytest.approx(_exact_tail(k, n), rel=1e-9)


def test_probability_of_nothing_and_of_nonsense():
    assert probability_honest(0, 0) == 1.0
    with pytest.raises(ValueError, match="n_invalid must be in"):
        probability_honest(2, 1)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        probability_honest(0, 1.0)


def test_an_empty_batch_is_honest():
    verdict = validate_distances(batch([], []), [], 1.4, 0.01)
    assert (verdict.n_invalid, verdict.probability_honest, verdict.fraud_detected) == (0, 1.0, False)


def test_without_claims_there_is_no_verdict():
    verdict = validate_distances(batch(dist=[]), [1.9, 1.9, 1.9], 1.4, 0.01)
    assert verdict.dist == [1.9, 1.9, 1.9]
    assert (verdict.received_dist, verdict.n_invalid, verdict.fraud_detected) == ([], 0, False)


@pytest.mark.parametrize(
    ("received", "recomputed", "invalid"),
    [
        (1.39, 1.39, 0),
        (1.39, 1.4, 0),  # recomputed at the target is not above it
        (1.39, 1.4000001, 1),
        (1.4, 1.39, 1),  # received at the target is not below it
        (1.5, 1.5, 1),
        (1.39, 2.0, 1),
    ],
)
def test_what_counts_as_invalid(received, recomputed, invalid):
    verdict = validate_distances(batch([1], [received]), [recomputed], 1.4, 0.01)
    assert verdict.n_invalid == invalid
    assert (verdict.received_dist, verdict.dist) == ([received], [recomputed])


def test_a_distance_for_each_nonce():
    with pytest.raises(ValueError, match="recomputed must have 3 distances, one per nonce, got 2"):
        validate_distances(batch(), [1.0, 1.0], 1.4, 0.01)


@pytest.mark.parametrize("size", [1, 32, 200, 1000])
def test_honest_batches_are_accepted_at_the_stated_rate(size):
    # Honest nodes whose nonces fail to validate as often as the test allows: fraud is cried at most at the threshold.
    random = np.random.default_rng(size)
    threshold = 0.01
    cried = 0
    trials = 2000
    for n_invalid in random.binomial(size, HONEST_INVALID_RATE, trials):
        distances = [1.5] * n_invalid + [1.3] * (size - n_invalid)
        verdict = validate_distances(batch(range(size), [1.3] * size), distances, 1.4, threshold)
        assert verdict.n_invalid == n_invalid
        cried += verdict.fraud_detected
    assert cried / trials <= threshold + 5 * math.sqrt(threshold / trials)


@pytest.mark.parametrize(("size", "forged_share", "caught"), [(32, 0.5, 0.999), (200, 0.05, 0.99), (1000, 0.02, 0.999)])
def test_forged_batches_are_caught(size, forged_share, caught):
    # A forged nonce was never computed: its true distance is that of an unrelated vector, near sqrt(2) in 2,000
    # dimensions, and the claim below r_target = 1.36 is true by luck once in hundreds.
    random = np.random.default_rng(1)
    r_target, trials = 1.36, 300
    found = 0
    for _ in range(trials):
        forged = random.random(size) < forged_share
        unrelated = np.sqrt(2 - 2 * random.normal(0, 1 / math.sqrt(2000), size))
        recomputed = np.where(forged, unrelated, 1.3).tolist()
        verdict = validate_distances(batch(range(size), [1.3] * size), recomputed, r_target, 0.01)
        found += verdict.fraud_detected
    assert found / trials >= caught
