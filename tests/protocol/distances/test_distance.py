"""Distances: against float64, in every position of a batch, and for logits that are no numbers."""

import math

import numpy as np
import poc2_oracle
import pytest
import torch
from helpers import assert_same_bits

from poc_kernels.protocol import permutations, target
from poc_kernels.protocol.distances.distance import distances


def _logits(rows, vocab, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [2, 63, 1000, 4096])
def test_against_float64(device, vocab):
    logits = _logits(5, vocab)
    p = permutations("block", "key", range(5), vocab, device)
    computed = distances(logits.to(device), p, target("block", vocab, device))
    for nonce in range(5):
        assert float(computed[nonce]) == pytest.approx(
            poc2_oracle.distance(logits[nonce].tolist(), "block", "key", nonce), abs=2e-6
        )


def test_a_row_does_not_depend_on_the_others(device):
    logits = _logits(9, 1003).to(device)
    p = permutations("block", "key", range(9), 1003, device)
    unit = target("block", 1003, device)
    together = distances(logits, p, unit)
    order = torch.tensor([4, 8, 0, 2, 7, 1, 3, 6, 5], device=device)
    assert_same_bits(distances(logits[order], p[order], unit), together[order])
    for row in range(9):
        assert_same_bits(distances(logits[row : row + 1], p[row : row + 1], unit), together[row : row + 1])


def test_the_ends_of_the_range():
    unit = target("block", 100)
    p = torch.arange(100).expand(2, 100)
    near, far = distances(torch.stack([unit * 3, unit * -0.5]), p, unit).tolist()
    assert near < 1e-6
    assert far == pytest.approx(2, abs=1e-6)
    assert far <= 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_farthest(value):
    logits = _logits(3, 64)
    expected = distances(logits, torch.arange(64).expand(3, 64), target("b", 64))
    logits[1, 7] = value
    computed = distances(logits, torch.arange(64).expand(3, 64), target("b", 64))
    assert computed.tolist() == [expected[0], 2.0, expected[2]]


def test_logits_of_zero_are_farthest_and_large_ones_do_not_overflow():
    zero, large = torch.zeros(1, 64), _logits(1, 64) * 1e38 / 4
    p = torch.arange(64).expand(1, 64)
    assert distances(zero, p, target("b", 64)).item() == 2.0
    assert distances(large, p, target("b", 64)).item() == pytest.approx(
        distances(large / 1e38, p, target("b", 64)).item(), abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_taken_as_float32(dtype):
    logits = _logits(4, 99).to(dtype)
    p = permutations("block", "key", range(4), 99)
    assert_same_bits(distances(logits, p, target("b", 99)), distances(logits.float(), p, target("b", 99)))


def test_distances_of_unrelated_vectors_follow_theory():
    vocab, rows = 500, 4000
    computed = (
        distances(_logits(rows, vocab), permutations("b", "k", range(rows), vocab), target("b", vocab)).double().numpy()
    )
    cosines = 1 - computed**2 / 2
    # For a uniform direction, cos^2 has mean 1 / vocab.
    assert abs(cosines.mean()) < 5 / np.sqrt(rows * vocab)
    assert cosines.std() * np.sqrt(vocab) == pytest.approx(1, abs=0.06)
