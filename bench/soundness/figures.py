"""How guesses and noise are summed up: shares, quantiles, intervals over nonces, and the gate that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poc_kernels.protocol.artifacts.proofs import StatTest

Array = NDArray[np.float64]

CONFIDENCE = 0.95
GATES = (0.20, 0.30, 0.40)
"""Gates that artifacts are compared at: 0.40 is what the network's chain sends for vectors."""
GATE_MARGIN, GATE_STEP = 1.1, 0.01
SAMPLE = 200
"""Nonces of a validation, for what a gate means."""
_RESAMPLES = 400
_TARGET_SHARE, _CHOSEN_SHARE = 0.2, 0.1


def interval(values: Array, statistic: Callable[[Array], float]) -> tuple[float, float]:
    """Return the interval of a statistic of values [..., nonces] that has it with `CONFIDENCE`: nonces are redrawn."""
    generator = np.random.default_rng(0)
    count = values.shape[-1]
    redrawn = [statistic(values[..., generator.integers(0, count, count)]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(redrawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share(below: NDArray[np.bool_]) -> dict[str, float]:
    """Return the share of reads [reads, nonces] that are true, with its interval over nonces.

    Where none is, or all are, redrawing says nothing; the bound is then that of this many nonces which all agree.
    """
    per_nonce = below.mean(0, dtype=np.float64)
    value = float(per_nonce.mean())
    if value == 0:
        low, high = 0.0, _at_most(len(per_nonce))
    elif value == 1:
        low, high = 1 - _at_most(len(per_nonce)), 1.0
    else:
        low, high = interval(per_nonce, lambda redrawn: float(redrawn.mean()))
    return {"share": value, "low": low, "high": high}


def _at_most(count: int) -> float:
    """Return the largest probability of something that is not seen in ``count`` tries, with `CONFIDENCE`."""
    return float(1 - (1 - CONFIDENCE) ** (1 / count))


def mean(values: Array) -> dict[str, float]:
    """Return the mean of values [reads, nonces], with its interval over nonces."""
    low, high = interval(values.mean(0), lambda redrawn: float(redrawn.mean()))
    return {"mean": float(values.mean()), "low": low, "high": high}


def of_artifacts(errors: Array, gates: Sequence[float]) -> dict[str, Any]:
    """Sum up how far artifacts are from the true ones.

    Args:
        errors: L2 [reads, nonces]; 2 where one is no artifact.
        gates: distances up to which they would agree.
    """
    low, high = interval(errors, lambda redrawn: float(np.median(redrawn)))
    return {
        "median": {"value": float(np.median(errors)), "low": low, "high": high},
        "quantiles": np.quantile(errors, np.linspace(0, 1, 101)).tolist(),
        "below": {f"{gate:.2f}": share(errors <= gate) for gate in gates},
    }


def of_distances(guessed: Array, true: Array) -> dict[str, Any]:
    """Sum up what guessed distances [reads, nonces] say of the true ones.

    ``found`` is the share of valid nonces among the tenth that a guess puts first, where a fifth of all is valid.
    """
    both = np.stack([guessed, true])

    def correlation(values: Array) -> float:
        return float(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1])

    low, high = interval(both, correlation)
    chosen = max(1, round(_CHOSEN_SHARE * guessed.shape[1]))
    valid = true <= np.quantile(true, _TARGET_SHARE, axis=1, keepdims=True)
    first = np.argsort(guessed, axis=1, kind="stable")[:, :chosen]
    return {
        "correlation": {"value": correlation(both), "low": low, "high": high},
        "found": float(np.take_along_axis(valid, first, axis=1).mean()),
    }


def chosen_first(errors: Array, doubt: Array, part: float, gates: Sequence[float]) -> dict[str, Any]:
    """Sum up the part of all reads [reads, nonces] whose guess is least in doubt: what a prover may choose from.

    The interval of a share redraws nonces with all their reads.
    """
    order = _by_doubt(doubt, part)
    nonce = np.unravel_index(order, doubt.shape)[1]
    taken = errors.ravel()[order]
    count = errors.shape[1]
    generator = np.random.default_rng(0)
    weights = [np.bincount(generator.integers(0, count, count), minlength=count)[nonce] for _ in range(_RESAMPLES)]
    below: dict[str, Any] = {}
    for gate in gates:
        passed = taken <= gate
        redrawn = [float((weight * passed).sum() / weight.sum()) for weight in weights if weight.any()]
        low, high = np.quantile(redrawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        if passed.all() or not passed.any():  # as in `share`
            at_most = _at_most(len(set(nonce.tolist())))
            low, high = (1 - at_most, 1.0) if passed.all() else (0.0, at_most)
        below[f"{gate:.2f}"] = {"share": float(passed.mean()), "low": float(low), "high": float(high)}
    return {
        "median": {"value": float(np.median(taken))},
        "quantiles": np.quantile(taken, np.linspace(0, 1, 101)).tolist(),
        "below": below,
        "chosen": len(order),
    }


def least_in_doubt(errors: Array, doubt: Array, part: float) -> Array:
    """Return the errors of the part of all reads [reads, nonces] whose guess is least in doubt, that first."""
    return errors.ravel()[_by_doubt(doubt, part)]


def _by_doubt(doubt: Array, part: float) -> NDArray[np.intp]:
    """Return the places of the part of all reads that is least in doubt, that first."""
    return np.argsort(doubt, axis=None, kind="stable")[: max(1, round(part * doubt.size))]


def of_shares(shares: Array) -> dict[str, Any]:
    """Sum up the shares [blocks] of reads that agree: their mean, its interval over blocks, and each of them."""
    low, high = interval(shares, lambda redrawn: float(redrawn.mean()))
    return {"share": float(shares.mean()), "low": low, "high": high, "shares": shares.tolist()}


def advice(noise: Sequence[Array], cheapest: Sequence[Array], fraud_threshold: float) -> dict[str, Any]:
    """Return the gate and p_mismatch that follow from noise, and what they mean for a validation of `SAMPLE` nonces.

    The gate is `GATE_MARGIN` times the largest 99 % quantile of a kind of noise, rounded up to a multiple of
    `GATE_STEP`. It separates if it is below the median of what each lower precision gives. p_mismatch is the upper end
    of the interval of the share of honest reads above the gate, in whole percent, at least 0.01; where none is above,
    the bound for this many reads.

    Args:
        noise: errors [reads, nonces] of each kind of noise.
        cheapest: the same of each lower precision.
        fraud_threshold: of the verdict.
    """
    worst = max(float(np.quantile(errors, 0.99)) for errors in noise)
    gate = round(GATE_STEP * math.ceil(GATE_MARGIN * worst / GATE_STEP - 1e-9), 2)
    above = max(share(errors > gate)["high"] if (errors > gate).any() else _at_most(errors.size) for errors in noise)
    p_mismatch = max(0.01, math.ceil(100 * above - 1e-9) / 100)
    test = StatTest(gate, p_mismatch, fraud_threshold)
    convict = next(count for count in range(1, SAMPLE + 2) if test.p_value(count, SAMPLE) < fraud_threshold)
    lowest = min(float(np.median(errors)) for errors in cheapest)
    return {
        "noise_q99": worst,
        "precision_median": lowest,
        "gate": gate,
        "separates": gate < lowest,
        "p_mismatch": p_mismatch,
        "convict": convict,
        "sample": SAMPLE,
    }


def replaceable(passes: float, convict: int) -> float:
    """Return the share of a batch that may be guessed, at this share of guesses that pass, with no more mismatches
    than convict nobody."""
    unnoticed = (convict - 1) / SAMPLE
    return 1.0 if passes >= 1 - unnoticed else unnoticed / (1 - passes)
