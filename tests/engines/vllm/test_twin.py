"""A twin shares every weight with the served model, and nothing else; stand-ins serve in place of vLLM."""

import functools
import types

import pytest
import torch
from torch import nn
from vllm_stand_ins import BaseLayerWithLoRA, CustomOp, Linear, MLAAttention, Model

from poc_kernels.engines.vllm.twin import Layout, Twin

pytestmark = pytest.mark.usefixtures("stand_ins")


def run(module, batch=2, length=5):
    x = torch.randn(batch * length, 32, generator=torch.Generator().manual_seed(1))
    return module(None, torch.arange(length).repeat(batch), None, x)


def states(twin, batch=2, length=5):
    twin.layout = Layout(batch, length)
    return run(twin.model, batch, length)


def test_every_tensor_is_shared_and_every_module_is_another():
    model = Model()
    model.register_buffer("scale", torch.ones(2))
    twin = Twin(model)
    for (name, served), (same, tensor) in zip(model.state_dict().items(), twin.model.state_dict().items(), strict=True):
        assert (same, tensor.data_ptr()) == (name, served.data_ptr())
    for (name, served), (same, module) in zip(model.named_modules(), twin.model.named_modules(), strict=True):
        assert same == name
        assert module is not served
        assert type(module) is type(served)


def test_sequences_are_computed_without_the_served_attention():
    twin = Twin(Model())
    together = states(twin, batch=3)
    torch.testing.assert_close(together[:5], states(twin, batch=1)[:5])


def test_nothing_set_on_one_shows_on_the_other():
    model = Model()
    twin = Twin(model)
    expected = states(twin)
    model.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the served model ran"))
    model.layers[1].forward = None
    model.layers[2].norm._forward_method = None
    model.norm = None
    twin.model.extra = 1
    twin.model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert torch.equal(states(twin), expected)
    assert not hasattr(model, "extra")
    assert not model.layers[0]._forward_pre_hooks


def test_hooks_of_the_served_model_are_left_behind():
    model = Model()
    model.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the served model ran"))
    states(Twin(model))


def test_attributes_that_hold_modules_hold_their_clones():
    model = Model()
    first, shared = model.layers[0], [1, 2]
    vars(model).update(
        first=first,
        listed=[first, "x"],
        paired=(first.norm, 1),
        named={"first": first, "other": 2},
        method=first.mlp.forward,
        partial=functools.partial(first.mlp.forward, x=first.norm),
        shared=shared,
    )
    twin = Twin(model).model
    clone = twin.layers[0]
    assert twin.first is clone
    assert twin.listed == [clone, "x"]
    assert twin.paired == (clone.norm, 1)
    assert twin.named == {"first": clone, "other": 2}
    assert twin.method.__self__ is clone.mlp
    assert twin.partial.func.__self__ is clone.mlp
    assert twin.partial.keywords == {"x": clone.norm}
    assert twin.shared is shared
    assert model.listed == [first, "x"]


def test_a_module_that_is_there_twice_is_cloned_once():
    model = Model()
    model.layers[1].mlp = model.layers[0].mlp
    twin = Twin(model).model
    assert twin.layers[1].mlp is twin.layers[0].mlp


def test_scratch_of_kernels_is_its_own():
    model = Model()
    model.layers[0].mlp.workspace = torch.ones(4, dtype=torch.int32)
    model.layers[1].mlp.workspace = nn.Parameter(torch.ones(4), requires_grad=False)
    twin = Twin(model).model
    for layer, served in zip(twin.layers[:2], model.layers[:2], strict=True):
        assert layer.mlp.workspace.data_ptr() != served.mlp.workspace.data_ptr()
        assert layer.mlp.workspace.tolist() == [0] * 4


def test_a_compiled_server_gives_the_bits_of_an_eager_one(monkeypatch):
    eager = states(Twin(Model()))
    monkeypatch.setattr(CustomOp, "compiled", True)
    model = Model()
    model.do_not_compile = False
    assert model.norm._forward_method.__name__ == "forward_native"
    twin = Twin(model)
    assert twin.model.do_not_compile
    assert torch.equal(states(twin), eager)
    assert not model.do_not_compile


