"""TransformersEngine: the model's own bits on shared weights, against float64, and apart from what serves users."""

import contextlib
import copy

import numpy as np
import poc2_oracle
import pytest
import torch
from architectures import tiny
from helpers import assert_same_bits
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.transformers.masks import masks_as_outside_a_capture
from poc_kernels.protocol import DistanceProver, EngineProver, PoCConfig, PoCManager, ProofBatch, Row
from poc_kernels.scheduling.repeated import CapturedForward
from poc_kernels.scheduling.slices import MEASURED_FORWARDS

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL),
    "qwen3, tied": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL),
    "gemma2, capped logits": Gemma2Config(**SMALL, final_logit_softcapping=3.0, sliding_window=16),
    "granite, scaled logits": GraniteConfig(**SMALL, logits_scaling=7.0),
    "cohere2, scaled logits": Cohere2Config(**SMALL, logit_scale=0.3, sliding_window=16),
    "mixtral, experts": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gpt2, learned positions": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}


def make(config, dtype=torch.float32, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return make(CONFIGS[request.param])


def random_inputs(engine, batch=3, seq_len=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, engine.hidden_size, generator=generator).to(engine.device, engine.dtype)


def test_the_model_s_own_logits(model):
    engine = TransformersEngine(model)
    x = random_inputs(engine)
    with torch.inference_mode():
        # Of the last positions alone: a product of more rows need not have the same bits on every CPU.
        expected = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]
    hidden = engine.forward(x)
    assert hidden.shape == x.shape
    assert engine.vocab_size == 300
    assert engine.max_positions == 128
    assert_same_bits(engine.compute_logits(hidden[:, -1]), expected)


def test_weights_are_shared_not_copied(model):
    engine = TransformersEngine(model)
    served = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    twin = engine._twin
    assert {name: tensor.data_ptr() for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]} == served
    pointers = {tensor.data_ptr() for tensor in engine._head.parameters()}
    assert pointers <= set(served.values())


def test_what_is_set_on_the_served_model_does_not_show(model):
    engine = TransformersEngine(model)
    x = random_inputs(engine)
    before = engine.compute_logits(engine.forward(x)[:, -1]).clone()
    keys = set(model.state_dict())
    model.set_attn_implementation("eager")
    model.config.is_causal = False
    model.config.use_cache = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False

    def hook(module, arguments, output):
        raise AssertionError("a proof ran through the served module")

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    assert_same_bits(engine.compute_logits(engine.forward(x)[:, -1]), before)
    for handle in handles:
        handle.remove()
    assert set(model.state_dict()) == keys


def test_a_forward_leaves_the_served_model_as_it_was(model):
    text = str(model), str(model.config)
    engine = TransformersEngine(model)
    engine.forward(random_inputs(engine))
    assert (str(model), str(model.config)) == text
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", [False, True])
def test_a_distance_does_not_depend_on_the_batch(dtype, projection):
    manager = PoCManager(DistanceProver(TransformersEngine(make(CONFIGS["qwen3"], dtype))))
    manager.start_round(PoCConfig("block", 1, "key", 1.4, batch_size=8, seq_len=24, use_random_projection=projection))
    known = {}
    for _ in range(2):
        batch = manager.run_batch()
        known |= dict(zip(batch.nonces, batch.dist, strict=True))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    for nonces in (order, order[:3], [order[5]], order[::-1][:11]):
        verdict = manager.validate(ProofBatch("key", "block", 1, nonces, [known[nonce] for nonce in nonces]))
        assert verdict.dist == [known[nonce] for nonce in nonces]


