import copy
import io
import math
import pickle
import re

import pytest
import torch
from helpers import DTYPES, assert_same_bits, expected, rows_of_every_kind
from vectors import VECTORS

from poc_kernels import RandomProjection, residual_projection, seed_from_block_hash, seed_tensor

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
    on_meta = RandomProjection.from_block_hash("a", 40, device="meta")
    assert on_meta.seed.item() == seed_from_block_hash("a"), "a seed is never without its value"


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
    assert projections.seed.nbytes == 8
    assert [*projections.parameters(), *projections.buffers()] == []
    file = io.BytesIO()
    torch.save(projections, file)
    assert len(file.getvalue()) < 4096


class Model(torch.nn.Module):
    """A model with its projections inside."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 40)
        self.projections = RandomProjection(2**64 - 3, 40)

    def forward(self, x):
        return self.projections.post(self.linear(self.projections.pre(x)))


def test_a_checkpoint_has_no_seed_and_loads_into_a_module_of_any_round():
    saved, other = Model(), Model()
    state = saved.state_dict()
    assert set(state) == {"linear.weight", "linear.bias"}
    other.projections.set_seed(6)
    assert other.load_state_dict(state).missing_keys == []
    assert other.projections.seed.item() == 6


def test_a_checkpoint_of_before_with_a_seed_is_loaded():
    state = {**Model().state_dict(), "projections.seed": torch.tensor(7)}
    model = Model()
    address = model.projections.seed.data_ptr()
    model.load_state_dict(state)
    assert model.projections.seed.data_ptr() == address
    assert_same_bits(model.projections.pre(X), expected(X, seed=7))
    assert "projections.seed" in state


def dirty_empty_like(tensor, **options):
    """Memory as it was left: to_empty promises no more."""
    return torch.full_like(tensor, 0x55, **options)


@pytest.mark.parametrize("assign", [False, True])
def test_memory_that_is_not_filled_never_becomes_the_seed(assign, monkeypatch):
    wanted = Model()
    with torch.device("meta"):
        model = Model()
    assert model(X.to("meta")).is_meta
    monkeypatch.setattr(torch, "empty_like", dirty_empty_like)
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict(), assign=assign)
    assert_same_bits(model(X), wanted(X))
    again = model.to("meta").to_empty(device="cpu")
    again.load_state_dict(wanted.state_dict())
    assert_same_bits(again(X), wanted(X))
    model.projections.to_empty(device="cpu")
    assert_same_bits(model.projections.pre(X), expected(X, seed=2**64 - 3))


def test_a_module_that_transformers_loads_keeps_its_seed(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "projected"

    class Pretrained(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.inner = Model()
            self.post_init()

        def _init_weights(self, module):
            pass

    saved = Pretrained(Config())
    saved.save_pretrained(tmp_path)
    loaded = Pretrained.from_pretrained(tmp_path)
    assert_same_bits(loaded.inner(X), saved.inner(X))


@pytest.mark.parametrize(
    "change",
    [
        *(lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()),
        *(lambda m: m.cpu(), lambda m: m.type(torch.float16), lambda m: m.share_memory()),
    ],
    ids=["bfloat16", "half", "double", "float", "cpu", "type", "share_memory"],
)
def test_a_dtype_for_the_model_leaves_the_seed_alone(change):
    projections = change(RandomProjection(2**63 + 1, 40))
    assert projections.seed.dtype == torch.int64
    assert projections.seed.item() % 2**64 == 2**63 + 1
    assert_same_bits(projections.pre(X), expected(X, seed=2**63 + 1))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CLONES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
CLONE_IDS = ["deepcopy", "pickle", "torch.save"]


@pytest.mark.parametrize("clone", CLONES, ids=CLONE_IDS)
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


@pytest.mark.parametrize("clone", CLONES, ids=CLONE_IDS)
def test_a_copy_made_or_moved_in_inference_mode_is_set_outside_it(clone, device):
    with torch.inference_mode():
        other = clone(RandomProjection(5, 40)).to(device)
    other.set_seed(6)
    assert other.seed.device.type == device.type
    assert_same_bits(other.pre(X.to(device)), expected(X, seed=6))


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


def test_block_hashes_must_be_utf8():
    for call in (RandomProjection(5, 40).set_block_hash, lambda value: RandomProjection.from_block_hash(value, 40)):
        with pytest.raises(ValueError, match="block_hash must be text that UTF-8 can encode, got surrogates not"):
            call("block \ud800")


@pytest.mark.parametrize("block_hash", [5, b"abc", None])
def test_block_hashes_must_be_strings(block_hash):
    for call in (RandomProjection(5, 40).set_block_hash, lambda value: RandomProjection.from_block_hash(value, 40)):
        with pytest.raises(TypeError, match=f"block_hash must be a str, got {type(block_hash).__name__}"):
            call(block_hash)