def test_adapters_of_users_have_no_effect():
    model = Model()
    expected = states(Twin(model))
    model.layers[1].mlp = BaseLayerWithLoRA(model.layers[1].mlp)
    twin = Twin(model)
    assert type(twin.model.layers[1].mlp) is Linear
    assert torch.equal(states(twin), expected)


def test_latent_attention_takes_the_tokens_of_a_forward():
    layer = MLAAttention(heads=3, nope=8, rope=4, value=6, rank=16)
    model = Model()
    model.extra = layer
    twin = Twin(model)
    twin.layout = Layout(2, 5)
    query, latent, rotated = torch.randn(10, 3, 12), torch.randn(10, 16), torch.randn(10, 4)
    both = twin.model.extra(query, latent, rotated.unsqueeze(1), output_shape=(10, 18), q_dcp_replicated=None)
    twin.layout = Layout(1, 5)
    second = twin.model.extra(query[5:], latent[5:], rotated[5:].unsqueeze(1))
    assert both.shape == (10, 18)
    torch.testing.assert_close(both[5:], second)


def test_output_has_the_shape_and_dtype_that_are_asked_for():
    twin = Twin(Model())
    twin.layout = Layout(2, 3)
    query, key = torch.randn(6, 32), torch.randn(6, 16)
    attention = twin.model.layers[0].attn
    assert attention(query, key, key).shape == (6, 32)
    assert attention(query.view(6, 4, 8), key, key, output_shape=(3, 64)).shape == (3, 64)
    assert attention(query, key, key, output_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_supported_is_refused():
    model = Model()
    model.layers[1].attn.attn_type = "encoder"
    with pytest.raises(ValueError, match=r"proofs take no attention of type encoder, which layers\.1\.attn has"):
        Twin(model)


def test_decoder_layers_are_those_with_attention():
    model = Model(layers=2)
    model.experts = nn.ModuleList(Linear(4, 4) for _ in range(9))
    twin = Twin(model)
    assert twin.decoder_layers() is twin.model.layers
    model.layers = nn.Sequential(*model.layers)
    with pytest.raises(ValueError, match="model must have a list of decoder layers, Model has none"):
        Twin(model).decoder_layers()


def replace_parameter(model):
    model.layers[1].mlp.weight = nn.Parameter(model.layers[1].mlp.weight.clone(), requires_grad=False)


def replace_data(model):
    model.layers[1].mlp.weight.data = model.layers[1].mlp.weight.clone()


def replace_buffer(model):
    model.scale = model.scale.clone()


def replace_plain_tensor(model):
    model.layers[0].packed = model.layers[0].packed.clone()


def replace_function(model):
    model.layers[0].mlp.kernel = lambda x: x


def replace_module(model):
    model.layers[2] = Model().layers[2]


def add_module(model):
    model.layers.append(Model().layers[0])


@pytest.mark.parametrize(
    "replace",
    [
        replace_parameter,
        replace_data,
        replace_buffer,
        replace_plain_tensor,
        replace_function,
        replace_module,
        add_module,
    ],
)
def test_what_was_replaced_is_noticed(replace):
    model = Model()
    model.register_buffer("scale", torch.ones(2))
    model.layers[0].packed = torch.ones(2)
    model.layers[0].mlp.kernel = lambda x: x
    twin = Twin(model)
    assert twin.is_of(model)
    replace(model)
    assert not twin.is_of(model)
    assert Twin(model).is_of(model)


def test_what_is_overwritten_where_it_lies_needs_no_new_twin():
    model = Model()
    twin = Twin(model)
    before = states(twin)
    model.layers[1].mlp.weight.mul_(2)
    model.layers[0].attn.kv_cache = torch.zeros(8)
    model.layers[0].attn.forward = types.MethodType(type(model.layers[0].attn).forward, model.layers[0].attn)
    assert twin.is_of(model)
    assert not torch.equal(states(twin), before)


def test_a_twin_keeps_no_cache_alive():
    model = Model()
    assert Twin(model).model.layers[0].attn.kv_cache is None
    assert model.layers[0].attn.kv_cache is not None
