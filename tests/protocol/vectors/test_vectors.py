"""Vectors: the network's known answers and other models by hand."""

import dataclasses
import json
from pathlib import Path

import artifact_oracle
import numpy as np
import poc2_oracle
import pytest
import torch
from artifact_oracle import decoded
from helpers import assert_same_bits
from identity_engine import IdentityEngine
from small_engine import SmallEngine

from poc_kernels.protocol import EngineProver, PoCConfig, PoCManager, Row
from poc_kernels.protocol.inputs import hash32, inputs_seed, normal, seed32, stronger_normal, stronger_seeds
from poc_kernels.protocol.vectors.reflections import Reflections, layer_axes
from poc_kernels.protocol.vectors.vector import picks, rotation_axes, vectors

KNOWN = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
BLOCK, KEY = KNOWN["block_hash"], KNOWN["public_key"]
TOLERANCE = 2e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**changes):
    values = {
        "block_hash": BLOCK,
        "block_height": 7,
        "public_key": KEY,
        "proof": "vectors",
        "batch_size": 4,
        "seq_len": 4,
    }
    return PoCConfig(**{**values, **changes})


def close(tensor, numbers):
    return np.abs(np.asarray(tensor, np.float64) - np.asarray(numbers)).max() < TOLERANCE


# ---- known answers ----


def test_known_seeds():
    for case in KNOWN["seeds"].values():
        assert seed32(case["text"]) == int(case["seed"], 16)
    assert inputs_seed(BLOCK, KEY, 7) == int(KNOWN["seeds"]["input"]["seed"], 16)


def test_known_hashes():
    for case in KNOWN["hash32"]:
        assert int(hash32([int(case["seed"], 16)], case["key"], 1)) % 2**32 == int(case["hash"], 16)
    ids = KNOWN["token_ids"]
    hashes = hash32([int(KNOWN["seeds"]["token_ids"]["seed"], 16)], 0, len(ids["ids"]))[0]
    assert [hashed % 2**32 % ids["vocab"] for hashed in hashes.tolist()] == ids["ids"]


def test_known_normal_numbers():
    case = KNOWN["normal"]
    seed = int(case["seed"], 16)
    assert [f"{hashed % 2**32:08x}" for hashed in hash32([seed], 0, 10)[0].tolist()] == case["hashes"]
    numbers = normal([seed], case["n"])[0]
    assert [f"{bits % 2**32:08x}" for bits in numbers.view(torch.int32).tolist()] == case["bits"]


def test_known_inputs_of_both_generators():
    for name, rows in (
        ("inputs", normal([inputs_seed(BLOCK, KEY, 7)], 64)),
        ("inputs_stronger_rng", stronger_normal([stronger_seeds(BLOCK, KEY, 7)], 64)),
    ):
        assert close(rows.view(4, 16)[0], KNOWN[name]["row_0"])
        assert close(rows.view(4, 16)[3], KNOWN[name]["row_3"])
    assert [f"{seed:08x}" for seed in stronger_seeds(BLOCK, KEY, 7)] == KNOWN["inputs_stronger_rng"]["sub_seeds"]


def test_known_axes_and_a_known_reflection():
    axes = layer_axes(BLOCK, 2, 16)
    assert close(axes[0], KNOWN["layer_vectors"]["layer_0"])
    assert close(axes[1], KNOWN["layer_vectors"]["layer_1"])
    reflections = Reflections(IdentityEngine(16, 2))
    reflections.set_block(BLOCK)
    x = torch.tensor(KNOWN["reflection"]["x"]).view(1, 1, 16)
    assert close(reflections(KNOWN["reflection"]["layer"], x).view(16), KNOWN["reflection"]["y"])


def test_known_vectors_of_the_identity_model():
    known = KNOWN["identity_model"]
    cases = known["cases"]
    rows = [Row(KEY, case["nonce"]) for case in cases]
    engine = IdentityEngine(known["dim"], known["layers"])
    assert picks(BLOCK, rows, 64, 12).tolist() == [case["pick_cuda_order"] for case in cases]
    prover = EngineProver(engine)
    prover.check(config())
    computed = prover.prove(config(), rows)
    assert computed.values == [case["vector_b64"] for case in cases]
    assert set(computed.part_seconds) == {"inputs", "projection", "forward", "vectors"}
    assert all(
        close(decoded(text) / 20, np.array(case["vector"]) / 20)
        for text, case in zip(computed.values, cases, strict=True)
    )


def test_known_strides():
    for case in KNOWN["striding"]:
        place = {name: case[name] for name in ("node_id", "node_count", "group_id", "n_groups")}
        assert [config(**place).nonce(index) for index in range(4)] == case["nonces"]


# ---- other models ----


