"""The oracle is only as good as its arithmetic, and the comparison of bits only as good as what it notices."""

import struct
from fractions import Fraction

import oracle
import pytest
import torch
from helpers import DTYPES, assert_same_bits, bits_of, dirty_memory, from_bits

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_oracle_encodes_what_it_decodes(dtype):
    canonical = oracle.encode("nan", NAMES[dtype])
    for bits in range(1 << 16):
        number = oracle.decode(bits, NAMES[dtype])
        assert oracle.encode(number, NAMES[dtype]) == (canonical if number == "nan" else bits)


def test_oracle_rounds_float32_as_ieee_does():
    generator = torch.Generator().manual_seed(1)
    doubles = torch.randn(2000, generator=generator, dtype=torch.float64)
    doubles *= torch.exp2(torch.randint(-155, 130, (2000,), generator=generator).double())
    expected = bits_of(doubles.float()).tolist()
    assert [oracle.encode(Fraction(value), "float32") for value in doubles.tolist()] == expected


def test_oracle_rounds_halves_to_even_in_every_format():
    for name, (_, fraction_bits) in oracle.FORMATS.items():
        one = oracle.encode(Fraction(1), name)
        half_place = Fraction(1, 2 << fraction_bits)
        assert oracle.encode(1 + half_place, name) == one
        assert oracle.encode(1 + 3 * half_place, name) == one + 2


def test_oracle_agrees_with_python_on_a_sum_that_cancels():
    assert oracle.total(Fraction(3), Fraction(-3)) == 0
    assert oracle.encode(oracle.total("-0", Fraction(0)), "float32") == 0
    assert struct.pack("<I", oracle.encode(oracle.total("-0", "-0"), "float32")) == struct.pack("<f", -0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_tells_zeros_and_payloads_apart(dtype):
    zeros = torch.zeros(2, 3, dtype=dtype)
    assert_same_bits(zeros, zeros.clone())
    other = zeros.clone()
    other[1, 2] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 6 elements differ, first at \(1, 2\): got 0.0 .*expected -0.0"):
        assert_same_bits(zeros, other)
    nan = torch.full((1,), torch.nan, dtype=dtype)
    assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError, match="first at"):
        assert_same_bits(nan, from_bits(bits_of(nan) + 1, dtype))


def test_same_bits_tells_shapes_and_dtypes_apart():
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(torch.zeros(2, 1), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(torch.zeros(2), torch.zeros(2).half())


@pytest.mark.parametrize("place", [-1, 4])
def test_guards_notice_a_write_beside_the_memory(place):
    def write_beside():
        values = torch.empty(4, dtype=torch.float32)
        values.as_strided((1,), (1,), values.storage_offset() + place).fill_(1.0)

    with pytest.raises(AssertionError, match="wrote"), dirty_memory(0xA5):
        write_beside()


def test_guarded_memory_is_dirty():
    with dirty_memory(0xA5):
        assert (bits_of(torch.empty(2, 3, dtype=torch.int16)) == 0xA5A5).all()
