"""Batches of artifacts, their encoding, and verdicts."""

import base64
import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_engine import SmallEngine

from poc_kernels.protocol import EngineProver, PoCConfig, PoCManager, Row
from poc_kernels.protocol.artifacts.encoding import decode, encode
from poc_kernels.protocol.artifacts.proofs import ArtifactBatch, NoVerdictError, StatTest, judge
from poc_kernels.protocol.engine import never
from poc_kernels.protocol.fingerprint.form import FINGERPRINT
from poc_kernels.protocol.vectors.form import VECTORS

KNOWN = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
TEST = StatTest(0.4, 0.1, 0.05)
CONFIG = PoCConfig("block", 7, "key", proof="vectors")


def text(*numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}e", *numbers)).decode()


GOOD = text(0.6, 0.8, 0.0)


def batch(nonces, vectors=(), **changes):
    return ArtifactBatch(
        **{"public_key": "key", "block_hash": "block", "block_height": 7, **changes},
        nonces=nonces,
        vectors=list(vectors),
    )


def mismatches(received, recomputed=GOOD, norm_tolerance=None, test=TEST):
    return judge(batch([5], [received]), [recomputed], test, k_dim=3, norm_tolerance=norm_tolerance).n_mismatch == 1


# ---- encoding ----


def test_the_known_text_of_a_vector():
    for case in KNOWN["identity_model"]["cases"]:
        assert encode(np.array(case["vector"], np.float16)) == case["vector_b64"]
        vectors, good = decode([case["vector_b64"]], 12)
        assert good.all()
        assert np.abs(vectors[0] - case["vector"]).max() < 3e-4


@given(st.lists(st.lists(st.floats(-65504, 65504, width=16), min_size=4, max_size=4), max_size=5))
def test_what_is_encoded_is_decoded(rows):
    vectors, good = decode([encode(np.array(row, np.float16)) for row in rows], 4)
    assert good.all()
    assert vectors.dtype == np.float32
    assert vectors.tolist() == rows


@given(st.text(max_size=12) | st.binary(max_size=10).map(lambda raw: base64.b64encode(raw).decode()))
def test_any_text_is_a_vector_or_none(received):
    vectors, good = decode([GOOD, received, GOOD], 3)
    assert good[0]
    assert good[2]
    assert np.isfinite(vectors).all()
    if good[1]:
        assert len(base64.b64decode(received)) == 6


# ---- which nonces mismatch ----


def test_an_equal_artifact_agrees():
    assert not mismatches(GOOD)
    assert not mismatches(GOOD, norm_tolerance=0.01)


@pytest.mark.parametrize(
    "received",
    [
        None,
        "",
        text(0.6, 0.8),
        text(0.6, 0.8, 0.0, 0.0),
        text(0.6, 0.8, float("nan")),
        text(0.6, 0.8, float("inf")),
        text(0.6, 0.8, float("-inf")),
        "not base64",
        GOOD[:-1],
        GOOD + "=",
        " " + GOOD,
        GOOD + "\n",
        GOOD.replace("A", "-"),
        "ä" * 8,
        "\ud800",
        "\0" * 8,
    ],
)
def test_what_is_no_artifact_mismatches(received):
    assert mismatches(received, test=StatTest(1e9, 0.1, 0.05))


NOTHING = [None, text(0.6, 0.8, float("nan"))]


@pytest.mark.parametrize("recomputed", NOTHING)
@pytest.mark.parametrize("form", [VECTORS, FINGERPRINT])
def test_a_nonce_that_cannot_be_recomputed_here_is_no_evidence(form, recomputed):
    tolerance = 0.01 if form is FINGERPRINT else None
    claimed = [GOOD] * 31 + [None]  # of 32 nonces, the last is a mismatch whatever is recomputed

    def judged(failed):
        return judge(
            batch([*range(32)], claimed),
            [recomputed] * failed + [GOOD] * (31 - failed) + [recomputed],
            form.stat_test,
            k_dim=3,
            norm_tolerance=tolerance,
        )

    for failed in (1, 3):
        verdict = judged(failed)
        assert (verdict.n_excluded, verdict.excluded_nonces) == (failed, [*range(failed)])
        assert (verdict.n_total, verdict.n_mismatch, verdict.mismatch_nonces) == (32 - failed, 1, [31])
        assert verdict.p_value == form.stat_test.p_value(1, 32 - failed)
        assert not verdict.fraud_detected
    for failed in (4, 10, 31):
        with pytest.raises(NoVerdictError, match=f"no verdict: {failed} of 32 nonces gave no finite vector"):
            judged(failed)
    with pytest.raises(NoVerdictError, match="32 of 32"):
        judge(batch([*range(32)], [GOOD] * 32), [recomputed] * 32, TEST, k_dim=3)


