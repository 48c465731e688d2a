"""A twin that does not compute what is served is refused, and one that only rounds differently is not."""

import re
import types

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from vllm_stand_ins import Linear, Model, worker

from poc_kernels.engines.vllm import trial, twin
from poc_kernels.engines.vllm.engine import VllmEngine
from poc_kernels.protocol import PoCConfig

pytestmark = pytest.mark.usefixtures("stand_ins")

WINDOW = 6


def served_attention(layer, query, key, value):
    """What a step computes for the one request in it: another way than a twin's, with other roundings."""
    query = query.unflatten(1, (layer.num_heads, layer.head_size))
    key, value = (
        x.unflatten(1, (layer.num_kv_heads, -1)).repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)
        for x in (key, value)
    )
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * layer.impl.scale
    place = torch.arange(len(query))
    apart = place.unsqueeze(1) - place
    window = len(query) if layer.sliding_window is None else layer.sliding_window
    scores = scores.masked_fill((apart < 0) | (apart >= window), float("-inf"))
    states = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())
    return states.flatten(1).to(query.dtype)


def serve(model, prompts, score=lambda logits: logits.log_softmax(-1), attention=served_attention):
    """Prompts with the served model's own answers, and its scores of these."""
    for layer in model.layers:
        layer.attn.forward = types.MethodType(attention, layer.attn)
    texts, served = [], []
    for prompt in prompts:
        text, told = list(prompt), []
        for _ in range(trial.ANSWER):
            states = model(None, torch.arange(len(text)), None, model.embed_input_ids(torch.tensor(text)).clone())
            likely = score(model.compute_logits(states)[-1, :101].float())
            text.append(int(likely.argmax()))
            told.append(float(likely.max()))
        texts.append(text)
        served.append(told)
    for layer in model.layers:
        del layer.attn.forward
    return texts, served


