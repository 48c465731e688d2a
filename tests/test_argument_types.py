"""Arguments of the wrong type, or too large for 64 bits: the functions name them, what they got and what they take."""

import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import assert_same_bits

from poc_kernels import (
    RandomProjection,
    projection_entries,
    projection_matrix,
    random_projection,
    residual_projection,
    seed_tensor,
)
from poc_kernels.definition import coefficient, signed_seed

X, SEED = torch.zeros(2, 8), torch.zeros((), dtype=torch.int64)
CALLS = {
    residual_projection: {"x": X, "seed": SEED},
    random_projection: {"x": X, "seed": SEED, "out_features": 4},
    projection_entries: {"seed": SEED, "domain": 0, "k_start": 0, "k": 2, "n_start": 0, "n": 2},
    projection_matrix: {"seed": SEED, "domain": 0, "k_start": 0, "k": 2, "n_start": 0, "n": 2},
}
INTEGERS = [
    *((residual_projection, name) for name in ("domain", "activation_bits", "column_start", "columns")),
    *((random_projection, name) for name in ("domain", "activation_bits", "column_start", "out_features")),
    *(
        (call, n)
        for call in (projection_entries, projection_matrix)
        for n in ("domain", "k_start", "k", "n_start", "n")
    ),
]


def refused(error, message, call, **changes):
    with pytest.raises(error, match=re.escape(message)):
        call(**{**CALLS[call], **changes})


@pytest.mark.parametrize("wrong", [1.5, 16.0, "3", True, [16]])
@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_integers_must_be_ints(call, name, wrong):
    refused(TypeError, f"{name} must be an int, got {type(wrong).__name__}", call, **{name: wrong})


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float64(16), np.array([16]), torch.tensor(16)])
@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_truth_values_arrays_and_tensors_are_no_integers(call, name, wrong):
    refused(TypeError, f"{name} must be an int, got {type(wrong).__name__}", call, **{name: wrong})


class Index:
    """An integer of some library."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, Index])
@pytest.mark.parametrize("number", [np.float32, np.float16, np.float64, Fraction])
def test_integers_and_numbers_of_other_libraries_are_taken(integer, number):
    x, seed = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), seed_tensor(integer(5))
    std, plain = number(0.5), float(number(0.5))
    residual = {"domain": 1, "activation_bits": 8, "column_start": 2, "columns": 3}
    random = {"out_features": 4, "domain": 1, "activation_bits": 8, "column_start": 2}
    window = {"domain": 1, "k_start": 2, "k": 3, "n_start": 4, "n": 5}
    for call, integers in ((residual_projection, residual), (random_projection, random)):
        y = call(x, seed, std=std, **{name: integer(value) for name, value in integers.items()})
        assert_same_bits(y, call(x, seed, std=plain, **integers))
    wrapped = {name: integer(value) for name, value in window.items()}
    assert_same_bits(projection_entries(seed, **wrapped), projection_entries(seed, **window))
    assert_same_bits(projection_matrix(seed, std=std, **wrapped), projection_matrix(seed, std=plain, **window))
    projections = RandomProjection(integer(5), integer(16), std, activation_bits=integer(8))
    assert repr(projections) == "RandomProjection(dim=16, std=0.5, activation_bits=8)"
    projections.set_seed(integer(7))
    assert projections.seed.item() == 7


@pytest.mark.parametrize(("seed", "signed"), [(np.uint64(2**64 - 3), -3), (np.int64(-3), -3), (np.int8(7), 7)])
def test_seeds_of_numpy(seed, signed):
    assert signed_seed(seed) == signed
    assert type(signed_seed(seed)) is int


@pytest.mark.parametrize("std", [np.float32(0.01), np.float16(0.01), Fraction(1, 3), 1])
def test_a_std_is_rounded_as_the_float_that_it_is(std):
    assert coefficient(std) == coefficient(float(std))


@pytest.mark.parametrize("huge", [2**63, -(2**63) - 1, 10**400])
@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_integers_must_fit_64_bits(call, name, huge):
    refused(ValueError, f"{name} must be an int of 64 bits, got {huge}", call, **{name: huge})


@pytest.mark.parametrize("call", [residual_projection, random_projection, projection_matrix])
@pytest.mark.parametrize("wrong", ["0.01", None, True, [0.01]])
def test_std_must_be_a_number(call, wrong):
    refused(TypeError, f"std must be a float, got {type(wrong).__name__}", call, std=wrong)


@pytest.mark.parametrize("call", [residual_projection, random_projection, projection_matrix])
def test_std_may_not_be_larger_than_any_float(call):
    refused(ValueError, "std must be positive with float32(std / 92.6917) finite", call, std=10**400)


@pytest.mark.parametrize("wrong", ["float32", None, 5])
def test_dtype_must_be_a_dtype(wrong):
    refused(TypeError, f"dtype must be a torch.dtype, got {type(wrong).__name__}", projection_matrix, dtype=wrong)


@pytest.mark.parametrize("name", ["x", "seed", "row_mask"])
def test_tensors_must_be_dense(name):
    sparse = torch.ones(2).to_sparse()
    refused(
        TypeError,
        f"{name} must be a dense (strided) tensor, got layout torch.sparse_coo",
        residual_projection,
        **{name: sparse},
    )


@pytest.mark.parametrize("name", ["x", "seed", "row_mask"])
def test_tensors_must_not_be_nested(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: nested tensors may change
        nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])
    message = f"{name} must be a dense (strided) tensor, got a nested one"
    refused(TypeError, message, residual_projection, **{name: nested})


@pytest.mark.parametrize("wrong", [[1.0], None, 5])
def test_a_module_takes_tensors(wrong):
    projections = RandomProjection(5, 8)
    for call in (projections.pre, projections.post):
        with pytest.raises(TypeError, match=f"x must be a tensor, got {type(wrong).__name__}"):
            call(wrong)


@pytest.mark.parametrize("bits", [16.0, "16", [16], True])
def test_a_module_takes_whole_activation_bits(bits):
    with pytest.raises(TypeError, match=f"activation_bits must be an int, got {type(bits).__name__}"):
        RandomProjection(5, 8, activation_bits=bits)


def test_a_module_loads_no_rounded_seed():
    projections = RandomProjection(5, 8)
    with pytest.raises(TypeError, match=re.escape("seed must be an int64 tensor, got torch.float32")):
        projections.load_state_dict({"seed": torch.tensor(3.7)})
    assert int(projections.seed) == 5
    projections.load_state_dict({"seed": torch.tensor(3)})
    assert int(projections.seed) == 3