def test_one_nonce_of_few_may_be_left_out_and_never_all():
    """A verdict on no nonce at all would be taken as a vote against the node."""
    verdict = judge(batch([3, 4], [GOOD, GOOD]), [GOOD, None], TEST, k_dim=3)
    assert (verdict.n_total, verdict.excluded_nonces, verdict.p_value) == (1, [4], 1.0)
    with pytest.raises(NoVerdictError, match="1 of 1"):
        judge(batch([3], [GOOD]), [None], TEST, k_dim=3)
    with pytest.raises(NoVerdictError, match="2 of 3"):
        judge(batch([3, 4, 5], [GOOD] * 3), [GOOD, None, None], TEST, k_dim=3)


@pytest.mark.parametrize("form", [VECTORS, FINGERPRINT])
def test_what_convicts_anyhow_convicts_however_much_cannot_be_recomputed(form):
    """Else 21 nonces that fail here would acquit 179 forgeries, which 20 do not."""

    def judged(mismatches, failed, n=200):
        claimed, agreeing = batch([*range(n)], [GOOD] * n), n - mismatches - failed
        recomputed = [text(-0.6, -0.8, 0.0)] * mismatches + [None] * failed + [GOOD] * agreeing
        return judge(claimed, recomputed, form.stat_test, k_dim=3)

    for failed in (0, 20, 21, 100):
        verdict = judged(200 - failed, failed)
        assert (verdict.fraud_detected, verdict.n_excluded) == (True, failed)
        assert (verdict.n_total, verdict.n_mismatch) == (200 - failed, 200 - failed)
        assert verdict.p_value == form.stat_test.p_value(200 - failed, 200 - failed)
    least = next(k for k in range(200) if form.stat_test.p_value(k, 200) < form.stat_test.fraud_threshold)
    for failed in (21, 100, 200 - least):
        assert judged(least, failed).fraud_detected
        with pytest.raises(NoVerdictError, match=f"{failed} of 200"):
            judged(least - 1, failed)  # also where it is fraud among those that are judged: the others may all agree


@pytest.mark.parametrize("recomputed", NOTHING)
def test_what_is_no_artifact_mismatches_whatever_is_recomputed(recomputed):
    assert mismatches(recomputed, recomputed)
    assert mismatches("", recomputed)
    assert mismatches(text(2, 0, 0), recomputed, norm_tolerance=0.01)


def test_the_distance_is_compared_strictly():
    """Of float16 numbers, in float32: 0.25 here."""
    near = text(0.6, 0.8, 0.25)
    assert not mismatches(near, test=StatTest(0.25, 0.1, 0.05))
    assert mismatches(near, test=StatTest(0.2499999, 0.1, 0.05))
    assert not mismatches(GOOD, test=StatTest(0, 0.1, 0.05))


@pytest.mark.parametrize(
    ("length", "wrong"), [(0.985, True), (0.992, False), (1.0, False), (1.008, False), (1.015, True)]
)
def test_the_norm_of_a_fingerprint(length, wrong):
    """However near it is to the recomputed one."""
    received = text(length, 0, 0)
    assert mismatches(received, received, norm_tolerance=0.01) == wrong
    assert not mismatches(received, received)


def test_largest_numbers_do_not_overflow():
    assert mismatches(text(65504, 65504, 65504), text(-65504, -65504, -65504))


# ---- verdicts ----


@pytest.mark.parametrize("case", KNOWN["fraud_test"])
def test_known_answers_of_the_test(case):
    nonces, wrong = list(range(case["n"])), case["k"]
    claimed = [None] * wrong + [GOOD] * (case["n"] - wrong)
    test = StatTest(0.4, case["p_mismatch"], case["alpha"])
    verdict = judge(batch(nonces, claimed), [GOOD] * case["n"], test, k_dim=3)
    assert (verdict.n_total, verdict.n_mismatch) == (case["n"], wrong)
    assert verdict.mismatch_nonces == nonces[:wrong]
    assert verdict.p_value == pytest.approx(case["p_value"], rel=1e-9)
    assert verdict.fraud_detected == case["fraud"]
    assert (verdict.judged, verdict.n_invalid, verdict.probability_honest) == (True, wrong, verdict.p_value)


