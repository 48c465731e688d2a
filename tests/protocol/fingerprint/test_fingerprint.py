"""Fingerprints: known answers and other models by hand."""

import dataclasses
import json
from pathlib import Path

import artifact_oracle
import numpy as np
import poc2_oracle
import pytest
import torch
from artifact_oracle import decoded
from helpers import Largest, assert_same_bits
from identity_engine import IdentityEngine
from small_engine import SmallEngine

from poc_kernels import RandomProjection, random_projection
from poc_kernels.protocol import EngineProver, PoCConfig, PoCManager, Row
from poc_kernels.protocol.engine import never
from poc_kernels.protocol.fingerprint import prover as prover_module
from poc_kernels.protocol.fingerprint.flips import Flips
from poc_kernels.protocol.fingerprint.mix import mixed, pairs_of, read
from poc_kernels.protocol.fingerprint.signs import flips_seed, mix_seed
from poc_kernels.protocol.inputs import nonce_inputs
from poc_kernels.protocol.limits import SERVER_BOUNDS, Bounds
from poc_kernels.protocol.plain_forms import sign_bits

KNOWN = json.loads((Path(__file__).parents[2] / "data" / "fingerprint.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**changes):
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "proof": "fingerprint", "seq_len": 16}
    return PoCConfig(**{"batch_size": 4, **values, **changes})


def signs(text):
    return [0 if sign == "+" else 1 for sign in text]


# ---- known answers ----


@pytest.mark.parametrize("case", KNOWN["bits"], ids=lambda case: f"{case['nonce']}")
def test_known_flips(case, device):
    seed = flips_seed(case["block_hash"], case["public_key"], case["nonce"])
    bits = sign_bits(torch.tensor([1, seed], device=device), case["layer"] + 1, case["D"])
    assert bits.shape == (2, case["layer"] + 1, case["D"])
    assert bits[1, case["layer"]].tolist() == signs(case["signs"])


@pytest.mark.parametrize("case", KNOWN["mix"], ids=lambda case: f"{case['nonce']}")
def test_known_signs_of_pairs(case, device):
    seed = mix_seed(case["block_hash"], case["public_key"], case["nonce"])
    assert sign_bits(torch.tensor([seed], device=device), 1, case["pairs"])[0, 0].tolist() == signs(case["signs"])


@pytest.mark.parametrize("case", KNOWN["identity_model"], ids=lambda case: f"{case['nonce']}")
def test_known_fingerprints_of_the_identity_model(case):
    engine = IdentityEngine(case["D"], case["layers"])
    of = config(block_hash=case["block_hash"], public_key=case["public_key"], seq_len=case["S"])
    row = Row(case["public_key"], case["nonce"])
    prover = EngineProver(engine)
    prover.check(of)
    computed = prover.prove(of, [row])
    assert np.linalg.norm(decoded(computed.values[0]) - decoded(case["vector_b64"])) < 2e-3
    assert set(computed.part_seconds) == {"inputs", "projection", "forward", "mix"}
    flips = Flips(engine, 1)
    flips.draw(slice(0, 1), [flips_seed(of.block_hash, *row)])
    hidden = engine.forward(
        nonce_inputs(of.block_hash, row.public_key, [row.nonce], case["S"], case["D"]), after_layer=flips
    )
    u = mixed(hidden[:, 8 : 8 + 2 * pairs_of(case["S"])], [mix_seed(of.block_hash, *row)])
    known = np.array(case["u_start"])
    assert np.abs(u[0, :4].double().numpy() - known).max() <= 2e-6 * float(u.abs().max())
    seed = RandomProjection.from_block_hash(of.block_hash, case["D"]).seed
    y = random_projection(u, seed, 64, domain=2, std=1.0)
    assert np.allclose(y[0, :4].double().numpy(), case["y_start"], rtol=0, atol=1e-4 * float(y.abs().max()))


# ---- other models ----


@pytest.mark.parametrize(
    ("dim", "seq_len", "layers", "dtype"),
    [
        (40, 16, 1, torch.float32),
        (130, 19, 3, torch.float32),
        (24, 301, 2, torch.float32),
        (72, 33, 4, torch.bfloat16),
        (72, 18, 4, torch.float16),
    ],
)
def test_against_the_definition(dim, seq_len, layers, dtype, device):
    rows = [Row("one", 3), Row("two", 2**40)]
    computed = EngineProver(IdentityEngine(dim, layers, dtype, device)).prove(config(seq_len=seq_len), rows).values
    for row, text in zip(rows, computed, strict=True):
        x = poc2_oracle.inputs("block", *row, seq_len, dim)
        expected = artifact_oracle.fingerprint(x, "block", *row, layers=layers, dtype=dtype)
        assert np.linalg.norm(decoded(text) - expected) < 3e-3


@pytest.mark.parametrize(("seq_len", "pairs"), [(16, 4), (17, 4), (18, 5), (256, 124), (301, 146)])
def test_pairs_of_positions(seq_len, pairs):
    assert pairs_of(seq_len) == pairs
    assert len([t for t in range(8, seq_len, 2) if t + 1 < seq_len]) == pairs


@pytest.mark.parametrize("dtype", DTYPES)
def test_flips_change_signs_and_nothing_else(dtype, device):
    layers, rows, dim = 3, 4, 200
    flips = Flips(IdentityEngine(dim, layers, dtype, device), rows)
    place = flips.masks.data_ptr()
    seeds = [flips_seed("block", "key", nonce) for nonce in range(rows)]
    for some in (slice(1, 4), slice(0, 1)):
        flips.draw(some, seeds[some])
    assert flips.masks.data_ptr() == place
    states = torch.randn(rows, 5, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    states[0, 0, :4] = torch.tensor([0.0, -0.0, float("inf"), 65504.0])
    for layer in range(layers):
        expected = torch.stack(
            [torch.tensor(artifact_oracle.flips("block", "key", n, layer, dim)) for n in range(rows)]
        )
        before = states.clone()
        assert flips(layer, states) is states
        assert_same_bits(states, before * expected[:, None].to(device, dtype))


def test_the_sum_is_float64_and_rounded_once(device):
    """Differences are float32 before that."""
    states = torch.zeros(1, 8, 3)
    states[0, :, 0] = torch.tensor([1e8, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    states[0, :, 1] = torch.tensor([1.0, 2.0**-30, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    seed = next(seed for seed in range(10**6) if not sign_bits(torch.tensor([seed]), 1, 4).any())
    mix = mixed(states.to(device), [seed])
    assert mix.dtype == torch.float32
    assert mix.tolist() == [[float(np.float32(1e8 + 3)), 1.0, 0.0]]


def test_what_is_read_has_norm_1(device):
    seed = RandomProjection.from_block_hash("block", 24, device=device).seed
    mix = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(device) * 1e20
    units = read(mix, seed)
    assert units.shape == (5, 64)
    assert (units.double().norm(dim=1) - 1).abs().max() < 1e-6


# ---- rounds ----


def test_forms_take_turns_on_one_engine():
    engine = SmallEngine()
    together = EngineProver(engine)
    rows = [Row("key", 1), Row("key", 2)]
    rounds = [config(seq_len=20, proof=proof, r_target=1.4) for proof in ("distances", "vectors", "fingerprint")]
    rounds += [dataclasses.replace(of, block_hash="other", use_random_projection=True) for of in rounds]
    alone = [EngineProver(engine).prove(of, rows).values for of in rounds]
    for of, expected in [*zip(rounds, alone, strict=True)] * 2:
        assert together.prove(of, rows).values == expected


def test_every_forward_of_a_shape_has_one_transform():
    engine = IdentityEngine(32, 2)
    prover = EngineProver(engine)
    for block in ("one", "two"):
        prover.prove(config(block_hash=block), [Row("key", 1)])
    prover.prove(config(batch_size=3), [Row("key", 1)])
    first, second, third = engine.transforms
    assert first is second is not third


def test_what_stands_around_the_model():
    """Projections before the model, and after it at every position that is mixed, in float32."""
    engine = IdentityEngine(48, 2, torch.bfloat16)
    of, row = config(seq_len=21, use_random_projection=True), Row("key", 5)
    projection = RandomProjection.from_block_hash("block", 48)
    flips = Flips(engine, 1)
    flips.draw(slice(0, 1), [flips_seed("block", *row)])
    hidden = engine.forward(
        projection.pre(nonce_inputs("block", "key", [5], 21, 48, dtype=torch.bfloat16)), after_layer=flips
    )
    mix = mixed(projection.post(hidden[:, 8:20].float()), [mix_seed("block", *row)])
    (expected,) = read(mix, projection.seed).to(torch.float16).tolist()
    (text,) = EngineProver(engine).prove(of, [row]).values
    assert decoded(text).tolist() == expected


@pytest.mark.parametrize(("value", "missing"), [(float("nan"), True), (float("inf"), True), (0.0, True)])
def test_a_row_without_an_artifact(value, missing):
    engine = IdentityEngine(32, 1)
    rows = [Row("key", nonce) for nonce in range(3)]
    expected = EngineProver(engine).prove(config(), rows).values

    def spoil(states):
        states[1, 8:] = value

    engine.between = spoil
    for projection in (False, True):
        of = config(use_random_projection=projection)
        assert (EngineProver(engine).prove(of, rows).values[1] is None) == missing
    assert EngineProver(engine).prove(config(), rows).values == [expected[0], None, expected[2]]


def test_one_position_that_is_not_finite_leaves_no_artifact():
    engine = IdentityEngine(32, 1)

    def spoil(states):
        states[:, 11, 3] = float("nan")

    engine.between = spoil
    assert EngineProver(engine).prove(config(), [Row("key", 1)]).values == [None]


def test_a_round_on_a_manager():
    m = PoCManager(EngineProver(SmallEngine()))
    m.start_round(config(node_id=1, node_count=2))
    proof = m.run_batch()
    verdict = m.validate(proof)
    assert (verdict.n_total, verdict.n_mismatch, verdict.p_value) == (4, 0, 1.0)
    m.start_round(config(public_key="other", node_id=1, node_count=2))
    others = dataclasses.replace(m.run_batch(), public_key="key")
    assert m.validate(others).mismatch_nonces == proof.nonces


def test_inputs_that_are_too_long():
    with pytest.raises(ValueError, match="seq_len must be at most the 64 positions of the model, got 65"):
        EngineProver(SmallEngine()).check(config(seq_len=65))


def test_forwards_of_one_shape_have_the_same_flips(device):
    """An engine measures and captures a forward with its transform. Flips of all shapes take the memory of one."""
    engine = IdentityEngine(40, 2, device=device)
    prover, rows = EngineProver(engine), [Row("one", 3), Row("two", 5)]
    computed = [prover.prove(config(batch_size=size), rows).values for size in (4, 2, 4, 3, 2, 9, 2, 4, 9)]
    assert computed == [computed[0]] * 9
    seen = engine.transforms
    four, two, _, three, _, nine, *_ = seen
    assert seen[:6] == [four, two, four, three, two, nine]
    assert seen[8] is nine
    assert len(set(seen)) == 6
    assert [flips.rows for flips in seen[5:]] == [9, 2, 4, 9]
    kept = {flips.masks.untyped_storage().data_ptr(): flips.masks.untyped_storage().nbytes() for flips in seen}
    assert sum(kept.values()) == 2 * 9 * 40 * 4


# ---- memory ----


def kept_bytes(engine):
    """What the flips of all forwards so far take together."""
    seen = {
        flips.masks.untyped_storage().data_ptr(): flips.masks.untyped_storage().nbytes() for flips in engine.transforms
    }
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_of_a_forward_are_bounded(dtype):
    """They are the largest thing in a forward of many short rows."""
    layers, dim, rows = 40, 64, 12
    engine = IdentityEngine(dim, layers, dtype)
    prover = EngineProver(engine, bounds=Bounds(signs=layers * dim * rows + layers * dim - 1))
    prover.check(config(batch_size=rows))
    text = "batch_size must be at most 12 in a round of fingerprints with 40 x 64 signs per row, got 13"
    with pytest.raises(ValueError, match=f"^{text}$"):
        prover.check(config(batch_size=rows + 1))
    with Largest() as largest:
        prover.prove(config(batch_size=rows), [Row("key", nonce) for nonce in range(rows)])
    assert largest.numbers == layers * dim * rows
    assert kept_bytes(engine) == layers * dim * rows * dtype.itemsize
    for proof, target in (("vectors", None), ("distances", 1.4)):
        prover.check(config(batch_size=rows + 1, proof=proof, r_target=target))  # they have no signs


def test_one_row_may_have_more_signs_and_without_a_bound_all_may():
    engine = IdentityEngine(64, 40)
    EngineProver(engine, bounds=Bounds(signs=10)).check(config(batch_size=1))
    with pytest.raises(ValueError, match="batch_size must be at most 1 in a round"):
        EngineProver(engine, bounds=Bounds(signs=10)).check(config(batch_size=2))
    EngineProver(engine).check(config(batch_size=4096))


def test_what_a_large_model_s_rounds_may_have():
    """4096 rows of 80 layers of 8192 features would be 5 GiB of signs in 16 bits."""
    prover = EngineProver(IdentityEngine(8192, 80, torch.bfloat16), bounds=SERVER_BOUNDS)
    prover.check(config(batch_size=409))
    with pytest.raises(
        ValueError, match="at most 409 in a round of fingerprints with 80 x 8192 signs per row, got 4096"
    ):
        prover.check(config(batch_size=4096))


def test_signs_that_many_forwards_did_not_need_are_given_back(monkeypatch):
    """And no bit changes."""
    monkeypatch.setattr(prover_module, "_KEPT_BYTES", 8 * 2 * 40 * 4)
    engine = IdentityEngine(40, 2)
    prover, rows = EngineProver(engine), [Row("one", 3), Row("two", 5)]
    per_row = 2 * 40 * 4

    def prove(size, times=1):
        for _ in range(times):
            computed.append(prover.prove(config(batch_size=size), rows).values)

    computed = []
    prove(9)
    prove(2, 31)
    prove(3)  # more than a fourth
    prove(2, 31)
    assert kept_bytes(engine) == 9 * per_row
    prove(2)
    assert kept_bytes(engine) == 2 * per_row
    prove(8)
    prove(2, 40)  # not much to give back
    assert kept_bytes(engine) == 8 * per_row
    prove(9)
    assert kept_bytes(engine) == 9 * per_row
    assert computed == [computed[0]] * len(computed)


def test_forwards_of_other_forms_count_too(monkeypatch):
    """Else a node kept the signs of one large request for good."""
    per_row = 2 * 24 * 4
    monkeypatch.setattr(prover_module, "_KEPT_BYTES", 8 * per_row)
    engine = SmallEngine()
    engine.layers = 2
    prover, rows = EngineProver(engine), [Row("one", 3), Row("two", 5)]
    fingerprints = config(batch_size=9)
    others = [config(proof="vectors", batch_size=9, k_dim=12), config(proof="distances", batch_size=9, r_target=1.4)]

    def kept():
        return sum(flips.masks.nbytes for flips in prover.transforms(fingerprints))

    expected = prover.prove(fingerprints, rows).values
    for number in range(32):
        assert kept() == 9 * per_row
        prover.prove(others[number % 2], rows)
    assert kept() == 0
    assert prover.prove(fingerprints, rows).values == expected
    assert kept() == 9 * per_row


class Graphs(IdentityEngine):
    """Captures forwards: a replay reads the masks that lay there in the capture, whatever became of their flips."""

    def __init__(self):
        super().__init__(40, 2)
        self.captured = {}

    def forward(self, inputs_embeds, pause=never, after_layer=None):
        masks = self.captured.setdefault((inputs_embeds.shape, after_layer), after_layer.masks)
        assert after_layer.masks.data_ptr() == masks.data_ptr() != 0, "a replay of signs that were given back"
        return super().forward(inputs_embeds, pause, after_layer)


@pytest.mark.parametrize("before", [(), (4,), (2, 4), (4, 2)], ids=str)
def test_signs_without_room_cost_that_forward_alone(monkeypatch, before):
    """One request may ask for them: the node's other forwards go on, with no bit changed."""

    def flips(engine, rows):
        if rows >= 64:
            raise torch.OutOfMemoryError("no room for signs")
        return Flips(engine, rows)

    monkeypatch.setattr(prover_module, "Flips", flips)
    rows = [Row("one", 3), Row("two", 5)]
    expected = EngineProver(Graphs()).prove(config(), rows).values
    prover = EngineProver(Graphs())
    for size in before:
        prover.prove(config(batch_size=size), rows)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            prover.prove(config(batch_size=64), rows)
        computed = [prover.prove(config(batch_size=size), rows).values for size in (2, 4, 2, 9)]
        assert computed == [expected] * 4
