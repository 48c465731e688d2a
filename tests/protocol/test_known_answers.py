"""The known answers of the protocol, computed with the published routines."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from poc_kernels.protocol import nonce_inputs, permutations, target
from poc_kernels.protocol.distances.distance import distances, permutation_seed
from poc_kernels.protocol.inputs import hash32, inputs_seed, normal, seed32

CASES = json.loads((Path(__file__).parent.parent / "data" / "poc2_vectors.json").read_text())["cases"]
TOLERANCE = 2e-5  # of the vectors' float values: they were printed in decimal


@pytest.fixture(params=CASES, ids=[case["block_hash"] for case in CASES])
def case(request):
    return request.param


def test_seeds(case):
    block, key = case["block_hash"], case["public_key"]
    assert [inputs_seed(block, key, nonce) for nonce in case["nonces"]] == case["seeds"]["inputs"]
    assert [permutation_seed(block, key, nonce) for nonce in case["nonces"]] == case["seeds"]["permutation"]
    assert seed32(f"{block}_target") == case["seeds"]["target"]


def test_hash(case):
    hashes = hash32([case["seeds"]["target"]], 0, 4)
    assert hashes.dtype == torch.int32
    assert [value % 2**32 for value in hashes[0].tolist()] == case["murmur_first4"]


def test_inputs(case):
    x = nonce_inputs(case["block_hash"], case["public_key"], case["nonces"], case["seq_len"], case["dim"])
    assert x.shape == (len(case["nonces"]), case["seq_len"], case["dim"])
    flat = x.flatten(1)
    expected = torch.tensor(case["inputs_first8"]), torch.tensor(case["inputs_last4"])
    assert (flat[:, :8] - expected[0]).abs().max() < TOLERANCE
    assert (flat[:, -4:] - expected[1]).abs().max() < TOLERANCE
    assert float(flat.mean()) == pytest.approx(case["inputs_mean"], abs=TOLERANCE)
    assert float(flat.std()) == pytest.approx(case["inputs_std"], abs=TOLERANCE)


def test_permutations(case):
    p = permutations(case["block_hash"], case["public_key"], case["nonces"], case["vocab"])
    assert p[:, :8].tolist() == case["permutation_first8"]
    digests = [hashlib.sha256(row.numpy().astype("<i8").tobytes()).hexdigest() for row in p]
    assert digests == case["permutation_sha256_int64_le"]


def test_target(case):
    t = target(case["block_hash"], case["vocab"])
    assert t.dtype == torch.float32
    assert (t[:4] - torch.tensor(case["target_first4"])).abs().max() < TOLERANCE
    assert float(t.double().norm()) == pytest.approx(1, abs=1e-6)


def test_distances(case):
    vocab = case["vocab"]
    index = torch.arange(len(case["nonces"]) * vocab).view(-1, vocab)
    words = ((index + case["logits_salt"]) * 2654435761) % 2**32
    logits = (words.double() / 2**32 * 2 - 1).float()
    p = permutations(case["block_hash"], case["public_key"], case["nonces"], vocab)
    computed = distances(logits, p, target(case["block_hash"], vocab))
    assert computed.dtype == torch.float32
    assert (computed - torch.tensor(case["distances"])).abs().max() < TOLERANCE


def test_normal_of_one_number_and_none():
    assert normal([1], 0).shape == (1, 0)
    assert torch.equal(normal([1], 1), normal([1], 2)[:, :1])
