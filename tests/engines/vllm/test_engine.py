"""VllmEngine on stand-ins for what it meets of vLLM: an `Engine`, its slices, its context, weights that change."""

import contextlib
import importlib.util
import itertools
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from vllm_stand_ins import Model, worker

from poc_kernels.engines.vllm import compat
from poc_kernels.engines.vllm.engine import VllmEngine
from poc_kernels.engines.vllm.twin import Layout, Twin
from poc_kernels.protocol import DistanceProver, PoCConfig
from poc_kernels.protocol.prover import Row
from poc_kernels.scheduling.repeated import CapturedForward
from poc_kernels.scheduling.slices import MEASURED_FORWARDS

ROWS = [Row("key", nonce) for nonce in range(4)]
CONFIG = PoCConfig("0x00ab", 7, "key", 1.4, batch_size=4, seq_len=12, use_random_projection=True)

pytestmark = pytest.mark.usefixtures("stand_ins")


def random_inputs(batch=3, length=12):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(2))


def test_what_an_engine_says_of_itself():
    engine = VllmEngine(worker())
    assert (engine.hidden_size, engine.vocab_size, engine.max_positions) == (32, 101, 128)
    assert (engine.dtype, engine.device) == (torch.float32, torch.device("cpu"))
    hidden = engine.forward(random_inputs())
    assert hidden.shape == (3, 12, 32)
    assert engine.compute_logits(hidden[:, -1]).shape == (3, 101)  # without the padding of the vocabulary
    assert torch.equal(engine.embed(torch.tensor([5])), Model().tokens[5:6])


def test_a_forward_leaves_its_input_as_it_was():
    engine, x = VllmEngine(worker()), random_inputs()
    before = x.clone()
    engine.forward(x)
    assert torch.equal(x, before)


def test_slices_change_no_bit():
    engine, x = VllmEngine(worker(), slice_seconds=1e-6), random_inputs()
    expected, pauses = engine.forward(x), []
    assert engine.slices is None
    for _ in range(MEASURED_FORWARDS):
        assert_same_bits(engine.forward(x, lambda: pauses.append(1)), expected)
    assert engine.slices is not None
    pauses.clear()
    assert_same_bits(engine.forward(x, lambda: pauses.append(1)), expected)
    assert len(pauses) == len(engine.slices.cuts)
    engine.forward(random_inputs(length=9))
    assert engine.slices is None  # of another shape


def test_a_forward_of_any_shape_leaves_the_slices_alone():
    engine, x = VllmEngine(worker()), random_inputs()
    for _ in range(MEASURED_FORWARDS):
        expected = engine.forward(x)
    slices = engine.slices
    assert engine.compute_states(random_inputs(1, 5)).shape == (1, 5, 32)
    assert engine.slices is slices is not None
    assert_same_bits(engine.forward(x), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((3, 12), torch.float32, ValueError, r"inputs_embeds must have shape \[batch, seq_len, 32\], got \[3, 12\]"),
        ((3, 12, 8), torch.float32, ValueError, r"inputs_embeds must have shape .* got \[3, 12, 8\]"),
        ((3, 12, 32), torch.bfloat16, TypeError, "inputs_embeds must be torch.float32, got torch.bfloat16"),
    ],
)
def test_inputs_that_do_not_fit(shape, dtype, error, message):
    with pytest.raises(error, match=message):
        VllmEngine(worker()).forward(torch.zeros(shape, dtype=dtype))


def test_a_configuration_that_is_not_supported():
    with pytest.raises(ValueError, match="start vLLM without --enable-sleep-mode"):
        VllmEngine(worker(enable_sleep_mode=True))


def test_in_lockstep_it_pauses_before_each_layer_and_nowhere_else():
    plain, lockstep = VllmEngine(worker()), VllmEngine(worker(), lockstep=True)
    x, pauses = random_inputs(), []
    for _ in range(MEASURED_FORWARDS + 1):
        pauses.clear()
        assert_same_bits(lockstep.forward(x, lambda: pauses.append(1)), plain.forward(x))
        assert len(pauses) == 3
    assert lockstep.slices is None


def test_a_forward_in_lockstep_can_be_given_up():
    class GivenUpError(Exception):
        pass

    def give_up():
        raise GivenUpError

    engine, x = VllmEngine(worker(), lockstep=True), random_inputs()
    with pytest.raises(GivenUpError):
        engine.forward(x, give_up)
    engine.compute_states(x)  # pauses for nobody


def flip(number, states):
    generator = torch.Generator().manual_seed(number)
    return states.mul_(1 - 2 * torch.randint(2, states.shape, generator=generator))


