"""Arguments of the wrong type, or too large for 64 bits: the functions name them, what they got and what they take."""

import re

import pytest
import torch

from poc_kernels import RandomProjection, projection_entries, projection_matrix, random_projection, residual_projection

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
