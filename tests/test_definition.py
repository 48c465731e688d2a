import math
import struct
from fractions import Fraction

import oracle
import pytest
import torch
from vectors import VECTORS

from poc_kernels import definition


@pytest.mark.parametrize("case", VECTORS["seeds"], ids=lambda case: case["block_hash"])
def test_seed_of_a_block_hash(case):
    seed = definition.seed_from_block_hash(case["block_hash"])
    assert seed == case["int64"]
    assert seed % 2**64 == int(case["seed"], 16) == oracle.seed_of(case["block_hash"])


@pytest.mark.parametrize("block_hash", [b"abc123", 5, None])
def test_block_hash_must_be_a_string(block_hash):
    with pytest.raises(TypeError, match=f"block_hash must be a str, got {type(block_hash).__name__}"):
        definition.seed_from_block_hash(block_hash)


@pytest.mark.parametrize(
    ("seed", "signed"),
    [(0, 0), (1, 1), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (-1, -1), (-(2**63), -(2**63))],
)
def test_seed_keeps_its_64_bits(seed, signed):
    assert definition.signed_seed(seed) == signed
    tensor = definition.seed_tensor(seed)
    assert tensor.dtype == torch.int64
    assert tensor.shape == ()
    assert tensor.item() == signed
    assert tensor.item() % 2**64 == seed % 2**64


def test_seed_tensor_lies_where_it_is_asked_for():
    assert definition.seed_tensor(1, "meta").device.type == "meta"
    assert definition.seed_tensor(1, torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_must_fit_64_bits(seed):
    with pytest.raises(ValueError, match=rf"seed must be an int of 64 bits, in \[-2\*\*63, 2\*\*64\), got {seed}"):
        definition.seed_tensor(seed)


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_seed_must_be_an_int(seed):
    with pytest.raises(TypeError, match=f"seed must be an int of 64 bits, got {type(seed).__name__}"):
        definition.seed_tensor(seed)


def test_constants_are_those_of_the_text():
    assert definition.DEFINITION == VECTORS["definition"] == 1
    assert list(definition.TABLE_A) == oracle.A
    assert list(definition.TABLE_B) == oracle.B
    assert (definition.DOMAIN_PRE, definition.DOMAIN_POST, definition.MAX_DOMAIN) == (0, 1, 2**32 - 1)
    assert (definition.MAX_FEATURES, definition.MAX_COLUMNS) == (65536, 2**32 - 1)


def test_sigma_is_the_standard_deviation_of_the_tables():
    magnitudes = [2 * (a + b) + 1 for a in definition.TABLE_A for b in definition.TABLE_B]
    assert Fraction(sum(e * e for e in magnitudes), 64) == Fraction(549872, 64)
    assert math.sqrt(549872 / 64) == definition.SIGMA
    assert max(magnitudes) == 247


@pytest.mark.parametrize("std", [0.01, 0.02, 1.0, 3, 1e-38, 1e-44 * 92.7, 1e39, 3.1e40])
def test_coefficient_is_the_float32_of_the_float64_quotient(std):
    bits = struct.unpack("I", struct.pack("f", definition.coefficient(std)))[0]
    assert oracle.decode(bits, "float32") == oracle.coefficient(std)


@pytest.mark.parametrize("std", [0, 0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-44, 3.2e40, 1e300])
def test_std_must_give_a_coefficient(std):
    with pytest.raises(
        ValueError, match=r"std must be positive with float32\(std / 92.6917\) finite and not zero, got"
    ):
        definition.coefficient(std)
