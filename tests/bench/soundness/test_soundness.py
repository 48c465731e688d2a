"""Guesses of the demonstration's model at a small scale, and what their figures say."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nodes
import pytest
import torch
from bench_processes import ROOT

from bench.soundness import __main__ as command
from bench.soundness import forwards, report, study
from bench.soundness.blocks import over_blocks
from bench.soundness.forwards import Carried, Subject, final_norm, honest, last_positions, without_layers
from bench.soundness.precision import PRECISIONS, fp8, integers, rounded_copy
from bench.soundness.readers import FingerprintReader
from bench.soundness.run import add_options, measure
from bench.soundness.study import CARRIED, FREE, NOISE, PRECISION
from poc_kernels.demo import theory
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.transformers.load import load_model
from poc_kernels.protocol import PoCConfig

SIZES = {"nonces": 32, "others": 32, "fewer": 16, "batch-size": 16, "seq-len": 24, "reads": 4, "choices": 10}
CONFIG = PoCConfig("block", 0, "key", batch_size=4, seq_len=16, proof="fingerprint")


def options(directory: Any, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    small = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
    return parser.parse_args(["--model", str(directory), "--device", "cpu", *small, *more])


@pytest.fixture(scope="module")
def results(tiny_model_dir) -> dict[str, Any]:
    lines: list[str] = []
    found = measure(options(tiny_model_dir, "--blocks", "3", "--block-nonces", "32"), lines.append)
    assert len(lines) > 30, "progress is told"
    return found


def guesses(results: dict[str, Any], form: str, kind: str) -> list[dict[str, Any]]:
    found = [guess for guess in results["forms"][form]["guesses"] if guess["kind"] == kind]
    assert found
    return found


@pytest.mark.parametrize("form", ["distances", "vectors", "fingerprint"])
def test_inputs_shine_through_a_model_of_few_layers(results, form):
    (carried,) = (guess for guess in guesses(results, form, FREE) if guess["name"] == CARRIED)
    assert carried["cost"] == 0
    assert 0.6 < carried["cosine"]["mean"] < 0.75
    assert carried["cosine"]["low"] <= carried["cosine"]["mean"] <= carried["cosine"]["high"]
    if form == "distances":
        assert 0.55 < carried["correlation"]["value"] < 0.85
        assert carried["found"] > 0.5, "a fifth would be valid without the guess"


def test_free_guesses_of_fingerprints_are_above_the_gate_and_noise_is_below(results):
    free = guesses(results, "fingerprint", FREE)
    assert len(free) == 5
    for guess in free:
        assert guess["below"]["0.40"]["share"] == 0, guess["name"]
        assert guess["quantiles"][0] > 0.4
    noise = guesses(results, "fingerprint", NOISE)
    assert [guess["nonces"] for guess in noise] == [32, 32], "all of them"
    assert all(guess["below"]["0.20"]["share"] == 1 for guess in noise)


def test_means_say_nothing_where_weights_are_random(results):
    for guess in guesses(results, "distances", FREE):
        if guess["name"].startswith("mean"):
            assert abs(guess["cosine"]["mean"]) < 0.1
            assert abs(guess["correlation"]["value"]) < 0.3


@pytest.mark.parametrize("form", ["vectors", "fingerprint"])
def test_the_gate_that_follows_is_between_noise_and_lower_precision(results, form):
    advice = results["forms"][form]["advice"]
    gate = advice["gate"]
    assert advice["noise_q99"] < gate < advice["precision_median"]
    assert advice["separates"]
    assert 0.01 <= advice["p_mismatch"] < 0.1
    for guess in guesses(results, form, PRECISION):
        assert guess["median"]["value"] >= advice["precision_median"]
        assert guess["below"][f"{gate:.2f}"]["share"] < 0.5
    assert {guess["name"] for guess in guesses(results, form, PRECISION)} == set(PRECISIONS)


def test_more_compute_comes_nearer(results):
    layers = [guess for guess in results["forms"]["fingerprint"]["guesses"] if "layers, then" in guess["name"]]
    positions = [guess for guess in results["forms"]["fingerprint"]["guesses"] if "positions, then" in guess["name"]]
    assert [guess["cost"] for guess in layers] == [0.5, 0.75]
    for row in (layers, positions):
        medians = [guess["median"]["value"] for guess in row]
        assert medians == sorted(medians, reverse=True)
        assert medians[-1] < medians[0]


def test_shares_of_blocks_are_those_of_random_directions(results):
    geometry = results["forms"]["distances"]["geometry"]
    assert (geometry["blocks"], geometry["nonces"], len(geometry["shares"])) == (3, 32, 3)
    assert abs(geometry["share"]["mean"] - 0.2) < 4 * geometry["spread_in_theory"] / 3**0.5
    assert geometry["agreement"] > 1e-3
    assert 0.8 < geometry["width"] < 1.2
    assert theory.share_below(geometry["r_target"], results["model"]["vocab_size"]) == pytest.approx(0.2)


def test_vectors_are_guessed_in_every_block(results):
    found = results["forms"]["vectors"]["over_blocks"]
    assert (found["blocks"], found["nonces"], len(found["likeness"])) == (3, 32, 3)
    assert "over_blocks" not in results["forms"]["fingerprint"]
    every, easiest = found["guesses"].values()
    for of_guess in (every, easiest):
        assert list(of_guess) == ["0.20", "0.30", "0.40"]
        for below in of_guess.values():
            assert below["share"] == pytest.approx(sum(below["shares"]) / 3)
            assert below["low"] <= below["share"] <= below["high"]
    assert every["0.40"]["share"] < 0.05, "weights are random: there is nothing in common"


def test_a_guess_over_blocks_is_that_of_each_block(small_model):
    """A model that answers nothing but a block's own state is guessed; one whose nonces are far apart is not."""

    class Common:
        def __init__(self, engine, noise):
            self.engine, self.noise = engine, noise

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def forward(self, inputs_embeds, pause=None, after_layer=None):
            mean = torch.ones_like(inputs_embeds)
            return mean + self.noise * inputs_embeds

    config = PoCConfig("block", 0, "key", batch_size=4, seq_len=16, proof="vectors")
    engine = TransformersEngine(small_model)
    for noise, share in ((0.01, 1.0), (100.0, 0.0)):
        found = over_blocks(Common(engine, noise), config, ["a", "b"], nonces=6, reads=2, choices=4)
        for of_guess in found["guesses"].values():
            assert [below["share"] for below in of_guess.values()] == [share] * 3
        assert (min(found["likeness"]) > 0.99) == (share == 1)