def tried(model, break_it=lambda engine: None, **changes):
    """What a comparison says of the twin of a model, after something was done to the twin."""
    engine = VllmEngine(worker(model, dtype=model.tokens.dtype, **changes))
    said = serve(model, trial.tokens(101, max_positions=128, windows=engine.windows))
    break_it(engine)
    return trial.compare(engine, *said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_twin_that_only_rounds_differently(window, dtype):
    assert tried(Model(window=window).to(dtype)) is None


def with_rules(**changes):
    def break_it(engine):
        for layer in engine.twin.attention_layers():
            for name, value in changes.items():
                setattr(layer if hasattr(layer, name) else layer.impl, name, value)
            layer.forward = twin._attention_forward(engine.twin, layer)

    return break_it


def skip_a_layer(engine):
    engine.twin.model.layers = engine.twin.model.layers[:-1]


def swap_layers(engine):
    engine.twin.model.layers = nn.ModuleList(reversed(engine.twin.model.layers))


def see_the_future(engine):
    for layer in engine.twin.attention_layers():

        def forward(query, key, value, layer=layer):
            query, key, value = (x.view(len(x), -1, 8).transpose(0, 1) for x in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(0, 1).flatten(1)

        layer.forward = forward


def another_head(engine):
    engine.twin.model.head = Linear(32, 104)


def no_numbers(engine):
    engine.twin.model.norm.weight = nn.Parameter(torch.full((32,), float("nan")))


@pytest.mark.parametrize(
    "break_it",
    [
        with_rules(scale=8**-0.5 * 1.01),
        with_rules(sliding_window=None),
        with_rules(sliding_window=WINDOW + 1),
        with_rules(logits_soft_cap=20.0),
        skip_a_layer,
        swap_layers,
        see_the_future,
        another_head,
        no_numbers,
    ],
    ids=["scale", "no window", "window", "soft cap", "layer skipped", "layers swapped", "future", "head", "nan"],
)
def test_a_twin_that_is_wrong(break_it):
    said = tried(Model(window=WINDOW), break_it)
    pattern = (
        r"proofs would not be of the model that is served: its log-probabilities of \d+ tokens are (up to|typically) "
        r"([0-9.e-]+|nan) off the twin's, of which roundings explain ([0-9.e-]+|nan)"
    )
    assert re.fullmatch(pattern, said)


def test_a_kv_cache_of_few_bits_explains_more():
    def rounded(layer, query, key, value):
        generator = torch.Generator().manual_seed(7)
        key, value = (x * (1 + (torch.rand(x.shape, generator=generator) - 0.5) / 8) for x in (key, value))
        return served_attention(layer, query, key, value)

    model = Model()
    engine = VllmEngine(worker(model))
    said = serve(model, trial.tokens(101), attention=rounded)
    assert trial.compare(engine, *said) is not None
    engine.vllm_config.cache_config.cache_dtype = "fp8"
    assert trial.compare(engine, *said) is None


def test_a_server_that_tells_logits():
    model = Model()
    engine, prompts = VllmEngine(worker(model, logprobs_mode="raw_logits")), trial.tokens(101)
    assert trial.compare(engine, *serve(model, prompts, score=lambda logits: logits)) is None
    assert trial.compare(engine, *serve(model, prompts)) is not None


def test_a_rank_without_logits_has_nothing_to_say_and_computes_all_the_same():
    class Gathered(Model):
        forwards = 0

        def forward(self, *arguments, **named):
            Gathered.forwards += 1
            return super().forward(*arguments, **named)

        def compute_logits(self, hidden_states):
            return None

    texts = [prompt + [1] * trial.ANSWER for prompt in trial.tokens(101)]
    engine, Gathered.forwards = VllmEngine(worker(Gathered())), 0
    assert trial.compare(engine, texts, [[0.0] * trial.ANSWER] * len(texts)) is None
    assert Gathered.forwards == 3 * len(texts)


def test_prompts():
    assert [len(prompt) for prompt in trial.tokens(101)] == [17, 3, 40, 9]
    assert [len(prompt) for prompt in trial.tokens(101, max_positions=20, windows=[6])] == [12, 3, 12, 9, 12]
    assert [len(prompt) for prompt in trial.tokens(101, windows=[6, 4096])] == [17, 3, 40, 9, 30]
    prompts = trial.tokens(7)
    assert {token for prompt in prompts for token in prompt} == set(range(7))
    assert trial.tokens(7) == prompts


def test_scores_of_an_answer():
    token = types.SimpleNamespace
    answer = token(token_ids=[6, 5], logprobs=[{6: token(logprob=-1.5)}, {5: token(logprob=-0.5)}])
    output = token(prompt_token_ids=[5, 7], outputs=[answer])
    assert trial.scores(output) == ([5, 7, 6, 5], [-1.5, -0.5])


def test_windows_of_an_engine():
    model = Model(window=WINDOW)
    model.layers[0].attn.sliding_window = None
    model.layers[1].attn.attention_chunk_size = 64
    assert VllmEngine(worker(model)).windows == [WINDOW, 64]


def test_rows_that_depend_on_nothing_else():
    assert trial.independence(VllmEngine(worker()), transforms=True) is None


class Depending(Model):
    """A model whose rows depend on something, from the bottom of its states up."""

    calls = 0

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, *arguments, **named):
        Depending.calls += 1
        states = super().forward(*arguments, **named).view(4, -1, 32)
        return self.change(states).view(-1, 32)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda states: states * (1 + Depending.calls * 2.0**-20), "the call"),
        (lambda states: states * (1 + torch.arange(4).view(4, 1, 1) * 2.0**-20), "its place in the batch"),
        (lambda states: states + states.mean(0, keepdim=True) * 2.0**-18, "the rows beside it"),
        (lambda states: states + (states[:1] == states[1:2]).all() * 2.0**-18, "the rows beside it"),
    ],
    ids=["call", "place", "neighbours", "fill"],
)
def test_rows_that_depend_on_something(change, what):
    said = trial.independence(VllmEngine(worker(Depending(change))), transforms=False)
    assert said == (
        f"proofs need rows whose bits depend on nothing else, here they depend on {what}: start vLLM with "
        "VLLM_BATCH_INVARIANT=1, or with another quantization"
    )


@pytest.mark.parametrize("transforms", [True, False])
def test_rows_that_depend_on_others_where_only_fingerprints_read(transforms):
    engine = VllmEngine(worker())
    assert engine.layers == 3

    def look_at_others(_, __, output):
        states = output[0].view(4, -1, 32)
        states[:, 12] += states[:, 12].amax(0, keepdim=True) * 2.0**-10

    engine.twin.model.layers[-1].register_forward_hook(look_at_others)
    said = trial.independence(engine, transforms=transforms)
    assert (said is None) != transforms
    if transforms:
        assert "the rows beside it where signs are flipped after its layers: start vLLM with" in said


def test_results_that_are_not_finite():
    model = Model()
    model.head.weight[3] = float("inf")
    said = trial.independence(VllmEngine(worker(model)), transforms=True)
    assert said == "proofs need finite logits, which this model does not compute of random inputs: serve another model"


def test_a_short_model_is_tried_in_its_length():
    class Counting(Model):
        def forward(self, *arguments, **named):
            assert len(named["positions"]) == 4 * 8
            return super().forward(*arguments, **named)

    assert PoCConfig.seq_len > 8
    assert trial.independence(VllmEngine(worker(Counting(), max_model_len=8)), transforms=False) is None
