"""Fingerprints that cheats claim: computed as an honest node does, except for what they spare."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_bits

from poc_kernels.demo import cheats
from poc_kernels.demo import model as small_model
from poc_kernels.demo.cheats import Claims, Guess, LeftOut, Watching, distances, fingerprints, round_weights
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.transformers.load import load_model
from poc_kernels.protocol import PoCConfig

CONFIG = PoCConfig("0xabc", 1, "node", batch_size=4, seq_len=24, use_random_projection=True, proof="fingerprint")
NONCES = range(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model.build(folder, hidden_size=256, layers=4, vocab=512)
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine(load_model(folder, "cpu", "auto")[0])


@pytest.fixture(scope="module")
def own(engine):
    return fingerprints(engine, CONFIG, NONCES)


def test_fingerprints_have_one_text_per_nonce_whatever_the_batch(engine, own):
    assert len(set(own)) == len(NONCES)
    assert fingerprints(engine, CONFIG, [6, 1, 7]) == (own[6], own[1], own[7])


def test_watching_changes_nothing(engine, own):
    assert fingerprints(Watching(engine), CONFIG, NONCES) == own


def test_who_knows_what_layers_add_to_a_nonce_needs_no_forward(engine, own):
    watching = Watching(engine)
    fingerprints(watching, CONFIG, [3])
    changes = watching.mean_changes()
    assert changes.shape == (4, CONFIG.seq_len, 256)
    for first in (0, 2):
        known, other = fingerprints(Guess(engine, first, changes), CONFIG, [3, 5])
        assert distances([known], [own[3]])[0] < 0.01
        assert distances([other], [own[5]])[0] > 0.1


def test_who_guesses_no_layer_is_honest(engine, own):
    assert fingerprints(Guess(engine, 4, torch.zeros(4, CONFIG.seq_len, 256)), CONFIG, NONCES) == own


def test_positions_that_are_left_out_are_zero(engine):
    x = torch.randn(2, 16, 256)
    states = LeftOut(engine).forward(x)
    assert_same_bits(states[:, :12], engine.forward(x[:, :12].contiguous()).clone())
    assert not states[:, 12:].any()


def test_weights_are_rounded_with_a_scale_for_each_64(folder):
    before, after = load_model(folder, "cpu", "auto")[0], load_model(folder, "cpu", "auto")[0]
    round_weights(after)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if old.dim() == 1 or "embed" in name or "lm_head" in name:
            assert_same_bits(new, old)
            continue
        groups, rounded = old.reshape(-1, 64), new.reshape(-1, 64)
        step = groups.abs().amax(1, keepdim=True) / 7
        assert (rounded - groups).abs().le(step * 0.501).all()
        torch.testing.assert_close(rounded / step, (rounded / step).round(), rtol=0, atol=1e-4)


def test_rows_that_are_no_multiple_of_64_have_one_scale_each():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(70, 3, bias=False)
            self.head = torch.nn.Linear(70, 3, bias=False)
            torch.nn.init.zeros_(self.body.weight[0])

        def get_input_embeddings(self):
            return self.head

        get_output_embeddings = get_input_embeddings

    model = Model()
    round_weights(model)
    assert [len(row.unique()) <= 15 for row in model.body.weight] == [True] * 3
    assert not model.body.weight[0].any()
    assert len(model.head.weight.unique()) > 15


def test_distances_are_those_of_vectors():
    one, other = cheats._made_up(2)
    assert distances([one, one, one, None], [one, other, "AAAA", one])[0] == 0.0
    apart = distances([one, one, one, None], [one, other, "AAAA", one])
    assert 1.0 < apart[1] < 2.0
    assert [math.isnan(value) for value in apart] == [False, False, True, True]


@pytest.mark.parametrize(("noise", "threshold"), [([0.01] * 32, 0.04), ([0.2] * 32, 0.30)])
def test_the_threshold_is_above_the_noise_and_at_most_the_forms(noise, threshold):
    assert Claims([], noise).dist_threshold == pytest.approx(threshold)


def test_honest_nodes_are_within_the_threshold_and_cheats_are_not(folder, own):
    prepared = cheats.prepare(folder, "cpu", None, CONFIG, NONCES)
    assert [claim.name for claim in prepared.claims] == [
        "honest, in bfloat16",
        "made-up vectors",
        "guesses without a forward",
        "another key's fingerprints",
        "another block's fingerprints",
        "1 of 4 layers guessed",
        "last positions left out",
        "4-bit weights",
    ]
    assert len(prepared.noise) == 32
    for claim in prepared.claims:
        within = [distance <= prepared.dist_threshold for distance in distances(claim.vectors, own)]
        assert within == [claim.honest] * len(NONCES), claim.name