@pytest.mark.parametrize("case", KNOWN["conviction_line"])
def test_known_answers_of_how_many_convict(case):
    test = StatTest(0.4, case["p_mismatch"], case["alpha"])
    fraud = [test.p_value(wrong, case["n"]) < case["alpha"] for wrong in range(case["n"] + 1)]
    assert fraud.index(True) == case["least_k"]


def test_ten_of_200_fingerprints_convict():
    assert (
        FINGERPRINT.stat_test.p_value(9, 200)
        >= FINGERPRINT.stat_test.fraud_threshold
        > FINGERPRINT.stat_test.p_value(10, 200)
    )


@given(n=st.integers(0, 300), share=st.floats(0, 1), p=st.floats(0, 1))
def test_the_p_value_is_the_upper_tail(n, share, p):
    wrong = round(n * share)
    tail = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(wrong, n + 1))
    assert StatTest(0, p, 0.01).p_value(wrong, n) == pytest.approx(tail, abs=1e-9)


def test_what_was_not_claimed_is_not_judged():
    verdict = judge(batch([3, 4]), [GOOD, None], TEST, k_dim=3)
    assert not verdict.judged
    assert verdict.vectors == [GOOD, None]
    assert (verdict.n_mismatch, verdict.p_value, verdict.fraud_detected) == (0, 1.0, False)
    assert judge(batch([]), [], TEST, k_dim=3).p_value == 1.0


def test_nonces_that_were_asked_for_and_not_computed_count():
    verdict = judge(batch([3, 4, 5], [None, None, GOOD]), [GOOD] * 3, TEST, k_dim=3)
    assert verdict.mismatch_nonces == [3, 4]
    assert verdict.n_total == 3
    assert verdict.fraud_detected


def test_as_many_artifacts_as_nonces():
    with pytest.raises(ValueError, match="recomputed must have 2 artifacts, one per nonce, got 1"):
        judge(batch([3, 4]), [GOOD], TEST, k_dim=3)


# ---- batches ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nonces": [1, 1]}, ValueError, "nonces must be distinct, got 1 repeated"),
        ({"nonces": [-1]}, ValueError, "nonces must be in"),
        ({"nonces": (1,)}, TypeError, "nonces must be a list, got tuple"),
        ({"vectors": "x"}, TypeError, "vectors must be a list, got str"),
        ({"vectors": ["x"]}, ValueError, "vectors must be empty or have one for each of the 2 nonces, got 1"),
        ({"vectors": [b"x", 1]}, TypeError, "vectors must hold a str or None for each nonce, got bytes, int"),
        ({"public_key": ""}, ValueError, "public_key must have 1 to 1024 characters, got 0"),
        ({"block_hash": 3}, TypeError, "block_hash must be a str, got int"),
        ({"block_height": -1}, ValueError, "block_height must be in"),
        ({"node_id": -2}, ValueError, "node_id must be in"),
        ({"stat_test": {}}, TypeError, "stat_test must be a StatTest or None, got dict"),
    ],
)
def test_bad_values_of_a_batch_are_named(changes, error, message):
    values = {"public_key": "key", "block_hash": "block", "block_height": 7, "nonces": [1, 2], "vectors": [], **changes}
    with pytest.raises(error, match=message):
        ArtifactBatch(**values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((-0.1, 0.1, 0.1), ValueError, "dist_threshold must be at least 0, got -0.1"),
        ((float("nan"), 0.1, 0.1), ValueError, "dist_threshold must be finite, got nan"),
        ((0.1, 1.1, 0.1), ValueError, r"p_mismatch must be a probability in \[0, 1\], got 1.1"),
        ((0.1, 0.1, "1"), TypeError, "fraud_threshold must be a float, got str"),
    ],
)
def test_bad_values_of_a_test_are_named(values, error, message):
    with pytest.raises(error, match=message):
        StatTest(*values)


# ---- forms ----


