"""Decoder layers are found by what a forward calls, and refused where a transform would not do what it has to."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

from poc_kernels.engines.layers import DecoderLayers

WIDTH = 16


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, states):
        return states + torch.tanh(self.mix(states.cumsum(1)))


class InTuple(Layer):
    """Returns more than states, some of it of their shape."""

    def forward(self, states):
        return super().forward(states), torch.zeros_like(states), None


class InList(Layer):
    def forward(self, states):
        return [super().forward(states), states.sum()]


class Model(nn.Module):
    """A decoder, whose way from layer to layer is `through`."""

    def __init__(self, layer=Layer, count=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(layer() for _ in range(count))
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
            self.norm = nn.LayerNorm(WIDTH)

    def through(self, states):
        for layer in self.layers:
            returned = layer(states)
            states = returned if isinstance(returned, torch.Tensor) else returned[0]
        return states

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        return self.norm(self.through(inputs_embeds))


class WithResidual(Model):
    """As in vLLM: tokens in one dimension, layers that return a residual apart, and norms that add it in place."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, states, residual):
            residual += states
            return torch.tanh(self.mix(residual)), residual

    class Norm(nn.LayerNorm):
        def forward(self, states, residual):
            return super().forward(states + residual)

    sum_first = False

    def __init__(self):
        super().__init__(self.Layer)
        self.norm = self.norm if self.sum_first else self.Norm(WIDTH)

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        states = inputs_embeds.flatten(0, 1).clone()
        residual = torch.zeros_like(states)
        for layer in self.layers:
            states, residual = layer(states, residual)
        states = self.norm(states + residual) if self.sum_first else self.norm(states, residual)
        return states.view(inputs_embeds.shape)


class SummedFirst(WithResidual):
    sum_first = True


class WithoutNorm(Model):
    """The result is what the last layer returns, with its tokens in one dimension inside."""

    class Layer(nn.Linear):
        def __init__(self):
            super().__init__(WIDTH, WIDTH)

    def __init__(self):
        super().__init__(self.Layer)

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        return self.through(inputs_embeds.flatten(0, 1)).view(inputs_embeds.shape)


def found(model, run=None, count=None):
    device = torch.device("cpu")
    return DecoderLayers(model, run or model, hidden_size=WIDTH, dtype=torch.float32, device=device, count=count)


def transformed(layers, model, after_layer, x):
    with layers.transformed(after_layer, x.shape):
        return model(x)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


X = random(3, 7, WIDTH)


@pytest.mark.parametrize("layer", [Layer, InTuple, InList])
def test_what_a_layer_returns_is_transformed_before_the_next_one_has_it(layer):
    model, seen = Model(layer), []
    layers = found(model, count=3)
    assert layers.count == 3

    def after_layer(number, states):
        seen.append((number, tuple(states.shape)))
        return states.mul_(number - 1.5)

    states = X
    with torch.inference_mode():
        for number, each in enumerate(model.layers):
            states = Layer.forward(each, states) * (number - 1.5)
        assert_same_bits(transformed(layers, model, after_layer, X.clone()), model.norm(states))
    assert seen == [(number, (3, 7, WIDTH)) for number in range(3)]
    assert_same_bits(transformed(layers, model, lambda _, states: states, X), model(X))


@pytest.mark.parametrize("kind", [WithResidual, SummedFirst])
def test_both_parts_of_the_states_are_transformed(kind):
    model, seen = kind(), []
    layers = found(model)
    signs = 1 - 2 * torch.randint(2, (3, 7, WIDTH), generator=torch.Generator().manual_seed(0))

    def after_layer(number, states):
        seen.append((number, tuple(states.shape)))
        return states.mul_(signs)

    result = transformed(layers, model, after_layer, X)
    assert seen == [(number, (3, 7, WIDTH)) for number in (0, 0, 1, 1, 2, 2)]
    states, residual = X.flatten(0, 1).clone(), torch.zeros(21, WIDTH)
    with torch.inference_mode():
        for each in model.layers:
            states, residual = (part * signs.view(21, WIDTH) for part in each(states, residual))
        expected = nn.LayerNorm.forward(model.norm, states + residual)
    assert_same_bits(result, expected.view(X.shape))


def test_a_model_without_a_last_norm():
    model = WithoutNorm()
    layers = found(model)
    expected = X
    with torch.inference_mode():
        for each in model.layers:
            expected = nn.functional.linear(expected.flatten(0, 1), each.weight, each.bias).view(X.shape) * 2
    assert_same_bits(transformed(layers, model, lambda _, states: states * 2, X), expected)


def test_nothing_stays_at_the_layers():
    model = Model()
    layers = found(model)
    expected = model(X)

    def fail(layer, states):
        raise KeyError(layer)

    with pytest.raises(KeyError, match="0"):
        transformed(layers, model, fail, X)
    assert_same_bits(model(X), expected)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


class Parallel(Model):
    def through(self, states):
        return sum(layer(states) for layer in self.layers)


class AddedOutside(Model):
    def through(self, states):
        for layer in self.layers:
            states = states + layer(states)
        return states


class ChangedBetween(Model):
    def through(self, states):
        for layer in self.layers:
            states = layer(states)
            states += 1
        return states


class ChangedAtTheEnd(Model):
    def through(self, states):
        return super().through(states) * 2