def test_the_report(results, tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report.main()
    text = (tmp_path / "found.md").read_text()
    assert (tmp_path / "found.png").stat().st_size > 10_000
    for found in results["forms"].values():
        for guess in found["guesses"]:
            assert f"| {guess['name']} |" in text
    advice = results["forms"]["fingerprint"]["advice"]
    assert (
        f"| fingerprint | {advice['noise_q99']:.3f} | {advice['precision_median']:.3f} | {advice['gate']:.2f} |" in text
    )
    assert "3 blocks of 32 nonces" in text
    assert "## Vectors over blocks\n\n3 blocks." in text
    assert "does not separate" not in text


def test_the_report_says_where_no_gate_separates(results):
    found = {**results["forms"]["vectors"], "advice": {**results["forms"]["vectors"]["advice"], "separates": False}}
    text = report.markdown({**results, "forms": {"vectors": found}}, "plot.png")
    assert "**does not separate** lower precision from noise" in text
    assert "Geometry" not in text


def test_a_reader_that_does_not_give_the_provers_outcomes_ends_the_run(tiny_model_dir, monkeypatch):
    class Other(FingerprintReader):
        def draw(self, rows):
            return [seed + 1 for seed in super().draw(rows)]

    monkeypatch.setitem(study.READERS, "fingerprint", Other)
    with pytest.raises(RuntimeError, match="fingerprint: what is read of the states is not what the prover gives"):
        measure(options(tiny_model_dir, "--forms", "fingerprint"), lambda line: None)


def test_the_command_takes_whole_batches(tiny_model_dir, tmp_path, monkeypatch, capsys):
    given = [str(tmp_path / "found.json"), "--model", str(tiny_model_dir), "--nonces", "33"]
    monkeypatch.setattr("sys.argv", ["soundness", *given])
    with pytest.raises(SystemExit):
        command.main()
    assert "--nonces must be a multiple of --batch-size 32, got 33" in capsys.readouterr().err


def test_the_command_writes_results_and_report(tmp_path, monkeypatch, results):
    seen = []
    monkeypatch.setattr(command, "measure", lambda options: seen.append(options) or results)
    monkeypatch.setattr(report, "plot", lambda results, path: None)
    path = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["soundness", str(path), "--model", "somewhere", "--threads", "1"])
    command.main()
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert path.with_suffix(".md").exists()
    assert seen[0].model == "somewhere"


