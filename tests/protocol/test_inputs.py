"""Inputs and permutations: exact hashes, normal numbers, and independence of the batch."""

import math

import numpy as np
import poc2_oracle
import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from poc_kernels.protocol import inputs, nonce_inputs, permutations
from poc_kernels.protocol.inputs import hash32, normal


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 2**31 - 8))
def test_hashes_are_murmur_s(seed, start):
    hashes = [value % 2**32 for value in hash32([seed, seed ^ 1], start, 7)[0].tolist()]
    assert hashes == [poc2_oracle.murmur(start + i, seed) for i in range(7)]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 1000, 1001])
def test_normal_numbers_are_those_of_the_text(count):
    seeds = [0, 1, 2**31, 2**32 - 1]
    values = normal(seeds, count)
    assert values.shape == (4, count)
    assert values.dtype == torch.float32
    for row, seed in zip(values, seeds, strict=True):
        expected = torch.from_numpy(poc2_oracle.normal(seed, count))
        # The angle is rounded to float32 before its cosine is taken: 2**-22 of 2 pi, times the radius.
        assert (row.double() - expected).abs().max() < 2e-6


def test_normal_numbers_have_their_moments():
    values = normal(range(8), 100_001).double()
    assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
    assert float(values.var()) == pytest.approx(1, abs=0.01)
    assert float(values.pow(4).mean()) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seq_len", "dim"), [(1, 1), (3, 33), (16, 64), (5, 1000), (64, 2048)])
def test_a_nonce_s_inputs_do_not_depend_on_its_batch(device, dtype, seq_len, dim):
    nonces = [5, 0, 2**40, 17, 3]
    together = nonce_inputs("block", "key", nonces, seq_len, dim, device, dtype)
    assert together.dtype == dtype
    assert together.shape == (5, seq_len, dim)
    for row, nonce in enumerate(nonces):
        alone = nonce_inputs("block", "key", [nonce], seq_len, dim, device, dtype)
        assert_same_bits(together[row], alone[0], f"inputs of nonce {nonce}")


def test_integers_of_numpy_are_nonces_seeds_and_sizes():
    nonces = np.array([3, 2**40])
    inputs = nonce_inputs("block", "key", nonces, np.int64(4), np.uint8(5))
    assert_same_bits(inputs, nonce_inputs("block", "key", nonces.tolist(), 4, 5))
    order = permutations("block", "key", nonces, np.int64(7))
    assert_same_bits(order, permutations("block", "key", nonces.tolist(), 7))
    seeds = np.array([1, 2**32 - 1], dtype=np.uint32)
    assert_same_bits(normal(seeds, np.int64(9)), normal(seeds.tolist(), 9))
    assert_same_bits(hash32(list(seeds), np.int64(3), np.uint8(9)), hash32(seeds.tolist(), 3, 9))


def test_inputs_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    one = nonce_inputs("block", "key", range(7), 31, 257)
    try:
        torch.set_num_threads(3)
        assert_same_bits(nonce_inputs("block", "key", range(7), 31, 257), one)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_rounded_to_the_dtype_once():
    wide = nonce_inputs("block", "key", [1, 2], 8, 65)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(nonce_inputs("block", "key", [1, 2], 8, 65, dtype=dtype), wide.to(dtype))


@pytest.mark.parametrize("changed", [("other", "key", 1), ("block", "other", 1), ("block", "key", 2)])
def test_inputs_depend_on_block_key_and_nonce(changed):
    block, key, nonce = changed
    assert not torch.equal(nonce_inputs("block", "key", [1], 4, 16), nonce_inputs(block, key, [nonce], 4, 16))


@pytest.mark.parametrize("vocab", [1, 2, 63, 1000, 5003])
def test_permutations_sort_the_hashes(device, vocab):
    p = permutations("block", "key", [3, 1], vocab, device)
    assert p.dtype == torch.int64
    for row, nonce in zip(p.tolist(), [3, 1], strict=True):
        assert row == poc2_oracle.permutation("block", "key", nonce, vocab)


def test_equal_hashes_keep_their_order(monkeypatch):
    # MurmurHash of one block is a bijection, so ties need help: the argsort must be stable and unsigned.
    signed = torch.tensor([[-1, 5, 5, -(2**31), 5, -1, 0]], dtype=torch.int32)
    monkeypatch.setattr(inputs, "hash32", lambda *_: signed.clone())
    assert permutations("block", "key", [0], 7).tolist() == [[6, 1, 2, 4, 3, 0, 5]]
