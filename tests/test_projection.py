import copy
import io
import math
import pickle
import re

import pytest
import torch
from helpers import DTYPES, assert_same_bits, expected, rows_of_every_kind
from vectors import VECTORS

from poc_kernels import RandomProjection, residual_projection, seed_tensor

X = rows_of_every_kind(6, 40, torch.float32, 1)
MASK = torch.tensor([True, False, True, True, False, True])


def test_pre_and_post_are_domains_0_and_1():
    projections = RandomProjection(5, 40, 0.5, activation_bits=8)
    options = {"seed": 5, "std": 0.5, "activation_bits": 8}
    assert_same_bits(projections.pre(X), expected(X, domain=0, **options))
    assert_same_bits(projections.post(X), expected(X, domain=1, **options))
    assert_same_bits(projections(X, 2**32 - 1), expected(X, domain=2**32 - 1, **options))
    assert_same_bits(projections.pre(X, MASK), expected(X, row_mask=MASK, domain=0, **options))
    assert_same_bits(projections.post(X, row_mask=MASK), expected(X, row_mask=MASK, domain=1, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_leading_shape(dtype):
    x = X.to(dtype)
    projections = RandomProjection(5, 40)
    assert_same_bits(projections.pre(x.reshape(2, 3, 40)).reshape(6, 40), expected(x, seed=5))
    assert_same_bits(projections.pre(x[0]), expected(x[:1], seed=5)[0])


@pytest.mark.parametrize("case", VECTORS["seeds"], ids=lambda case: case["block_hash"])
def test_the_seed_of_a_block_hash(case):
    made = RandomProjection.from_block_hash(case["block_hash"], 40, 0.5, activation_bits=8)
    assert made.seed.item() == case["int64"]
    assert (made.dim, made.std, made.activation_bits) == (40, 0.5, 8)
    later = RandomProjection(1, 40)
    later.set_block_hash(case["block_hash"])
    assert later.seed.item() == case["int64"]


def test_defaults():
    projections = RandomProjection(5, 40)
    assert (projections.std, projections.activation_bits, projections.seed.device.type) == (0.01, 16, "cpu")
    assert_same_bits(projections.pre(X), residual_projection(X, seed_tensor(5)))
    assert RandomProjection.from_block_hash("a", 40, device="meta").seed.device.type == "meta"


@pytest.mark.parametrize("seed", [0, 6, -1, 2**63, 2**64 - 1, -(2**63)])
def test_a_seed_is_set_in_place(seed):
    projections = RandomProjection(5, 40)
    tensor, address = projections.seed, projections.seed.data_ptr()
    projections.set_seed(seed)
    assert projections.seed is tensor
    assert projections.seed.data_ptr() == address
    assert_same_bits(projections.pre(X), expected(X, seed=seed))


def test_rounds_differ():
    projections = RandomProjection(5, 40)
    before = projections.pre(X)
    projections.set_seed(6)
    assert not torch.equal(projections.pre(X), before)
    assert not torch.equal(projections.post(X), projections.pre(X))


def test_the_whole_state_is_the_seed():
    projections = RandomProjection(5, 4096)
    state = projections.state_dict()
    assert list(state) == ["seed"]
    assert sum(value.nbytes for value in state.values()) == 8
    assert list(projections.parameters()) == []
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 4096


def test_state_round_trips():
    saved, other = RandomProjection(2**64 - 3, 40), RandomProjection(1, 40)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    address = other.seed.data_ptr()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.seed.data_ptr() == address
    assert_same_bits(other.pre(X), expected(X, seed=2**64 - 3))


@pytest.mark.parametrize(
    "change",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float(), lambda m: m.cpu()],
    ids=["bfloat16", "half", "double", "float", "cpu"],
)
def test_a_dtype_for_the_model_leaves_the_seed_alone(change):
    projections = change(RandomProjection(2**63 + 1, 40))
    assert projections.seed.dtype == torch.int64
    assert projections.seed.item() % 2**64 == 2**63 + 1
    assert_same_bits(projections.pre(X), expected(X, seed=2**63 + 1))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(clone):
    projections = RandomProjection(5, 40, 0.5, activation_bits=8)
    other = clone(projections)
    assert_same_bits(other.post(X), projections.post(X))
    other.set_seed(6)
    assert projections.seed.item() == 5
    assert repr(other) == repr(projections) == "RandomProjection(dim=40, std=0.5, activation_bits=8)"


def test_made_in_inference_mode_and_set_outside_it():
    with torch.inference_mode():
        projections = RandomProjection(5, 40)
        inside = projections.pre(X)
    projections.set_seed(6)
    assert_same_bits(inside, expected(X, seed=5))
    assert_same_bits(projections.pre(X), expected(X, seed=6))
    with torch.inference_mode():
        projections.set_seed(7)
        assert_same_bits(projections.post(X), expected(X, seed=7, domain=1))


def test_gradients_stop_with_a_reason():
    y = RandomProjection(5, 40).pre(X.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="poc_kernels::residual_projection has no backward"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(6, 39), (6, 41), (40, 6), (), (6, 40, 1)])
def test_x_must_have_the_hidden_size(shape):
    with pytest.raises(ValueError, match=re.escape(f"x must have shape [..., 40], got {list(shape)}")):
        RandomProjection(5, 40).pre(torch.zeros(shape))


@pytest.mark.parametrize("dim", [0, -1, 65537])
def test_dim_must_be_in_range(dim):
    with pytest.raises(ValueError, match=re.escape(f"dim must be in [1, 65536], got {dim}")):
        RandomProjection(5, dim)


@pytest.mark.parametrize("dim", [40.0, "40", None, True])
def test_dim_must_be_an_int(dim):
    with pytest.raises(TypeError, match=f"dim must be an int, got {type(dim).__name__}"):
        RandomProjection(5, dim)


@pytest.mark.parametrize("bits", [0, 12, 32])
def test_activation_bits_must_be_16_or_8(bits):
    with pytest.raises(ValueError, match=f"activation_bits must be 16 or 8, got {bits}"):
        RandomProjection(5, 40, activation_bits=bits)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 1e-50])
def test_std_must_give_a_coefficient(std):
    with pytest.raises(ValueError, match=re.escape("std must be positive with float32(std / 92.6917)")):
        RandomProjection(5, 40, std)


@pytest.mark.parametrize("seed", ["abc", 1.0, None, True])
def test_seeds_must_be_ints(seed):
    projections = RandomProjection(5, 40)
    for call in (projections.set_seed, lambda value: RandomProjection(value, 40)):
        with pytest.raises(TypeError, match=f"seed must be an int of 64 bits, got {type(seed).__name__}"):
            call(seed)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_must_fit_64_bits(seed):
    projections = RandomProjection(5, 40)
    for call in (projections.set_seed, lambda value: RandomProjection(value, 40)):
        with pytest.raises(ValueError, match="seed must be an int of 64 bits, in"):
            call(seed)
    assert projections.seed.item() == 5


@pytest.mark.parametrize("block_hash", [5, b"abc", None])
def test_block_hashes_must_be_strings(block_hash):
    for call in (RandomProjection(5, 40).set_block_hash, lambda value: RandomProjection.from_block_hash(value, 40)):
        with pytest.raises(TypeError, match=f"block_hash must be a str, got {type(block_hash).__name__}"):
            call(block_hash)