@pytest.mark.parametrize("model", ["somewhere", "owner/somewhere", "build/somewhere"])
def test_the_results_have_a_default_name_which_is_that_of_make(tmp_path, monkeypatch, results, model):
    monkeypatch.chdir(tmp_path)
    if model.startswith("build"):
        Path(model).mkdir(parents=True)
    folder = tmp_path / "bench" / "results"

    def measured(options):
        assert folder.is_dir(), "there before minutes are spent"
        return results

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(report, "plot", lambda results, path: None)
    monkeypatch.setattr("sys.argv", ["soundness", "--model", model])
    command.main()
    assert sorted(path.name for path in folder.iterdir()) == ["soundness-somewhere.json", "soundness-somewhere.md"]
    made = subprocess.run(
        ["make", "-n", "--no-print-directory", "bench-soundness", f"MODEL={model}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "python -m bench.soundness bench/results/soundness-somewhere.json " in made


# ---- forwards ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Any:
    return load_model(str(nodes.small_model(tmp_path_factory.mktemp("small"))), "cpu", "float32")[0]


@pytest.fixture(scope="module")
def subject(small_model) -> Subject:
    return Subject(TransformersEngine(small_model), CONFIG)


def test_what_a_prover_leaves_out_is_all_that_differs(subject, small_model):
    truth = subject.see([0, 1, 2, 3], honest)
    known = forwards.know(subject, [4, 5, 6, 7])
    layers = subject.engine.layers
    carried = Carried(known, final_norm(small_model), [0, layers])
    assert torch.equal(subject.see([0, 1, 2, 3], carried).states, truth.states)
    (everything,), (nothing,) = carried.states[layers], carried.states[0]
    assert torch.equal(everything, truth.states)
    assert not torch.equal(nothing, truth.states)
    for whole in (without_layers(known, ()), last_positions(CONFIG.seq_len)):
        assert torch.equal(subject.see([0, 1, 2, 3], whole).states, truth.states)
    # With all layers left out, inputs are carried.
    assert torch.equal(subject.see([0, 1, 2, 3], without_layers(known, range(layers))).states, nothing)
    assert subject.see([0, 1], honest, slice(-1, None)).states.shape == (2, 1, subject.engine.hidden_size)


def test_mean_changes_lead_from_mean_inputs_to_mean_states(small_model):
    config = PoCConfig("block", 0, "key", 2.0, batch_size=4, seq_len=16)  # distances transform nothing between layers
    subject = Subject(TransformersEngine(small_model), config)
    inputs: list[torch.Tensor] = []
    before: list[torch.Tensor] = []

    def compute(engine, x, after_layer):
        inputs.append(x.clone())
        return engine.forward(x, lambda: None, lambda layer, states: (before.append(states.clone()), states)[1])

    subject.see([4, 5, 6, 7], compute)
    known = forwards.know(subject, [4, 5, 6, 7])
    assert torch.allclose(inputs[0].mean(0) + known.changes.sum(0), before[-1].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="nonces must fill batches of 4, got 3"):
        forwards.know(subject, [4, 5, 6])


def test_a_model_without_a_final_norm_is_refused(small_model):
    class Model:
        base_model = torch.nn.Module()
        device, dtype = "cpu", torch.float32

        def get_input_embeddings(self):
            return SimpleNamespace(weight=torch.ones(3, 8))

    Model.base_model.forward = lambda inputs_embeds, use_cache: SimpleNamespace(last_hidden_state=inputs_embeds)
    with pytest.raises(ValueError, match="model must end with a norm of its hidden states, Model has none"):
        final_norm(Model())
    assert final_norm(small_model) is small_model.model.norm


# ---- lower precision ---------------------------------------------------------------------------------------------


def test_integers_and_fp8_keep_as_many_values_as_they_have_bits():
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for bits, error in ((8, 0.02), (4, 0.3)):
        rounded = integers(x, bits)
        assert all(len(row.unique()) <= 2**bits - 1 for row in rounded)
        assert torch.allclose(rounded.abs().amax(1), x.abs().amax(1), rtol=1e-6), "the largest is on the grid"
        assert 0 < (rounded - x).abs().max() < error
    grouped = integers(x, 4, 64)
    assert torch.equal(grouped[:, :64], integers(x[:, :64], 4))
    assert torch.equal(grouped[:, 64:], integers(x[:, 64:], 4))
    assert 0 < ((fp8(x) - x).abs() / x.abs().amax(1, keepdim=True)).max() < 2**-4
    assert torch.equal(integers(torch.zeros(2, 4), 8), torch.zeros(2, 4)), "a row of zeros has no scale"


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_copy_in_lower_precision_keeps_ends_and_leaves_the_model(small_model, name):
    before = {key: value.clone() for key, value in small_model.state_dict().items()}
    rounded = rounded_copy(small_model, name)
    assert all(torch.equal(value, before[key]) for key, value in small_model.state_dict().items())
    changed = {key for key, value in rounded.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key, value in before.items() if "layers" in key and value.dim() == 2}
    x = torch.randn(1, 4, before["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    hooks = sum(len(module._forward_pre_hooks) for module in rounded.modules())
    assert (hooks > 0) == ("activations" in name)
    assert not torch.equal(rounded(inputs_embeds=x).logits, small_model(inputs_embeds=x).logits)
