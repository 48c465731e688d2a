"""Shares, intervals and the gate, of numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.soundness import figures, geometry


def test_a_share_has_an_interval_over_nonces():
    none = figures.share(np.zeros((8, 64), bool))
    assert (none["share"], none["low"]) == (0, 0)
    assert none["high"] == pytest.approx(0.0457, abs=1e-4), "the bound for 64 nonces, whatever the number of reads"
    every = figures.share(np.ones((8, 64), bool))
    assert (every["share"], every["high"]) == (1, 1)
    assert every["low"] == pytest.approx(1 - none["high"])
    generator = np.random.default_rng(1)
    below = generator.random((8, 400)) < 0.3
    some = figures.share(below)
    assert some["low"] < 0.3 < some["high"]
    assert 0.01 < some["high"] - some["low"] < 0.06
    # Reads that agree within a nonce say no more than one read.
    repeated = figures.share(np.repeat(below[:1], 8, axis=0))
    once = figures.share(below[:1])
    assert (repeated["low"], repeated["high"]) == (once["low"], once["high"])


def test_artifacts_are_summed_up():
    errors = np.array([[0.1, 0.2, 0.3, 2.0], [0.1, 0.2, 0.3, 2.0]])
    found = figures.of_artifacts(errors, (0.2, 0.4))
    assert found["median"]["value"] == pytest.approx(0.25)
    assert len(found["quantiles"]) == 101
    assert found["quantiles"][0] == 0.1
    assert [found["below"][gate]["share"] for gate in ("0.20", "0.40")] == [0.5, 0.75], "none that is no artifact"


def test_guessed_distances_that_are_true_find_all_valid_nonces():
    true = np.random.default_rng(0).random((4, 50))
    perfect = figures.of_distances(true, true)
    assert (perfect["found"], perfect["correlation"]["value"]) == (1.0, pytest.approx(1.0))
    blind = figures.of_distances(np.random.default_rng(1).random((40, 50)), np.random.default_rng(2).random((40, 50)))
    assert 0.1 < blind["found"] < 0.3
    assert blind["correlation"]["low"] < 0 < blind["correlation"]["high"]
    assert figures.of_distances(-true, true)["found"] == 0


def test_a_prover_that_chooses_takes_what_is_least_in_doubt():
    errors = np.ones((10, 20))
    doubt = np.random.default_rng(0).random((10, 20)) + 1
    errors[3, :5], doubt[3, :5] = 0.1, 0.5
    found = figures.chosen_first(errors, doubt, 0.05, (0.2,))
    assert found["chosen"] == 10
    assert found["below"]["0.20"]["share"] == 0.5
    assert found["below"]["0.20"]["low"] < 0.5 < found["below"]["0.20"]["high"]
    every = figures.chosen_first(errors, doubt, 0.025, (0.2,))
    assert every["below"]["0.20"]["share"] == 1
    assert every["below"]["0.20"]["low"] == pytest.approx(0.05 ** (1 / 5)), "five nonces"

    assert figures.least_in_doubt(errors, doubt, 0.05).tolist() == [0.1] * 5 + [1.0] * 5


def test_shares_of_blocks_have_an_interval_over_blocks():
    found = figures.of_shares(np.array([0.1, 0.1, 0.5, 0.5]))
    assert (found["share"], found["shares"]) == (pytest.approx(0.3), [0.1, 0.1, 0.5, 0.5])
    assert 0.1 <= found["low"] < 0.25
    assert 0.35 < found["high"] <= 0.5


def test_the_gate_follows_from_noise_and_precision():
    noise = np.full((8, 64), 0.1)
    noise[0, :4] = 0.5  # 4 of 512 reads are far off: the 99 % quantile is not
    found = figures.advice([np.full((8, 64), 0.05), noise], [np.full((8, 32), 0.4), np.full((8, 32), 0.9)], 0.01)
    assert (found["noise_q99"], found["precision_median"], found["gate"]) == (0.1, 0.4, 0.11)
    assert found["separates"]
    assert found["p_mismatch"] == 0.02, "0.8 % are above, and the interval reaches further"
    assert found["convict"] == 10, "of 200, as the definition of fingerprints has it"
    close = figures.advice([noise], [np.full((8, 32), 0.105)], 0.01)
    assert not close["separates"]
    clean = figures.advice([np.full((8, 64), 0.05)], [np.full((8, 32), 0.4)], 0.01)
    assert clean["p_mismatch"] == 0.01


def test_what_a_batch_may_hold_unnoticed():
    assert figures.replaceable(0.0, 10) == pytest.approx(9 / 200)
    assert figures.replaceable(0.5, 27) == pytest.approx(0.26)
    assert figures.replaceable(0.98, 10) == 1


def test_geometry_of_blocks_that_cluster():
    together = np.concatenate([np.full((5, 20), 1.3), np.full((15, 20), 1.5)])
    together += np.random.default_rng(0).normal(0, 1e-4, together.shape)
    found = geometry.of_blocks(together, 2048)
    assert (found["none_valid"], found["most_valid"], found["share"]["mean"]) == (15, 5, 0.25)
    assert found["spread"]["value"] > 4 * found["spread_in_theory"]
    assert found["agreement"] < 1e-6
    assert found["blocks_that_disagree"] == 1
    assert found["width"] < 0.1


def test_likeness_of_states():
    assert geometry.likeness(torch.ones(5, 8)) == pytest.approx(1)
    assert geometry.likeness(torch.eye(8)) == pytest.approx(0)
