"""The table of proof forms, and the prover of them all."""

import functools

import pytest
import torch
from small_engine import SmallEngine

from poc_kernels.protocol import FORMS, DistanceProver, EngineProver, PoCConfig, PoCManager, Row
from poc_kernels.protocol.limits import Bounds

CONFIG = PoCConfig("block", 7, "key", 1.4, batch_size=4, seq_len=6, use_random_projection=True)
ROWS = [Row("key", 3), Row("other", 3), Row("key", 2**40)]


@pytest.mark.parametrize("name", FORMS)
def test_entries_of_the_table(name):
    entry = FORMS[name]
    assert entry.form.name == name
    assert (entry.load_wire() is None) == (name != "distances")
    assert EngineProver.forms[name] is entry.form


def test_distances_are_those_of_their_own_prover():
    assert next(iter(FORMS)) == PoCConfig.proof == "distances"
    proved = [prover(SmallEngine()).prove(CONFIG, ROWS).values for prover in (EngineProver, DistanceProver)]
    assert proved[0] == proved[1]


@pytest.mark.parametrize("proof", FORMS)
@pytest.mark.parametrize(
    "change_default",
    [
        functools.partial(torch.set_default_dtype, torch.float64),
        functools.partial(torch.set_default_dtype, torch.bfloat16),
        functools.partial(torch.set_default_device, "meta"),
    ],
    ids=["float64", "bfloat16", "device"],
)
def test_defaults_of_torch_do_not_matter(proof, change_default):
    engine = SmallEngine()
    of = config(proof=proof, r_target=1.4, use_random_projection=True)
    wanted = EngineProver(engine).prove(of, ROWS).values
    change_default()
    assert EngineProver(engine).prove(of, ROWS).values == wanted


def config(**changes):
    return PoCConfig(**{"block_hash": "block", "block_height": 7, "public_key": "key", "seq_len": 24, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proof": "words"}, r"proof must be one of distances.*, got 'words'"),
        ({}, "r_target must be a positive number in a round of distances, got None"),
        ({"r_target": 1.4, "k_dim": 12}, "k_dim must be None in a round of distances"),
        ({"r_target": 1.4, "stronger_rng": True}, "stronger_rng must be False in a round of distances, got True"),
        ({"r_target": 1.4, "seq_len": 65}, "seq_len must be at most the 64 positions of the model, got 65"),
        ({"r_target": 1.4, "batch_size": 3}, "batch_size must be at most 2 with this vocabulary, got 3"),
    ],
)
def test_settings_that_a_form_does_not_take(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineProver(SmallEngine(), bounds=Bounds(logits=2 * 101)).check(config(**changes))


def test_a_round_of_a_form_that_the_prover_has_not():
    manager = PoCManager(DistanceProver(SmallEngine()))
    with pytest.raises(ValueError, match="proof must be one of distances, got 'vectors'"):
        manager.init_round(config(proof="vectors"))
    assert manager.config is None


def test_a_prover_alone_refuses_other_forms():
    with pytest.raises(ValueError, match="proof must be one of distances, got 'vectors'"):
        DistanceProver(SmallEngine()).check(config(proof="vectors"))