def test_phases_1_to_5_against_float64():
    model = make(CONFIGS["qwen3"])
    manager = PoCManager(DistanceProver(TransformersEngine(model)))
    manager.start_round(PoCConfig("block", 1, "key", 1.4, batch_size=4, seq_len=12))
    computed = manager.run_batch()
    wide = make(CONFIGS["qwen3"]).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    for nonce, distance in zip(computed.nonces, computed.dist, strict=True):
        x = torch.from_numpy(poc2_oracle.inputs("block", "key", nonce, 12, 64)).unsqueeze(0)
        with torch.inference_mode():
            logits = wide(inputs_embeds=x, use_cache=False).logits[0, -1].numpy()
        assert distance == pytest.approx(poc2_oracle.distance(np.asarray(logits), "block", "key", nonce), abs=5e-6)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 64), ValueError, r"inputs_embeds must have shape \[batch, seq_len, 64\], got \[2, 64\]"),
        (torch.zeros(2, 3, 63), ValueError, r"inputs_embeds must have shape \[batch, seq_len, 64\], got \[2, 3, 63\]"),
        (torch.zeros(2, 3, 64).half(), TypeError, "inputs_embeds must be torch.float32, got torch.float16"),
    ],
)
def test_inputs_that_do_not_fit(x, error, message):
    engine = TransformersEngine(make(CONFIGS["qwen3"]))
    with pytest.raises(error, match=message):
        engine.forward(x)


def test_models_that_cannot_prove():
    with pytest.raises(ValueError, match="causal language model of transformers with a decoder and a head, got Linear"):
        TransformersEngine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must have dtype float32, bfloat16 or float16, got torch\.float64"):
        TransformersEngine(make(CONFIGS["qwen3"]).double())
    model = make(CONFIGS["qwen3"])
    original = model.forward

    def noisy(*arguments, **options):
        output = original(*arguments, **options)
        output.logits = output.logits + 1
        return output

    model.forward = noisy
    with pytest.raises(ValueError, match="logits through its decoder and head apart, Qwen3ForCausalLM does not"):
        TransformersEngine(model)