def by_hand(model, x):
    """The served model's layers and norm, with signs of both parts of the states flipped in between."""
    batch, length, width = x.shape
    twin = Twin(model)
    twin.layout = Layout(batch, length)
    states, residual = torch.zeros(batch * length, width), x.flatten(0, 1).clone()
    for number, layer in enumerate(twin.model.layers):
        parts = layer(torch.arange(length).repeat(batch), states, residual)
        states, residual = (flip(number, part.view(x.shape)).flatten(0, 1) for part in parts)
    return twin.model.norm(states, residual).view(x.shape)


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_transform_after_every_layer(lockstep):
    made, x, seen = worker(), random_inputs(), []
    engine = VllmEngine(made, lockstep=lockstep)
    assert engine.layers == 3

    def after_layer(number, states):
        assert not any(module._forward_hooks for module in made.model_runner.get_model().modules())
        seen.append((number, tuple(states.shape)))
        return flip(number, states)

    plain, pauses = engine.forward(x).clone(), []
    changed = engine.forward(x, lambda: pauses.append(1), after_layer)
    assert seen == [(number, (3, 12, 32)) for number in (0, 0, 1, 1, 2, 2)]
    assert_same_bits(changed, by_hand(made.model_runner.get_model(), x))
    assert len(pauses) == 3 if lockstep else len(pauses) > 30
    assert_same_bits(engine.forward(x, after_layer=lambda number, states: states), plain)
    assert_same_bits(engine.forward(x), plain)


def test_slices_with_a_transform_change_no_bit():
    engine, x = VllmEngine(worker(), slice_seconds=1e-6), random_inputs()
    plain, changed = engine.compute_states(x), engine.compute_states(x, flip)
    for _ in range(MEASURED_FORWARDS + 2):
        assert_same_bits(engine.forward(x), plain)
        assert_same_bits(engine.forward(x, after_layer=flip), changed)
    assert len(engine.slices.cuts) > 30


def test_a_model_without_layers_to_transform_proves_all_the_same():
    class Parallel(Model):
        def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds):
            parts = [layer(positions, torch.zeros_like(inputs_embeds), inputs_embeds.clone()) for layer in self.layers]
            return self.norm(sum(states for states, _ in parts), inputs_embeds)

    engine, x = VllmEngine(worker(Parallel())), random_inputs()
    message = r"model must call its decoder layers one after the other, .*; Parallel: what layers\.0 returns is not"
    with pytest.raises(ValueError, match=message):
        _ = engine.layers
    with pytest.raises(ValueError, match=message):
        engine.forward(x, after_layer=flip)
    assert len(DistanceProver(engine).prove(CONFIG, ROWS).values) == 4


def test_layers_are_those_of_the_weights_that_serve_now():
    made, x = worker(), random_inputs()
    engine = VllmEngine(made)
    before = engine.forward(x, after_layer=flip).clone()
    served = made.model_runner.get_model()
    served.layers[1].mlp.weight = nn.Parameter(served.layers[1].mlp.weight * 2, requires_grad=False)
    assert engine.refresh()
    after = engine.forward(x, after_layer=flip)
    assert not torch.equal(after, before)
    assert_same_bits(after, by_hand(served, x))
    made.model_runner.served[0] = Model(layers=2)
    assert engine.refresh()
    with pytest.raises(ValueError, match="keep its 3 decoder layers in layers, others are there now"):
        engine.forward(x, after_layer=flip)
    engine.forward(x)


def test_states_of_inner_layers_are_left_out():
    class Drafted(Model):
        def forward(self, *arguments, **named):
            return super().forward(*arguments, **named), [torch.zeros(1)]

    x = random_inputs()
    assert_same_bits(VllmEngine(worker(Drafted())).forward(x), VllmEngine(worker()).forward(x))


def test_positions_of_models_that_take_three_of_them():
    class Multimodal(Model):
        def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds):
            assert positions.shape == (3, 36)
            return super().forward(None, positions[2], None, inputs_embeds)

    made = worker(Multimodal())
    made.vllm_config.model_config.uses_mrope = True
    x = random_inputs()
    assert_same_bits(VllmEngine(made).forward(x), VllmEngine(worker()).forward(x))


def test_a_rank_without_logits_goes_on():
    class Gathered(Model):
        def compute_logits(self, hidden_states):
            return None

    outcomes = DistanceProver(VllmEngine(worker(Gathered()))).prove(CONFIG, ROWS)
    assert len(outcomes.values) == 4


def test_distances_do_not_depend_on_place_and_neighbours():
    prover = DistanceProver(VllmEngine(worker()))
    together = prover.prove(CONFIG, ROWS).values
    assert len(set(together)) == 4
    assert [prover.prove(CONFIG, [row]).values[0] for row in ROWS] == together
    assert prover.prove(CONFIG, ROWS[::-1]).values == together[::-1]


class Graph:
    """A captured forward on a CPU: replayed by running it again."""

    def __init__(self, engine, example, error):
        self.run, self.error = engine.compute_states, error
        self.input, self.output = example.clone(), engine.compute_states(example).clone()

    def replay(self):
        self.output.copy_(self.run(self.input) + self.error)


def with_graphs(error=0.0, **options):
    """An engine that takes the path of CUDA graphs on a CPU, and the shapes that it captured."""
    engine, captured = VllmEngine(worker(), **options), []

    def capture(example, after_layer):
        captured.append(tuple(example.shape))
        graph = Graph(engine, example, error)
        return CapturedForward([graph], graph.input, graph.output)

    engine.repeated._cuda_graphs, engine.repeated._capture = True, capture
    return engine, captured


