"""Models that vLLM serves in this process: their proofs are those of transformers, and chats are what they were."""

import contextlib
import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("vllm")
import vllm_in_process
from helpers import assert_same_bits
from vllm_in_process import apart, save_model, serving

from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.vllm import trial, twin
from poc_kernels.engines.vllm.engine import VllmEngine
from poc_kernels.engines.vllm.support import unsupported_config, unsupported_version
from poc_kernels.protocol import DistanceProver, EngineProver, PoCConfig
from poc_kernels.protocol.prover import Row

CONFIG = PoCConfig("0x00ab", 7, "key", 1.4, batch_size=4, seq_len=40, use_random_projection=True)
FORMS = [dataclasses.replace(CONFIG, proof=proof) for proof in EngineProver.forms]
ROWS = [Row("key", nonce) for nonce in range(4)]
PROMPTS = [[5 + (7 * i + 3 * j) % 500 for j in range(20 + i)] for i in range(4)]


def distances(engine, rows=ROWS):
    with engine.context() if isinstance(engine, VllmEngine) else contextlib.nullcontext():
        return DistanceProver(engine).prove(CONFIG, rows).values


def proofs(engine, rows=ROWS):
    """Proofs of every form."""
    with engine.context() if isinstance(engine, VllmEngine) else contextlib.nullcontext():
        prover = EngineProver(engine)
        return {config.proof: prover.prove(config, rows).values for config in FORMS}


def flip(number, states):
    """Known signs of rows, positions and features after each layer."""
    generator = torch.Generator().manual_seed(number)
    return states.mul_((1 - 2 * torch.randint(2, states.shape, generator=generator)).to(states.dtype))


def flipped(engine):
    """The last hidden states of an engine with these signs."""
    x = torch.randn(3, 40, engine.hidden_size, generator=torch.Generator().manual_seed(1)).to(engine.dtype)
    with engine.context() if isinstance(engine, VllmEngine) else contextlib.nullcontext():
        return engine.forward(x, after_layer=flip).clone()


def answers(served, engine):
    """The prompts of a trial with the server's answers, and what it says of these."""
    prompts = trial.tokens(engine.vocab_size, max_positions=engine.max_positions, windows=engine.windows)
    told = served.generate(prompts, temperature=0, max_tokens=trial.ANSWER, ignore_eos=True, logprobs=0)
    texts, scores = zip(*map(trial.scores, told), strict=True)
    return texts, scores