def test_a_batch_is_judged_by_its_own_test_else_by_the_form_s():
    far = text(*[0.29] + [0.0] * 11)
    near = text(*[0.285] + [0.0] * 11)
    claimed = batch([1], [far])
    assert VECTORS.verdict(CONFIG, claimed, [near]).n_mismatch == 0
    own = dataclasses.replace(claimed, stat_test=StatTest(0.001, 0.5, 1.0))
    verdict = VECTORS.verdict(CONFIG, own, [near])
    assert (verdict.n_mismatch, verdict.p_value, verdict.fraud_detected) == (1, 0.5, True)
    assert verdict.stat_test == own.stat_test
    other = dataclasses.replace(CONFIG, fraud_threshold=0.05)
    assert VECTORS.verdict(other, claimed, [near]).stat_test == StatTest(0.02, 0.001, 0.05)


@pytest.mark.parametrize(("form", "k"), [(VECTORS, 12), (FINGERPRINT, 64)])
def test_what_callbacks_say(form, k):
    proof = form.proof(CONFIG, [4, 5, 6], ["a", None, "c"])
    assert (proof.node_id, form.count_valid(CONFIG, ["a", None, "c"])) == (0, 2)
    valid = form.valid(CONFIG, proof)
    assert (valid.nonces, valid.vectors) == ([4, 6], ["a", "c"])
    body, per_nonce = form.generated_body(CONFIG, valid)
    about = {"public_key": "key", "block_hash": "block", "block_height": 7, "node_id": 0}
    assert per_nonce == ("artifacts",)
    assert body == {
        **about,
        "artifacts": [{"nonce": 4, "vector_b64": "a"}, {"nonce": 6, "vector_b64": "c"}],
        "encoding": {"dtype": "f16", "k_dim": k, "endian": "le"},
    }
    verdict = form.verdict(CONFIG, batch([4, 5], ["a", "b"], node_id=-1), ["a", "b"])
    assert form.validated_body(CONFIG, verdict) == {
        **about,
        "n_total": 2,
        "n_mismatch": 2,
        "mismatch_nonces": [4, 5],
        "p_value": verdict.p_value,
        "fraud_detected": True,
    }
    assert json.loads(json.dumps(verdict.to_dict()))["received_vectors"] == ["a", "b"]


def test_k_dim_of_a_round():
    assert (VECTORS.k_dim_of(CONFIG), FINGERPRINT.k_dim_of(CONFIG)) == (12, 64)
    assert VECTORS.encoding(dataclasses.replace(CONFIG, k_dim=20))["k_dim"] == 20


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (VECTORS, {"k_dim": 1}, "k_dim must be at least 2 in a round of vectors, got 1"),
        (FINGERPRINT, {"k_dim": 12}, "k_dim must be 64 in a round of fingerprints, got 12"),
        (FINGERPRINT, {"seq_len": 15}, "seq_len must be at least 16 in a round of fingerprints, got 15"),
    ],
)
def test_settings_that_a_form_does_not_take(form, changes, message):
    form.check(CONFIG)
    with pytest.raises(ValueError, match=message):
        form.check(dataclasses.replace(CONFIG, **changes))


# ---- a validator whose model fails ----


class Failing(SmallEngine):
    """Gives NaN in the first rows of a forward."""

    failing = 0

    def forward(self, inputs_embeds, pause=never, after_layer=None):
        states = super().forward(inputs_embeds, pause, after_layer).clone()
        states[: self.failing] = float("nan")
        return states


@pytest.mark.parametrize("form", [VECTORS, FINGERPRINT])
def test_a_validator_whose_model_gives_nan_convicts_nobody(form, caplog):
    config = PoCConfig("block", 7, "key", proof=form.name, seq_len=16, batch_size=32)
    nonces = [*range(32)]
    honest = EngineProver(SmallEngine()).prove(config, [Row("key", nonce) for nonce in nonces]).values
    engine = Failing()
    manager = PoCManager(EngineProver(engine))

    def judged(failing):
        engine.failing = failing
        validation = manager.validation(form.proof(config, nonces, honest), config)
        manager.recompute([(validation, 32)])
        return manager.verdict(validation)

    assert (judged(0).n_total, judged(0).n_mismatch) == (32, 0)
    assert caplog.messages == []
    verdict = judged(1)
    assert caplog.messages == [
        "1 of 32 nonces gave no finite vector when they were recomputed here, and are left out of the verdict"
    ]
    assert (verdict.n_total, verdict.n_mismatch, verdict.excluded_nonces) == (31, 0, [0])
    assert not verdict.fraud_detected
    for failing in (10, 32):
        with pytest.raises(NoVerdictError, match=f"no verdict: {failing} of 32"):
            judged(failing)