@pytest.mark.parametrize("kind", ["bart", "llama4_text", "opt"])
def test_decoders_within_others(kind):
    """The head follows a module that lies deeper than the base model, or that is not where its class says."""
    model = tiny(kind)
    engine = TransformersEngine(model)
    x = torch.randn(2, 5, engine.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(inputs_embeds=x, use_cache=False).logits
        assert_same_bits(engine._head(inputs_embeds=engine.forward(x), use_cache=False).logits, expected)


def test_a_head_may_read_more_of_its_decoder():
    model = make(CONFIGS["llama"])
    model.model.scale = 3.0
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    model.lm_head.forward = lambda states: head(states) * model.model.scale
    engine = TransformersEngine(model)
    assert engine._head.model.scale == 3.0


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(value, what, dtype):
    model = make(CONFIGS["qwen3"], dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -value
        model.model.norm.weight[0] = value
    with pytest.raises(ValueError, match=rf"finite weights, model\.layers\.1\.mlp\.up_proj\.weight holds {what}"):
        TransformersEngine(model)


def test_logits_that_overflow_are_named():
    model = make(CONFIGS["gpt2, learned positions"], torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
        model.transformer.ln_f.bias.fill_(100.0)
    with pytest.raises(ValueError, match="model must compute finite logits, GPT2LMHeadModel does not"):
        TransformersEngine(model)


def test_a_model_that_takes_no_embeddings_says_so(monkeypatch):
    model = make(CONFIGS["llama"])
    monkeypatch.setattr(model, "forward", lambda input_ids=None, use_cache=None: None)
    with pytest.raises(ValueError, match="logits from input embeddings, LlamaForCausalLM does not: TypeError: "):
        TransformersEngine(model)


def test_any_model_by_directory(tmp_path):
    model = make(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    engines = TransformersEngine(model), TransformersEngine(loaded)
    x = random_inputs(engines[0])
    assert_same_bits(engines[0].forward(x), engines[1].forward(x))


# ---- a transform after every layer ----


def signs(number, states):
    """Known signs of a layer's features and positions."""
    generator = torch.Generator().manual_seed(number)
    return (1 - 2 * torch.randint(2, states.shape[1:], generator=generator)).to(states.dtype)


def flip(number, states):
    return states.mul_(signs(number, states))


@contextlib.contextmanager
def flipped(layers):
    """Have the layers of a model itself return states with these signs."""

    def hook(module, arguments, returned):
        states, rest = (returned, None) if isinstance(returned, torch.Tensor) else (returned[0], returned[1:])
        states = states * signs(layers.index(module), states)
        return states if rest is None else (states, *rest)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


LAYERS = {
    "bart": "model.decoder.layers",
    "bloom": "transformer.h",
    "codegen": "transformer.h",
    "deepseek_v3": "model.layers",
    "falcon": "transformer.h",
    "gemma2": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gptj": "transformer.h",
    "llama": "model.layers",
    "llama4_text": "model.layers",
    "mamba": "backbone.layers",
    "mixtral": "model.layers",
    "mpt": "transformer.blocks",
    "nemotron": "model.layers",
    "openai-gpt": "transformer.h",
    "opt": "model.decoder.layers",
    "phi": "model.layers",
    "phi3": "model.layers",
    "qwen3": "model.layers",
    "rwkv": "rwkv.blocks",
    "stablelm": "model.layers",
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_transform_after_every_layer(kind):
    """It gives the bits of the model itself with hooks at its layers, which are named here; none at what serves."""
    model = tiny(kind)
    engine = TransformersEngine(model)
    x = random_inputs(engine)
    layers = list(model.get_submodule(LAYERS[kind]))
    assert engine.layers == len(layers) == 2

    def only_on_the_twin(number, states):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return flip(number, states)

    plain = engine.forward(x).clone()
    changed = engine.forward(x, after_layer=only_on_the_twin).clone()
    with torch.inference_mode(), flipped(layers):
        expected = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]
    assert_same_bits(engine.compute_logits(changed[:, -1]), expected)
    assert not torch.equal(changed, plain)
    assert_same_bits(engine.forward(x, after_layer=lambda number, states: states), plain)
    assert_same_bits(engine.forward(x), plain)


def test_a_model_without_layers_to_transform_proves_all_the_same():
    engine = TransformersEngine(tiny("xlnet"))
    x = random_inputs(engine)
    message = r"model must call its decoder layers one after the other, .*; XLNetModel: what layer\.0 returns"
    with pytest.raises(ValueError, match=message):
        _ = engine.layers
    with pytest.raises(ValueError, match=message):
        engine.forward(x, after_layer=flip)
    assert engine.forward(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_an_artifact_does_not_depend_on_the_batch(dtype, proof):
    prover = EngineProver(TransformersEngine(make(CONFIGS["qwen3"], dtype)))
    config = PoCConfig("block", 1, "key", batch_size=6, seq_len=25, use_random_projection=True, proof=proof)
    rows = [Row("key", nonce) for nonce in range(5)]
    together = prover.prove(config, rows).values
    assert len(set(together)) == 5
    assert all(isinstance(artifact, str) for artifact in together)
    for order in ([4, 2, 0, 1, 3], [3], [1, 1, 4]):
        assert prover.prove(config, [rows[n] for n in order]).values == [together[n] for n in order]
    assert prover.prove(config, [Row("other", 0)]).values != together[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_with_a_transform_change_no_bit(dtype):
    engine = TransformersEngine(make(CONFIGS["qwen3"], dtype), slice_seconds=1e-9)
    x = random_inputs(engine)
    with torch.inference_mode():
        plain, changed = engine._run(x), engine._run(x, flip)
    for _ in range(MEASURED_FORWARDS + 2):
        for expected, after_layer in ((plain, None), (changed, flip)):
            pauses = []
            assert_same_bits(engine.forward(x, lambda pauses=pauses: pauses.append(1), after_layer), expected)
    assert len(pauses) == len(engine.slices.cuts) > 30


def test_graphs_are_those_of_a_transform():
    model = make(CONFIGS["qwen3"])
    plain, graphs = TransformersEngine(model), _Graphs(model)
    x = random_inputs(plain)
    factor = torch.ones(64)  # where a captured forward reads it anew

    def scale(number, states):
        return states.mul_(factor)

    for after_layer in (None, None, scale, scale, None, None):
        for value in (1.0, 2.0, -3.0):
            factor.fill_(value)
            expected = plain.forward(x, after_layer=after_layer)
            assert_same_bits(graphs.forward(x, after_layer=after_layer), expected)
    assert graphs.captured == [(3, 20, 64)] * 3


# ---- slices ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_seconds", [1e-9, 1e-4])
def test_slices_change_no_bit(model, dtype, slice_seconds):
    model = model.to(dtype)
    engine = TransformersEngine(model, slice_seconds=slice_seconds)
    for seq_len in (20, 7):
        for seed in range(MEASURED_FORWARDS + 2):
            x = random_inputs(engine, seq_len=seq_len, seed=seed)
            with torch.inference_mode():
                expected = engine._run(x)  # in one go
            pauses = []
            assert_same_bits(engine.forward(x, lambda pauses=pauses: pauses.append(1)), expected)
            assert (engine.slices is None) == (seed < MEASURED_FORWARDS - 1)
        if slice_seconds == 1e-9:
            assert len(pauses) == len(engine.slices.cuts) > 30


def test_others_may_compute_between_slices():
    model = make(CONFIGS["qwen3"])
    engine = TransformersEngine(model, slice_seconds=1e-9)
    x, other = random_inputs(engine), torch.arange(12).view(1, 12)
    expected = engine.forward(x).clone()
    with torch.inference_mode():
        answer = model(other).logits.clone()
        for _ in range(MEASURED_FORWARDS + 1):
            answers = []
            assert_same_bits(engine.forward(x, lambda answers=answers: answers.append(model(other).logits)), expected)
            assert len(answers) > 30
            assert all(torch.equal(each, answer) for each in answers)


@pytest.mark.parametrize("number", [0, 1, MEASURED_FORWARDS, MEASURED_FORWARDS + 1])
def test_a_pause_may_give_a_forward_up(number):
    engine = TransformersEngine(make(CONFIGS["qwen3"]), slice_seconds=1e-9)
    x = random_inputs(engine)
    with torch.inference_mode():
        expected = engine._run(x)
    for _ in range(number):
        engine.forward(x)
    for after in (1, 5, 40):
        left = iter(range(after))

        def give_up(left=left):
            if next(left, None) is None:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            engine.forward(x, give_up)
        assert_same_bits(engine.forward(x), expected)


def test_a_pause_may_give_the_replay_of_graphs_up():
    model = make(CONFIGS["qwen3"])
    plain, graphs = TransformersEngine(model), _Graphs(model)
    x = random_inputs(plain)

    def give_up():
        raise KeyError("enough")

    for _ in range(2):
        with pytest.raises(KeyError, match="enough"):
            graphs.forward(x, give_up)
        assert graphs.repeated.captured is None  # measuring was given up: the next forward begins anew
    assert_same_bits(graphs.forward(x), plain.forward(x))
    with pytest.raises(KeyError, match="enough"):
        graphs.forward(x, give_up)
    pauses = []
    assert_same_bits(graphs.forward(x, lambda: pauses.append(1)), plain.forward(x))
    assert pauses == [1]
    assert graphs.captured == [(3, 20, 64)]


def test_a_capture_is_alone():
    entered = []

    @contextlib.contextmanager
    def alone():
        entered.append(True)
        yield
        entered.append(False)

    class Watched(_Graphs):
        def _capture(self, example, after_layer):
            assert entered == [True]
            return super()._capture(example, after_layer)

    graphs = Watched(make(CONFIGS["qwen3"]))
    graphs.repeated._alone = alone
    for _ in range(2):
        graphs.forward(random_inputs(graphs))
    assert entered == [True, False]


@pytest.mark.parametrize("slice_seconds", [0, -1.0])
def test_lengths_of_slices_that_are_none(slice_seconds):
    with pytest.raises(ValueError, match=f"slice_seconds must be positive, got {slice_seconds}"):
        TransformersEngine(make(CONFIGS["qwen3"]), slice_seconds=slice_seconds)


# ---- graphs ----


class _Graphs(TransformersEngine):
    """The path of CUDA graphs on a CPU: what is captured is counted, and replayed by running it again."""

    def __init__(self, model, failure=None, error=0.0, **options):
        super().__init__(model, **options)
        self.repeated._cuda_graphs, self.repeated._capture = True, self._capture
        self.captured, self.failure, self.error = [], failure, error

    def _capture(self, example, after_layer):
        self.captured.append(tuple(example.shape))
        if self.failure is not None:
            raise self.failure
        static_input = example.clone()
        static_output = self._run(static_input, after_layer).clone()
        run, error = self._run, self.error

        class Nothing:
            def replay(self):
                pass

        class Graph:
            def replay(self):
                static_output.copy_(run(static_input, after_layer) + error)

        return CapturedForward([Nothing(), Graph()], static_input, static_output)


def test_graphs_are_captured_when_the_shape_changes_and_replayed():
    model = make(CONFIGS["qwen3"])
    plain, graphs = TransformersEngine(model), _Graphs(model)
    for seq_len in (5, 5, 9, 5):
        for seed in range(3):
            x = random_inputs(plain, seq_len=seq_len, seed=seed)
            assert_same_bits(graphs.forward(x), plain.forward(x))
    assert graphs.captured == [(3, 5, 64), (3, 9, 64), (3, 5, 64)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"failure": RuntimeError("not permitted when stream is capturing")}, "not permitted when stream is capturing"),
        ({"error": 1e-3}, "its replay is not bit-identical"),
    ],
)
def test_a_model_that_cannot_be_captured_runs_without(caplog, options, reason):
    model = make(CONFIGS["qwen3"])
    plain, graphs = TransformersEngine(model), _Graphs(model, **options)
    for seq_len in (5, 5, 9):
        x = random_inputs(plain, seq_len=seq_len)
        assert_same_bits(graphs.forward(x), plain.forward(x))
    assert graphs.captured == [(3, 5, 64)]
    assert [record.message for record in caplog.records] == [
        f"the model's forward cannot be captured as a CUDA graph and runs without: {reason}"
    ]


def test_a_shape_that_finds_no_memory_to_be_captured_does_not_decide_for_the_next(caplog):
    model = make(CONFIGS["qwen3"])
    plain, graphs = TransformersEngine(model), _Graphs(model, torch.OutOfMemoryError("CUDA out of memory"))
    for seq_len in (5, 5, 9, 9):
        if seq_len == 9:
            graphs.failure = None
        x = random_inputs(plain, seq_len=seq_len)
        assert_same_bits(graphs.forward(x), plain.forward(x))
    assert graphs.captured == [(3, 5, 64), (3, 9, 64)]
    assert ["no memory to capture" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["qwen3", "llama", "mixtral, experts"])
def test_masks_in_a_capture_are_those_outside(monkeypatch, name):
    model = make(CONFIGS[name])
    engine = TransformersEngine(model)
    x = random_inputs(engine, seq_len=40)
    expected = engine.forward(x).clone()
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask is None, is_causal))
        return attention(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    engine._run(x)
    outside = seen.copy()
    seen.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with masks_as_outside_a_capture():
        assert_same_bits(engine._run(x), expected)
    assert seen == outside
    from transformers import masking_utils

    assert masking_utils.is_tracing.__name__ == "is_tracing"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_cuda_graphs_give_the_bits_of_the_model(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make(CONFIGS[name], torch.bfloat16).cuda()
    plain, graphs = TransformersEngine(model, cuda_graphs=False), TransformersEngine(model)
    for seq_len in (16, 24):
        for seed in range(3):
            x = random_inputs(plain, batch=8, seq_len=seq_len, seed=seed)
            assert_same_bits(graphs.forward(x), plain.forward(x))
        assert graphs.repeated.captured is not None


@pytest.mark.gpu
def test_cuda_graphs_read_anew_what_a_transform_reads():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make(CONFIGS["qwen3"], torch.bfloat16).cuda()
    plain, graphs = TransformersEngine(model, cuda_graphs=False), TransformersEngine(model)
    factors = torch.ones(64, dtype=torch.bfloat16, device="cuda")

    def scale(number, states):
        return states.mul_(factors)

    for seed in range(3):
        x = random_inputs(plain, batch=8, seed=seed)
        factors.copy_(torch.randn(64, generator=torch.Generator().manual_seed(seed)))
        assert_same_bits(graphs.forward(x, after_layer=scale), plain.forward(x, after_layer=scale))
        assert graphs.repeated.captured is not None


@pytest.mark.gpu
def test_a_broken_capture_leaves_the_device_usable(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make(CONFIGS["qwen3"], torch.bfloat16).cuda()
    plain, graphs = TransformersEngine(model, cuda_graphs=False), TransformersEngine(model)
    run = graphs._run

    def waits(x, after_layer):
        result = run(x, after_layer)
        result.sum().item()  # not permitted in a capture
        return result

    monkeypatch.setattr(graphs, "_run", waits)
    stream = torch.cuda.current_stream()
    x = random_inputs(plain, batch=8)
    for _ in range(2):
        assert_same_bits(graphs.forward(x), plain.forward(x))
    assert graphs.repeated.captured is None
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device="cuda").isfinite().all()