class Twice(Model):
    def through(self, states):
        return super().through(super().through(states))


class Shared(Model):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 3)


class Backwards(Model):
    def through(self, states):
        for layer in reversed(self.layers):
            states = layer(states)
        return states


class LastLeftOut(Model):
    def through(self, states):
        for layer in self.layers:
            before, states = states, layer(states)
        return before


class WithoutHooks(Model):
    def through(self, states):
        for layer in self.layers:
            states = layer.forward(states)
        return states


class TwoLists(Model):
    def through(self, states):
        states = super().through(states)
        for expert in self.experts:
            states = expert(states)
        return states


class Within(Model):
    """Only a list within a list is called as it should be."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.layers])

    def through(self, states):
        for layer in self.layers[0]:
            states = layer(states)
        return states


class Inputs(Model):
    """A layer that returns its very input, which the result depends on otherwise too."""

    def __init__(self):
        super().__init__()
        self.layers[0] = nn.Identity()

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        return super().forward(inputs_embeds) + inputs_embeds


class Time(Model):
    """States with the positions first."""

    def through(self, states):
        return super().through(states.transpose(0, 1)).transpose(0, 1)


class Widened(Model):
    """States in another dtype than that of input embeddings."""

    def through(self, states):
        return Model.through(self.double(), states.double())


class WidenedResidual(WithResidual):
    """A residual in another dtype than that of states, which no transform is given."""

    class Layer(WithResidual.Layer):
        def forward(self, states, residual):
            residual = residual + states
            return torch.tanh(self.mix(residual.float())), residual

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        states, residual = inputs_embeds.flatten(0, 1), 0.0
        for layer in self.layers:
            states, residual = layer(states, torch.as_tensor(residual, dtype=torch.float64))
        return self.norm(states, residual.float()).view(inputs_embeds.shape)


class ResidualWithin(WithResidual):
    """A residual that layers return inside of something else."""

    class Layer(WithResidual.Layer):
        def forward(self, states, within):
            states, residual = super().forward(states, within["residual"])
            return states, {"residual": residual}

    @torch.inference_mode()
    def forward(self, inputs_embeds):
        states = inputs_embeds.flatten(0, 1).clone()
        within = {"residual": torch.zeros_like(states)}
        for layer in self.layers:
            states, within = layer(states, within)
        return self.norm(states, within["residual"]).view(inputs_embeds.shape)


class ByLuck(Model):
    @torch.inference_mode()
    def forward(self, inputs_embeds):
        return super().forward(inputs_embeds) + torch.rand(())


class Deaf(Model):
    @torch.inference_mode()
    def forward(self, inputs_embeds):
        return super().forward(inputs_embeds) * 0


class Fails(Model):
    def through(self, states):
        raise MemoryError("no room")


@pytest.mark.parametrize(
    ("kind", "count", "reason"),
    [
        (Parallel, None, "what layers.0 returns is not what is taken after it"),
        (AddedOutside, None, "what layers.0 returns is not what is taken after it"),
        (ChangedBetween, None, "what layers.0 returns is not what is taken after it"),
        (ChangedAtTheEnd, None, "what layers.2 returns is not what is taken after it"),
        (LastLeftOut, None, "what layers.2 returns is not what is taken after it"),
        (Time, None, "what layers.0 returns is not what is taken after it"),
        (Widened, None, "what layers.0 returns is not what is taken after it"),
        (Twice, None, "no lists of modules are called so"),
        (Shared, None, "no lists of modules are called so"),
        (Backwards, None, "no lists of modules are called so"),
        (WithoutHooks, None, "no lists of modules are called so"),
        (Within, None, "no lists of modules are called so"),
        (TwoLists, 3, r"2 lists of 3 \(see its configuration\) modules are called so"),
        (Model, 4, r"no lists of 4 \(see its configuration\) modules are called so"),
        (Inputs, None, "something else changes with what layers return"),
        (WidenedResidual, None, "results depend on more than what a transform of the last layer's states is given"),
        (ResidualWithin, None, "results depend on more than what a transform of the last layer's states is given"),
        (ByLuck, None, "results change with a transform that changes nothing"),
        (Deaf, None, "results do not change with what its first and its last layer return"),
        (Fails, None, "MemoryError: no room"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_that_is_refused(kind, count, reason):
    model = kind()
    layers = found(model, count=count)
    message = rf"what the one before it returned, so that this can be transformed; {kind.__name__}: {reason}$"
    with pytest.raises(ValueError, match=message):
        _ = layers.count
    with pytest.raises(ValueError, match=message), layers.transformed(lambda _, states: states, X.shape):
        pytest.fail("a forward began without its transform")
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_a_layer_that_is_left_out_later_is_noticed():
    model = Model()
    layers = found(model)
    model.layers = model.layers[:-1]
    with pytest.raises(RuntimeError, match=r"must call 3 decoder layers once each, in order, it called \[0, 1\]"):
        transformed(layers, model, lambda _, states: states, X)


def test_another_copy_of_the_same_structure():
    first, second = Model(), Model()
    layers = found(first)
    layers.move_to(second)
    assert layers.count == 3
    changed = transformed(layers, second, lambda _, states: -states, X)
    assert not torch.equal(changed, second(X))
    layers.move_to(Model(count=2))
    with pytest.raises(ValueError, match="keep its 3 decoder layers in layers, others are there now"):
        _ = layers.count