def test_graphs_are_captured_when_the_shape_or_a_weight_changes():
    plain, (graphs, captured) = VllmEngine(worker()), with_graphs()
    for length in (5, 5, 9):
        x = random_inputs(length=length)
        assert_same_bits(graphs.forward(x), plain.forward(x))
    graphs.twin._made_of = []
    assert graphs.refresh()
    assert_same_bits(graphs.forward(x), plain.forward(x))
    assert captured == [(3, 5, 32), (3, 9, 32), (3, 9, 32)]


def test_a_replay_with_other_bits_is_not_used(caplog):
    plain, (graphs, captured) = VllmEngine(worker()), with_graphs(error=1e-3)
    for length in (5, 9):
        x = random_inputs(length=length)
        assert_same_bits(graphs.forward(x), plain.forward(x))
    assert captured == [(3, 5, 32)]
    assert "its replay is not bit-identical" in caplog.text


def test_nothing_is_captured_in_lockstep():
    graphs, captured = with_graphs(lockstep=True)
    graphs.forward(random_inputs())
    assert captured == []


class Lanes:
    """The streams of a GPU, and which of them is the current one."""

    current = "default"

    def __init__(self, device):
        self.waited = 0

    @contextlib.contextmanager
    def validation(self):
        Lanes.current = "lowest priority"
        yield
        Lanes.current = "default"

    def wait_for_current_stream(self):
        self.waited += 1


@pytest.fixture
def gpu(monkeypatch):
    """A worker on a GPU, of which nothing is used but its name; the workspaces that are entered."""
    entered = []

    @contextlib.contextmanager
    def in_workspace(manager):
        entered.append(manager)
        yield
        entered.append(None)

    monkeypatch.setattr("poc_kernels.engines.vllm.engine.PriorityLanes", Lanes)
    monkeypatch.setattr(compat, "new_workspace", lambda device: f"workspace of {device}")
    monkeypatch.setattr(compat, "in_workspace", in_workspace)
    made = worker()
    made.model_runner.device = torch.device("cuda:0")
    return made, entered


def test_on_a_gpu_slices_have_the_lowest_priority_and_scratch_of_their_own(gpu):
    made, entered = gpu
    engine = VllmEngine(made)
    entered.clear()
    with engine.context():
        assert Lanes.current == "lowest priority"
        assert entered == ["workspace of cuda:0"]
    assert Lanes.current == "default"
    assert entered[-1] is None
    assert engine.repeated._cuda_graphs
    assert engine._lanes.waited == 1  # for the weights
    made.model_runner.served[0] = Model()
    assert engine.refresh()
    assert engine._lanes.waited == 2
    assert not VllmEngine(made, cuda_graphs=False).repeated._cuda_graphs


def test_in_lockstep_slices_are_on_the_stream_of_the_steps(gpu):
    made, entered = gpu
    engine = VllmEngine(made, lockstep=True)
    entered.clear()
    with engine.context():
        assert Lanes.current == "default"
        assert entered == ["workspace of cuda:0"]


def test_the_context_is_there_inside_the_block_only(stand_ins):
    made = worker()
    engine = VllmEngine(made)
    with engine.context():
        assert stand_ins.op.providers == ("vllm_c", "native")
        served = made.model_runner.get_model()
        clone = stand_ins.context[id(served.layers[0].attn)]
        assert clone is not served.layers[0].attn
        with engine.context():
            pass
        assert stand_ins.context is not None
    assert stand_ins.op.providers == ("native",)
    assert stand_ins.context is None


def test_replaced_weights_are_noticed(stand_ins):
    made = worker()
    engine, x = VllmEngine(made), random_inputs()
    before = engine.forward(x)
    assert not engine.refresh()

    served = made.model_runner.get_model()
    for layer in served.layers:
        layer.mlp.weight = nn.Parameter(layer.mlp.weight * 2, requires_grad=False)
    assert_same_bits(engine.forward(x), before)  # of the weights that the round began with
    assert engine.refresh()
    assert not engine.refresh()
    after = engine.forward(x)
    assert not torch.equal(after, before)
    assert_same_bits(after, VllmEngine(made).forward(x))

    made.model_runner.served[0] = Model()
    assert engine.refresh()
    assert_same_bits(engine.forward(x), before)
    with engine.context():
        assert id(made.model_runner.get_model().layers[0].attn) in stand_ins.context


def test_ranks_meet_or_do_not(monkeypatch):
    """Here a rank is a thread; each has called as often as the others."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    stand_in = types.ModuleType("vllm.distributed")
    stand_in.get_tp_group = lambda: types.SimpleNamespace(world_size=3)
    monkeypatch.setitem(sys.modules, "vllm.distributed", stand_in)
    if importlib.util.find_spec("vllm") is None:
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))

    def meet(ranks, seconds, meeting):
        monkeypatch.setattr(compat, "_meetings", itertools.repeat(meeting))
        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(lambda _: compat.all_ranks_meet(seconds), range(ranks)))

    assert meet(3, 60.0, 0) == [True] * 3
    assert meet(2, 0.05, 1) == [False] * 2