@pytest.mark.parametrize(
    ("dim", "seq_len", "layers", "k", "dtype", "stronger"),
    [
        (64, 1, 1, 12, torch.float32, False),
        (17, 3, 3, 2, torch.float32, True),
        (130, 5, 2, 130, torch.float32, False),
        (200, 2, 4, 12, torch.bfloat16, True),
        (64, 7, 2, 20, torch.float16, False),
    ],
)
def test_against_the_definition(dim, seq_len, layers, k, dtype, stronger, device):
    rows = [Row("one", 3), Row("two", 2**40)]
    of = config(seq_len=seq_len, k_dim=k, stronger_rng=stronger)
    computed = EngineProver(IdentityEngine(dim, layers, dtype, device)).prove(of, rows).values
    drawn = artifact_oracle.stronger_inputs if stronger else poc2_oracle.inputs
    for row, text in zip(rows, computed, strict=True):
        x = drawn(BLOCK, *row, seq_len, dim)
        expected = artifact_oracle.vector(x, BLOCK, *row, layers=layers, k=k, dtype=dtype)
        # Reflections are rounded in the states' dtype, at every step.
        assert np.linalg.norm(decoded(text) - expected) < (2e-3 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_segments_of_the_stronger_generator(count):
    seeds = [stronger_seeds(BLOCK, KEY, nonce) for nonce in range(3)]
    segment = -(-count // 8)
    for row, computed in zip(seeds, stronger_normal(seeds, count), strict=True):
        lengths = [min(segment, count - start) for start in range(0, count, segment)]
        parts = [normal([seed], length)[0] for seed, length in zip(row, lengths, strict=False)]
        assert_same_bits(computed, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_step_of_a_reflection_is_rounded(dtype, device):
    """With products whose sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-15, 16, (3, 5, 96), generator=generator).to(dtype)
    axis = (torch.randint(-127, 128, (96,), generator=generator) / 512).to(dtype)
    product = (x.double() * axis.double()).to(dtype)
    twice = 2 * product.double().sum(-1, keepdim=True).to(dtype).double()
    expected = (x.double() - (twice * axis.double()).to(dtype).double()).to(dtype)
    reflections = Reflections(IdentityEngine(96, 2, dtype, device))
    reflections.axes[1] = axis
    states = x.to(device)
    assert reflections(1, states) is states
    assert_same_bits(states.cpu(), expected)


def test_a_block_draws_its_axes_where_those_of_the_last_lay():
    reflections = Reflections(IdentityEngine(16, 2))
    place = reflections.axes.data_ptr()
    for block in ("one", "two", "one"):
        reflections.set_block(block)
        assert_same_bits(reflections.axes, layer_axes(block, 2, 16))
        assert reflections.axes.data_ptr() == place


def test_rotations_keep_lengths_and_nonces_have_their_own():
    rows = [Row("key", 1), Row("key", 2), Row("other", 1)]
    axes = rotation_axes(BLOCK, rows, 12)
    assert axes.shape == (3, 11, 12)
    assert (axes.double().norm(dim=2) - 1).abs().max() < 1e-6
    assert len({tuple(axis[0].tolist()) for axis in axes}) == 3
    hidden = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert (vectors(hidden, picks(BLOCK, rows, 50, 12), axes).double().norm(dim=1) - 1).abs().max() < 1e-6


# ---- rounds ----


def test_every_forward_of_a_round_has_one_transform():
    engine = IdentityEngine(32, 2)
    prover = EngineProver(engine)
    for block in ("one", "two"):
        prover.prove(config(block_hash=block), [Row(KEY, 1)])
    assert engine.transforms[0] is engine.transforms[1] is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_row_without_an_artifact(value):
    engine = IdentityEngine(32, 1)
    rows = [Row(KEY, nonce) for nonce in range(3)]
    expected = EngineProver(engine).prove(config(), rows).values

    def spoil(states):
        states[1, -1] = value

    engine.between = spoil
    assert EngineProver(engine).prove(config(), rows).values == [expected[0], None, expected[2]]


def test_a_round_on_a_manager():
    m = PoCManager(EngineProver(SmallEngine()))
    m.start_round(config(node_id=1, node_count=2))
    proof = m.run_batch()
    assert proof.nonces == [1, 3, 5, 7]
    verdict = m.validate(proof)
    assert (verdict.n_total, verdict.n_mismatch, verdict.p_value) == (4, 0, 1.0)
    assert verdict.vectors == proof.vectors
    forged = dataclasses.replace(proof, vectors=[proof.vectors[1], *proof.vectors[1:]])
    assert m.validate(forged).mismatch_nonces == [1]
    assert not m.validate(dataclasses.replace(proof, vectors=[])).judged
    assert m.status()["valid_nonces"] == proof.nonces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 65}, "seq_len must be at most the 64 positions of the model, got 65"),
        ({"k_dim": 25}, "k_dim must be at most the hidden size 24 of the model, got 25"),
    ],
)
def test_rounds_that_do_not_fit_the_engine(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineProver(SmallEngine()).check(config(**changes))


def test_models_that_need_token_ids_are_refused():
    engine = SmallEngine()
    engine.model_type = "deepseek_v4"
    with pytest.raises(ValueError, match="proof must be another form than vectors for a model of type deepseek_v4"):
        EngineProver(engine).check(config())


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_models_whose_layers_are_not_found_are_refused(proof):
    class Unknown(SmallEngine):
        @property
        def layers(self):
            raise ValueError("model must call its decoder layers one after the other")

    prover = EngineProver(Unknown())
    with pytest.raises(ValueError, match="model must call its decoder layers one after the other"):
        prover.check(config(proof=proof, seq_len=16))
    prover.check(config(proof="distances", r_target=1.4))