def prove_between_steps(served, engine):
    """Chat with greedy sampling, with proofs of the next form before each step; return the texts and the proofs."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    core, prover, proved, texts = served.llm.llm_engine, EngineProver(engine), [], {}
    forms = itertools.cycle(FORMS)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(PROMPTS):
        core.add_request(f"{number}", TokensPrompt(prompt_token_ids=prompt), sampling)
    while core.has_unfinished_requests():
        config = next(forms)
        with engine.context():
            proved.append((config.proof, prover.prove(config, ROWS).values))
        for output in core.step():
            texts[int(output.request_id)] = list(output.outputs[0].token_ids)
    return [texts[number] for number in range(len(PROMPTS))], proved


@pytest.mark.parametrize("kind", sorted(vllm_in_process.CONFIGS))
def test_a_family(kind, tmp_path):
    model = save_model(kind, tmp_path)
    plain = TransformersEngine(model)
    expected, expected_flipped = proofs(plain), flipped(plain)
    with serving(tmp_path) as served:
        texts = served.texts(PROMPTS, 12)
        engine = VllmEngine(served.worker)
        assert unsupported_config(engine.vllm_config) is None

        found = proofs(engine)
        for form, values in found.items():
            assert apart(values, expected[form]) < (1e-5 if form == "distances" else 1e-3)
            assert len(set(values)) == 4
        alone = [proofs(engine, [row]) for row in ROWS]
        assert {form: [one[form][0] for one in alone] for form in found} == found
        assert proofs(engine, ROWS[::-1]) == {form: values[::-1] for form, values in found.items()}

        assert engine.layers == plain.layers == 2
        # After norms: 5e-4 apart with gemma2, 2e-6 at most with the others; 7 from the states without signs.
        torch.testing.assert_close(flipped(engine), expected_flipped, rtol=0, atol=2e-3)

        beside_chats, proved = prove_between_steps(served, engine)
        assert beside_chats == texts
        assert all(values == found[form] for form, values in proved)
        assert len(proved) > 10
        assert served.texts(PROMPTS, 12) == texts

        assert trial.compare(engine, *answers(served, engine)) is None
        assert trial.independence(engine, transforms=True) is None
        assert not engine.refresh()


def scale(engine, layers):
    for layer in layers:
        layer.impl.scale *= 1.05
        layer.forward = twin._attention_forward(engine.twin, layer)


def no_window(engine, layers):
    for layer in layers:
        layer.sliding_window = None
        layer.forward = twin._attention_forward(engine.twin, layer)


def one_layer_less(engine, layers):
    engine.twin.model.model.end_layer -= 1


def see_the_future(engine, layers):
    def forward(query, key, value, **_):
        return key.repeat_interleave(2, 1)[:, : query.shape[1]] * 0 + value.mean(0).repeat(2)

    for layer in layers:
        layer.forward = forward


def test_a_wrong_twin_of_a_served_model_is_refused(tmp_path):
    save_model("gemma2", tmp_path)
    with serving(tmp_path) as served:
        engine = VllmEngine(served.worker)
        asked = answers(served, engine)
        for break_it in (no_window, one_layer_less, see_the_future, scale):
            engine = VllmEngine(served.worker)
            assert trial.compare(engine, *asked) is None
            break_it(engine, engine.twin.attention_layers())
            assert trial.compare(engine, *asked).startswith("proofs would not be of the model that is served")


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}], ids=["bfloat16", "fp8 cache"])
def test_a_model_of_few_bits(options, tmp_path):
    save_model("mistral", tmp_path)
    with serving(tmp_path, dtype="bfloat16", **options) as served:
        engine = VllmEngine(served.worker)
        found = distances(engine)
        assert [distances(engine, [row])[0] for row in ROWS] == found
        asked = answers(served, engine)
        assert trial.compare(engine, *asked) is None
        assert trial.independence(engine, transforms=True) is None
        one_layer_less(engine, None)
        assert trial.compare(engine, *asked) is not None


def test_a_compiled_server_gives_the_bits_of_an_eager_one(tmp_path):
    save_model("llama", tmp_path)
    with serving(tmp_path) as served:
        engine = VllmEngine(served.worker)
        eager, eager_flipped = proofs(engine), flipped(engine)
    with serving(tmp_path, enforce_eager=False) as served:
        texts = served.texts(PROMPTS, 12)
        engine = VllmEngine(served.worker)
        assert proofs(engine) == eager
        assert_same_bits(flipped(engine), eager_flipped)
        assert prove_between_steps(served, engine)[0] == texts
        assert trial.compare(engine, *answers(served, engine)) is None


def test_weights_that_are_loaded_again(tmp_path):
    save_model("qwen3", tmp_path / "first")
    other = save_model("qwen3", tmp_path / "second", seed=1)
    with serving(tmp_path / "first") as served:
        engine = VllmEngine(served.worker)
        before = distances(engine)
        served.worker.model_runner.reload_weights(weights_path=str(tmp_path / "second"))
        engine.refresh()
        after = distances(engine)
        assert after == pytest.approx(distances(TransformersEngine(other)), abs=1e-5)
        assert after != before
        assert trial.compare(engine, *answers(served, engine)) is None


def test_adapters_of_users_have_no_effect(tmp_path):
    save_model("llama", tmp_path)
    with serving(tmp_path) as served:
        expected = distances(VllmEngine(served.worker))
    with serving(tmp_path, enable_lora=True, max_lora_rank=8) as served:
        engine = VllmEngine(served.worker)
        wrapped = [type(module).__name__ for module in served.worker.model_runner.get_model().modules()]
        assert any(name.endswith("WithLoRA") for name in wrapped)
        assert not any(type(module).__name__.endswith("WithLoRA") for module in engine.twin.model.modules())
        assert distances(engine) == expected
        assert trial.compare(engine, *answers(served, engine)) is None


def test_the_version_that_is_tried():
    import vllm

    assert unsupported_version(vllm.__version__) is None
