"""The test that tells an honest batch from a forged one, by how many of its nonces fail to validate."""

from __future__ import annotations

from scipy.stats import binomtest

from .checks import MAX_NONCE, check_int

HONEST_INVALID_RATE = 5e-4
"""The largest share of an honest node's nonces that fail to validate."""


def probability_honest(n_invalid: int, n: int) -> float:
    """Return the p-value of a one-sided binomial test of an honest node's batch; 1 if n is 0.

    It is the probability that at least ``n_invalid`` of ``n`` nonces are invalid where each is with
    `HONEST_INVALID_RATE`.

    Raises:
        TypeError, ValueError: not 0 <= n_invalid <= n, in ints.
    """
    check_int("n", n, 0, MAX_NONCE)
    check_int("n_invalid", n_invalid, 0, n)
    if n == 0:
        return 1.0
    return float(binomtest(n_invalid, n, HONEST_INVALID_RATE, alternative="greater").pvalue)
