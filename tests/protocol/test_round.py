"""PoCManager: states, batches, validation, and the same distance in every batch."""

import threading
import types

import pytest
import torch
from helpers import assert_same_bits, requested
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_engine import SmallEngine

from poc_kernels import seed_from_block_hash
from poc_kernels.protocol import (
    UNSET,
    DistanceProver,
    IllegalTransitionError,
    PoCConfig,
    PoCManager,
    PoCState,
    ProofBatch,
    RoundEndedError,
    nonce_inputs,
    permutations,
    target,
)
from poc_kernels.protocol import pieces as pieces_module
from poc_kernels.protocol.distances.distance import distances
from poc_kernels.protocol.engine import never
from poc_kernels.reference import project
from poc_kernels.scheduling import stopwatch as stopwatch_module

LATE = 30


def config(**changes):
    values = {
        "block_hash": "block",
        "block_height": 7,
        "public_key": "key",
        "r_target": 1.4,
        "batch_size": 5,
        "seq_len": 6,
        **changes,
    }
    return PoCConfig(**values)


def manager(**changes):
    return PoCManager(DistanceProver(SmallEngine(**changes)))


def claim(nonces, dist=(), **changes):
    values = {"public_key": "key", "block_hash": "block", "block_height": 7, "node_id": 0, **changes}
    return ProofBatch(nonces=list(nonces), dist=list(dist), **values)


# ---- batches ----


def test_a_round_from_start_to_stop():
    m = manager()
    assert m.state == PoCState.IDLE
    assert m.config is None
    m.start_round(config(node_id=1, node_count=3))
    first, second = m.run_batch(), m.run_batch()
    assert first.nonces == [1, 4, 7, 10, 13]
    assert second.nonces == [16, 19, 22, 25, 28]
    assert (first.public_key, first.block_hash, first.block_height, first.node_id) == ("key", "block", 7, 1)
    status = m.status()
    valid = {
        nonce: distance
        for batch in (first, second)
        for nonce, distance in zip(batch.nonces, batch.dist, strict=True)
        if distance < 1.4
    }
    assert dict(zip(status["valid_nonces"], status["valid_distances"], strict=True)) == valid
    assert 0 < len(valid) < 10
    assert (status["state"], status["total_checked"], status["total_valid"]) == ("GENERATING", 10, len(valid))
    assert status["elapsed_seconds"] > 0
    assert status["rate_per_second"] == pytest.approx(10 / status["elapsed_seconds"])
    assert status["r_target"] == 1.4
    m.stop_round()
    stopped = m.status()
    assert stopped["state"] == "STOPPED"
    assert stopped == m.status()  # time stands still
    assert stopped["valid_nonces"] == status["valid_nonces"]


def test_time_is_counted_while_generating():
    m = manager()
    m.init_round(config())
    assert m.status()["elapsed_seconds"] == 0
    assert m.status()["rate_per_second"] == 0
    m.set_phase(PoCState.GENERATING)
    m.run_batch()
    m.set_phase(PoCState.VALIDATING)
    elapsed = m.status()["elapsed_seconds"]
    assert elapsed > 0
    assert m.status()["elapsed_seconds"] == elapsed


def test_a_batch_is_the_pipeline_of_phases_1_to_3():
    engine = SmallEngine()
    m = PoCManager(DistanceProver(engine))
    m.start_round(config())
    x = nonce_inputs("block", "key", range(5), 6, engine.hidden_size)
    logits = engine.compute_logits(engine.forward(x)[:, -1])
    p = permutations("block", "key", range(5), engine.vocab_size)
    assert m.run_batch().dist == distances(logits, p, target("block", engine.vocab_size)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projections_go_around_the_model(dtype):
    engine = SmallEngine(dtype=dtype)
    m = PoCManager(DistanceProver(engine))
    m.start_round(config(use_random_projection=True))

    def projected(rows, domain):
        seed = torch.tensor(seed_from_block_hash("block"))
        return project(rows, seed, requested(rows, domain=domain))

    x = nonce_inputs("block", "key", range(5), 6, engine.hidden_size, dtype=dtype)
    x = projected(x.view(30, -1), 0).view_as(x)
    hidden = projected(engine.forward(x)[:, -1].contiguous(), 1)
    p = permutations("block", "key", range(5), engine.vocab_size)
    expected = distances(engine.compute_logits(hidden), p, target("block", engine.vocab_size)).tolist()
    computed = m.run_batch().dist
    assert computed == expected
    off = PoCManager(DistanceProver(engine))
    off.start_round(config())
    assert off.run_batch().dist != computed


def test_a_new_round_changes_the_seed_of_the_projections_in_place():
    m = manager()
    place = m.prover.work.projection.seed.data_ptr()
    for block in ("one", "two", "one"):
        m.start_round(config(block_hash=block, use_random_projection=True))
        fresh = manager()
        fresh.start_round(config(block_hash=block, use_random_projection=True))
        assert m.run_batch().dist == fresh.run_batch().dist
        assert int(m.prover.work.projection.seed) == seed_from_block_hash(block)
        m.stop_round()
    assert m.prover.work.projection.seed.data_ptr() == place
    assert not list(m.prover.work.projection.parameters())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distance_does_not_depend_on_the_batch(device, dtype, projection):
    m = PoCManager(DistanceProver(SmallEngine(dtype=dtype, device=device)))
    m.start_round(config(use_random_projection=projection))
    known = {}
    for _ in range(3):
        batch = m.run_batch()
        known |= dict(zip(batch.nonces, batch.dist, strict=True))
    for nonces in ([7], [14, 0, 3], [3, 14, 7, 0, 9], list(range(14, -1, -1)), [1, 8, 2, 13, 5, 11, 0]):
        assert m.validate(claim(nonces)).dist == [known[nonce] for nonce in nonces]


def test_every_forward_has_the_round_s_shape():
    m = manager()
    m.start_round(config())
    m.run_batch()
    m.validate(claim(range(12)))
    m.validate(claim([3]))
    assert set(m.prover.engine.shapes) == {(5, 6, m.prover.engine.hidden_size)}
    assert len(m.prover.engine.shapes) == 1 + 3 + 1


def test_an_empty_batch_needs_no_forward():
    m = manager()
    m.init_round(config())
    verdict = m.validate(claim([]))
    assert (verdict.dist, verdict.fraud_detected) == ([], False)
    assert m.prover.engine.shapes == []


# ---- validation ----


def _honest(r_target=1.4):
    m = manager()
    m.start_round(config(r_target=r_target))
    proofs = claim([], [])
    while len(proofs) < 20:
        batch = m.run_batch().below(r_target)
        proofs = claim(proofs.nonces + batch.nonces, proofs.dist + batch.dist)
    return proofs


def test_honest_proofs_are_accepted_by_another_node():
    proofs = _honest()
    validator = manager()
    validator.start_round(config(public_key="validator", node_id=UNSET, node_count=UNSET), PoCState.VALIDATING)
    verdict = validator.validate(proofs)
    assert verdict.dist == proofs.dist
    assert (verdict.n_invalid, verdict.probability_honest, verdict.fraud_detected) == (0, 1.0, False)
    assert (verdict.r_target, verdict.fraud_threshold, verdict.node_id) == (1.4, 0.01, 0)


@pytest.mark.parametrize("case", ["made up", "another key", "another block", "another model"])
def test_forged_proofs_are_caught(case):
    validator = manager(seed=1 if case == "another model" else 0)
    validator.init_round(config())
    proofs = _honest()
    if case == "made up":
        proofs = claim(range(20), [1.2] * 20)
    elif case == "another key":
        proofs = claim(proofs.nonces, proofs.dist, public_key="other")
    elif case == "another block":
        validator.init_round(config(block_hash="other"))
        proofs = claim(proofs.nonces, proofs.dist, block_hash="other")
    verdict = validator.validate(proofs)
    assert verdict.n_invalid > 5
    assert verdict.fraud_detected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_hash": "other"},
            "Block hash mismatch: block_hash of the batch must be the round's, 'block', got 'other'",
        ),
        ({"block_height": 8}, "Block height mismatch: block_height of the batch must be the round's, 7, got 8"),
    ],
)
def test_batches_of_another_block_are_refused(changes, message):
    m = manager()
    m.init_round(config())
    for refuse in (m.validate, m.validation):
        with pytest.raises(ValueError, match=message):
            refuse(claim([1], [1.0], **changes))
    with pytest.raises(TypeError, match="batch must be a ProofBatch, got dict"):
        m.validate({})


def test_validation_forward_by_forward():
    m = manager()
    m.init_round(config())
    validation = m.validation(claim(range(12)))
    for count, left in ((5, 7), (1, 6), (5, 1)):
        m.recompute([(validation, count)])
        assert validation.left == left
        with pytest.raises(ValueError, match=f"validation must have no nonces left to recompute, got {left}"):
            m.verdict(validation)
    assert len(m.prover.engine.shapes) == 3
    m.recompute([(validation, 1)])
    assert m.verdict(validation) == m.validate(claim(range(12)))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validations_that_share_forwards_have_the_bits_of_each_alone(device, dtype, projection):
    """Whatever their submitters, keys, numbers of nonces and places in a forward."""
    m = PoCManager(DistanceProver(SmallEngine(dtype=dtype, device=device)))
    m.init_round(config(use_random_projection=projection))
    proofs = [
        claim([7], public_key="one"),
        claim([7], public_key="another"),
        claim([2**63 - 1, 0, 7], [1.0] * 3, public_key="one"),
        claim([3, 14, 0], public_key="é" * 1024, node_id=9),
        claim(range(9), [1.2] * 9),
    ]
    expected = [m.validate(proof) for proof in proofs]
    forwards = len(m.prover.engine.shapes)
    validations = [m.validation(proof) for proof in proofs]
    a, b, c, d, e = validations
    for shares in ([(b, 1), (c, 2), (a, 1), (e, 1)], [(e, 4), (d, 1)], [(d, 2), (c, 1), (e, 2)], [(e, 2)]):
        m.recompute(shares)
    assert [m.verdict(validation) for validation in validations] == expected
    assert len(m.prover.engine.shapes) == forwards + 4
    assert set(m.prover.engine.shapes) == {(5, 6, m.prover.engine.hidden_size)}


def test_what_no_forward_takes():
    m = manager()
    m.init_round(config())
    a, b = m.validation(claim(range(4))), m.validation(claim([1]))
    with pytest.raises(ValueError, match="shares must have each validation once, got 3 shares with one repeated"):
        m.recompute([(a, 2), (b, 1), (a, 2)])
    for shares in ([(a, 0)], [(a, 4), (b, 2)], [(a, 5)], [(a, -1), (b, 1)]):
        with pytest.raises(ValueError, match=r"shares must have 1 to batch_size 5 nonces, each at most what is left"):
            m.recompute(shares)
    m.init_round(config(block_height=8))
    late = m.validation(claim([1], block_height=8))
    for shares, rounds in (([], 0), ([(a, 1), (late, 1)], 2)):
        with pytest.raises(ValueError, match=f"shares must be of one round, got {rounds}"):
            m.recompute(shares)
    assert m.prover.engine.shapes == []


def test_a_forward_that_ends_early_gives_nobody_an_outcome():
    m = manager()
    m.init_round(config())
    a, b = m.validation(claim(range(4))), m.validation(claim([1]))

    def fail():
        raise MemoryError("no memory")

    m.prover.engine.before_forward = fail
    with pytest.raises(MemoryError):
        m.recompute([(a, 4), (b, 1)])
    assert (a.left, b.left) == (4, 1)
    m.prover.engine.before_forward = lambda: None
    m.recompute([(a, 4), (b, 1)])
    assert (m.verdict(a), m.verdict(b)) == (m.validate(claim(range(4))), m.validate(claim([1])))


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_prover_that_gives_another_number_of_outcomes_is_caught(count):
    m = manager()
    prove = m.prover.prove

    def wrong(*arguments):
        outcomes = prove(*arguments)
        return outcomes._replace(values=(outcomes.values * 2)[:count])

    m.prover.prove = wrong
    m.start_round(config())
    for compute in (m.run_batch, lambda: m.validate(claim(range(5)))):
        with pytest.raises(RuntimeError, match=f"the prover must give 5 outcomes, one per row, got {count}"):
            compute()
    assert m.status()["total_checked"] == 0


# ---- rounds that begin again ----

PHASES = (PoCState.GENERATING, PoCState.VALIDATING)
BEGINNINGS = (PoCState.IDLE, *PHASES)


def begin(m, c, state):
    m.init_round(c) if state == PoCState.IDLE else m.start_round(c, state)


@pytest.mark.parametrize("state", BEGINNINGS)
@pytest.mark.parametrize("then", BEGINNINGS)
def test_the_same_configuration_again_changes_nothing_but_the_phase(state, then):
    m = manager()
    begin(m, config(), state)
    m.set_phase(PoCState.GENERATING)
    batch = m.run_batch()
    validation = m.validation(claim(batch.nonces, batch.dist))
    before = m.status()
    begin(m, config(), then)
    assert m.state == (PoCState.GENERATING if then == PoCState.IDLE else then)
    for name in ("total_checked", "total_valid", "valid_nonces", "valid_distances"):
        assert m.status()[name] == before[name]
    m.recompute([(validation, 5)])
    assert m.verdict(validation).dist == batch.dist
    m.set_phase(PoCState.GENERATING)
    assert m.run_batch().nonces == list(range(5, 10))


@pytest.mark.parametrize("state", BEGINNINGS)
@pytest.mark.parametrize("then", BEGINNINGS)
@pytest.mark.parametrize("changes", [{"block_hash": "other"}, {"callback_url": "http://other"}, {"r_target": 1.41}])
def test_another_configuration_replaces_the_round_in_any_state(state, then, changes):
    m = manager()
    begin(m, config(), state)
    m.set_phase(PoCState.GENERATING)
    m.run_batch()
    validation = m.validation(claim([1]))
    begin(m, config(**changes), then)
    assert (m.state, m.config) == (then, config(**changes))
    assert (m.status()["total_checked"], m.status()["valid_nonces"]) == (0, [])
    with pytest.raises(RoundEndedError, match="while the batch was validated"):
        m.recompute([(validation, 1)])
    m.set_phase(PoCState.GENERATING)
    assert m.run_batch().nonces == list(range(5))


def test_a_configuration_that_is_refused_leaves_the_round_alone():
    m = manager()
    m.start_round(config())
    batch = m.run_batch()
    with pytest.raises(ValueError, match="Node ID and node count must be set to generate"):
        m.start_round(config(node_id=UNSET, node_count=UNSET))
    with pytest.raises(ValueError, match="seq_len must be at most the 64 positions"):
        m.init_round(config(seq_len=65))
    assert m.state == PoCState.GENERATING
    assert m.run_batch().nonces[0] == batch.nonces[-1] + 1


def test_a_stopped_round_of_the_same_configuration_begins_anew():
    m = manager()
    m.start_round(config())
    m.run_batch()
    m.stop_round()
    m.start_round(config())
    assert m.status()["total_checked"] == 0
    assert m.run_batch().nonces == list(range(5))


def test_proofs_of_a_round_that_was_stopped_are_validated():
    m = manager()
    m.start_round(config())
    batch = m.run_batch()
    m.stop_round()
    before = m.status()
    verdict = m.validate(claim(batch.nonces, batch.dist))
    assert verdict.dist == batch.dist
    assert m.status() == before
    with pytest.raises(ValueError, match="Block hash mismatch"):
        m.validate(claim([1], block_hash="other"))


@pytest.mark.parametrize("state", [PoCState.VALIDATING, PoCState.STOPPED])
def test_a_stop_throws_away_what_was_under_way(state):
    m = manager()
    m.start_round(config(), PoCState.VALIDATING)
    if state == PoCState.STOPPED:
        m.stop_round()
    begun, computed = m.validation(claim([1])), m.validation(claim([]))
    m.stop_round()
    for end in (lambda: m.recompute([(begun, 1)]), lambda: m.verdict(computed)):
        with pytest.raises(RoundEndedError, match="while the batch was validated"):
            end()
    assert m.validate(claim([1])).nonces == [1]


# ---- rounds that end meanwhile, reports, errors ----


def test_a_round_stopped_during_a_batch_throws_it_away():
    m = manager()
    m.start_round(config())
    m.prover.engine.before_forward = m.stop_round
    with pytest.raises(RoundEndedError, match="left GENERATING"):
        m.run_batch()
    assert m.status()["total_checked"] == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_another_round_begun_during_a_batch_counts_its_own(stopped):
    m = manager()
    m.start_round(config(block_hash="first"))

    def change():
        m.prover.engine.before_forward = lambda: None
        if stopped:
            m.stop_round()
        m.start_round(config(block_hash="second"))

    m.prover.engine.before_forward = change
    with pytest.raises(RoundEndedError):
        m.run_batch()
    assert m.status()["total_checked"] == 0
    assert m.run_batch().block_hash == "second"


def test_a_round_stopped_during_a_validation():
    m = manager()
    m.init_round(config())
    m.prover.engine.before_forward = m.stop_round
    with pytest.raises(RoundEndedError, match="while the batch was validated"):
        m.validate(claim(range(12)))


def test_validation_goes_on_through_phases():
    m = manager()
    m.start_round(config())
    validation = m.validation(claim(range(12)))
    m.recompute([(validation, 5)])
    m.set_phase(PoCState.VALIDATING)
    m.recompute([(validation, 5)])
    m.set_phase(PoCState.GENERATING)
    m.recompute([(validation, 2)])
    assert m.verdict(validation).nonces == list(range(12))


def test_the_latest_valid_nonces_are_listed():
    m = PoCManager(DistanceProver(SmallEngine()), max_listed=7)
    m.start_round(config(r_target=2.0))
    for _ in range(4):
        m.run_batch()
    status = m.status()
    assert status["total_valid"] == 20
    assert status["valid_nonces"] == list(range(13, 20))
    assert len(status["valid_distances"]) == 7


def test_a_listener_that_fails_is_the_only_one(caplog):
    m, told = manager(), []

    def fail():
        raise ValueError("no")

    m.on_change(fail)
    m.on_change(lambda: told.append(m.state))
    m.start_round(config())
    m.set_phase(PoCState.VALIDATING)
    m.stop_round()
    assert told == [PoCState.GENERATING, PoCState.VALIDATING, PoCState.STOPPED]
    assert [record.message for record in caplog.records] == ["a change of the round could not be told"] * 3


# ---- pauses ----


@pytest.fixture
def small_pieces(monkeypatch):
    """So slow a clock that everything is computed in the smallest pieces."""
    monkeypatch.setattr(pieces_module, "time", types.SimpleNamespace(thread_time=Ticks(1.0)))


class Ticks:
    """A clock that goes on by so much whenever it is looked at."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize("projection", [False, True])
def test_pauses_and_pieces_change_no_bit(small_pieces, projection):
    whole, m = PoCManager(DistanceProver(SmallEngine(), slice_seconds=1e9)), manager()
    for each in (whole, m):
        each.start_round(config(batch_size=60, seq_len=6, use_random_projection=projection))
    whole.run_batch()  # which was timed
    whole.stop_round()
    whole.start_round(config(batch_size=60, seq_len=6, use_random_projection=projection))
    pauses = []
    expected = [whole.run_batch(lambda: pauses.append(1)).dist for _ in range(2)]
    assert len(pauses) == 2 * (1 + 1 + 2 * projection + 1 + 1 + 1)
    pauses.clear()
    assert [m.run_batch(lambda: pauses.append(1)).dist for _ in range(2)] == expected
    # Inputs and permutations row by row, projections 256 of the 360 positions and of the last 60, twice in the forward,
    # the logits.
    assert len(pauses) == 2 * (60 + 60 + 3 * projection + 1 + 1 + 1)
    pauses.clear()
    validation = m.validation(claim(range(120)))
    for _ in range(2):
        m.recompute([(validation, 60)], lambda: pauses.append(1))
    assert m.verdict(validation).dist == [*expected[0], *expected[1]]
    assert len(pauses) == 2 * (60 + 60 + 3 * projection + 1 + 1 + 1)


@pytest.mark.parametrize("change", ["stop", "validate"])
def test_generating_ends_at_the_next_pause(small_pieces, change):
    m = manager()
    m.start_round(config())
    pauses = []

    def pause():
        pauses.append(1)
        if len(pauses) == 3:
            m.stop_round() if change == "stop" else m.set_phase(PoCState.VALIDATING)

    with pytest.raises(RoundEndedError, match="left GENERATING"):
        m.run_batch(pause)
    assert len(pauses) == 3
    assert not m.prover.engine.shapes
    assert m.status()["total_checked"] == 0


def test_validation_ends_at_the_next_pause(small_pieces):
    m = manager()
    m.init_round(config())
    pauses = []

    def pause():
        pauses.append(1)
        if len(pauses) == 4:
            m.stop_round()

    validation = m.validation(claim(range(12)))
    with pytest.raises(RoundEndedError, match="while the batch was validated"):
        m.recompute([(validation, 5)], pause)
    assert len(pauses) == 4
    m.start_round(config())
    assert m.run_batch().nonces == list(range(5))


@pytest.mark.parametrize("at", [1, 5, 10, 11, 12, 13])
@pytest.mark.parametrize("how", ["stop", "another round", "another phase"])
def test_a_round_that_ends_in_a_pause_computes_no_further(small_pieces, at, how):
    m = manager()
    m.start_round(config(use_random_projection=True))
    pauses = 0

    def end():
        nonlocal pauses
        pauses += 1
        if pauses != at:
            return
        if how == "another phase":
            m.set_phase(PoCState.VALIDATING)
            return
        m.stop_round()
        if how == "another round":
            m.start_round(config())

    with pytest.raises(RoundEndedError, match="left GENERATING"):
        m.run_batch(end)
    assert pauses == at
    assert len(m.prover.engine.shapes) == (at > 11)  # 5 inputs, 5 permutations, a projection
    assert m.status()["total_checked"] == 0
    m.stop_round()

    m.start_round(config(use_random_projection=True))
    expected = m.validate(claim(range(5)))
    pauses = 0
    validation = m.validation(claim(range(5)))
    if how == "another phase":
        m.recompute([(validation, 5)], end)
        assert m.verdict(validation) == expected
        return
    with pytest.raises(RoundEndedError, match="while the batch was validated"):
        m.recompute([(validation, 5)], end)
    assert pauses == at


def test_what_a_pause_raises_comes_through_and_the_next_batch_is_right(small_pieces):
    m = manager()
    m.start_round(config(use_random_projection=True))
    expected = m.run_batch().dist
    m.stop_round()
    m.start_round(config(use_random_projection=True))
    for after in range(1, 8):
        left = iter(range(after))

        def give_up(left=left):
            if next(left, None) is None:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            m.run_batch(give_up)
    assert m.run_batch().dist == expected


def test_pauses_are_no_part_of_the_time_of_a_batch(small_pieces, monkeypatch):
    ticks = Ticks(1.0)
    monkeypatch.setattr(stopwatch_module, "time", types.SimpleNamespace(perf_counter=ticks))

    def pause():
        ticks.now += 1000.0

    reports = []
    m = PoCManager(DistanceProver(SmallEngine()), reports.append)
    m.start_round(config(use_random_projection=True))
    m.run_batch(pause)
    (report,) = reports
    assert report.seconds == sum(report.part_seconds.values()) < 100
    assert all(seconds >= 1 for seconds in report.part_seconds.values())


@pytest.mark.parametrize("projection", [False, True])
def test_reports(projection):
    reports = []
    m = PoCManager(DistanceProver(SmallEngine()), reports.append)
    m.start_round(config(use_random_projection=projection))
    batch = m.run_batch()
    m.validate(claim([4, 2]))
    generated, validated = reports
    assert (generated.phase, generated.outcomes, generated.valid) == ("generate", batch.dist, len(batch.below(1.4)))
    assert (validated.phase, len(validated.outcomes)) == ("validate", 2)
    for report in reports:
        assert set(report.part_seconds) == {"inputs", "projection", "forward", "distance"}
        assert (report.part_seconds["projection"] > 0) == projection
        assert 0 < sum(report.part_seconds.values()) == report.seconds


def test_what_does_not_fit_the_engine():
    m = manager()
    with pytest.raises(ValueError, match="seq_len must be at most the 64 positions of the model, got 65"):
        m.start_round(config(seq_len=65))
    with pytest.raises(TypeError, match="config must be a PoCConfig, got dict"):
        m.start_round({})
    with pytest.raises(ValueError, match=r"engine must have a hidden size in \[1, 65536\], got 65537"):
        DistanceProver(type("Wide", (SmallEngine,), {"__init__": lambda self: setattr(self, "hidden_size", 65537)})())
    with pytest.raises(ValueError, match="slice_seconds must be positive, got 0"):
        DistanceProver(SmallEngine(), slice_seconds=0)
    with pytest.raises(ValueError, match="Node ID and node count must be set to generate"):
        m.start_round(config(node_id=UNSET, node_count=UNSET))
    assert m.state == PoCState.IDLE
    assert m.config is None


@pytest.mark.parametrize("phase", [PoCState.IDLE, PoCState.STOPPED, "generate"])
def test_phases(phase):
    m = manager()
    m.init_round(config())
    for enter in (m.set_phase, lambda phase: m.start_round(config(), phase)):
        with pytest.raises(ValueError, match="phase must be GENERATING or VALIDATING"):
            enter(phase)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_may_be_named_by_its_text(phase):
    m = manager()
    m.start_round(config(), phase.value)
    assert (m.state, m.status()["state"]) == (phase, phase.value)
    for other in reversed(PHASES):
        m.set_phase(other.value)
        assert isinstance(m.state, PoCState)
        assert m.progress()["state"] == other.value


@pytest.mark.parametrize("shape", [(1, 6), (5, 1), (1, 1), (5, 6)])
def test_the_engine_s_output_is_left_alone(shape):
    """It may be the engine's own memory, and the last positions of one row are no copy of it."""

    class Keeping(SmallEngine):
        def forward(self, inputs_embeds, pause=never):
            self.result = super().forward(inputs_embeds, pause)
            self.before = self.result.clone()
            return self.result

    m = PoCManager(DistanceProver(Keeping()))
    m.start_round(config(batch_size=shape[0], seq_len=shape[1], use_random_projection=True))
    m.run_batch()
    assert_same_bits(m.prover.engine.result, m.prover.engine.before)


def test_the_engine_s_output_may_be_a_view_that_the_next_call_overwrites():
    class Reusing(SmallEngine):
        buffer = None

        def forward(self, inputs_embeds, pause=never):
            result = super().forward(inputs_embeds, pause)
            if self.buffer is None:
                self.buffer = torch.empty_like(result)
            return self.buffer.copy_(result)

    for seq_len in (1, 6):
        plain, reusing = manager(), PoCManager(DistanceProver(Reusing()))
        for m in (plain, reusing):
            m.start_round(config(seq_len=seq_len, use_random_projection=True))
        for _ in range(3):
            assert plain.run_batch().dist == reusing.run_batch().dist


def test_many_threads_compute_one_at_a_time():
    m = manager()
    m.start_round(config())
    computing, most, lock = [0], [0], threading.Lock()

    def enter():
        with lock:
            computing[0] += 1
            most[0] = max(most[0], computing[0])

    original = m.prover.engine.compute_logits

    def leave(hidden):
        with lock:
            computing[0] -= 1
        return original(hidden)

    m.prover.engine.before_forward, m.prover.engine.compute_logits = enter, leave
    found = []
    threads = [threading.Thread(target=lambda: found.append(m.run_batch()), daemon=True) for _ in range(6)] + [
        threading.Thread(target=lambda: found.append(m.validate(claim([1, 2]))), daemon=True) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LATE)
    assert len(found) == 10
    assert most[0] == 1
    generated = sorted(nonce for batch in found if batch.node_id == 0 and len(batch) == 5 for nonce in batch.nonces)
    assert generated == list(range(30))  # none twice, none left out


def test_the_seed_moves_to_the_engine_s_device(device):
    m = PoCManager(DistanceProver(SmallEngine(device=device)))
    m.start_round(config(use_random_projection=True))
    m.run_batch()
    assert m.prover.work.projection.seed.device.type == device.type
    cpu = manager()
    cpu.start_round(config(use_random_projection=True))
    pair = [x.run_batch().dist for x in (cpu, m)]
    m.stop_round()
    if device.type == "cpu":
        m.start_round(config(use_random_projection=True))
        assert m.run_batch().dist == pair[0]
    assert_same_bits(m.prover.work.projection.seed.cpu(), torch.tensor(seed_from_block_hash("block")))


# ---- the state machine ----


class States(RuleBasedStateMachine):
    """Any order of calls: the state is always the one that the table of the protocol gives.

    Rounds are of one configuration, or of another.
    """

    @initialize()
    def begin(self):
        self.manager = manager(hidden_size=4, vocab_size=5)
        self.state = PoCState.IDLE
        self.begun = None
        self.checked = 0

    def begins(self, of, state):
        begin(self.manager, of, state)
        if self.begun != of or self.state == PoCState.STOPPED:
            self.state, self.begun, self.checked = state, of, 0
        elif state in PHASES:
            self.state = state

    @rule(height=st.sampled_from([7, 8]))
    def init(self, height):
        self.begins(config(block_height=height), PoCState.IDLE)

    @rule(phase=st.sampled_from(PHASES), height=st.sampled_from([7, 8]))
    def start(self, phase, height):
        self.begins(config(block_height=height), phase)

    @rule(phase=st.sampled_from(PHASES))
    def enter(self, phase):
        if not self.begun or self.state == PoCState.STOPPED:
            with pytest.raises(IllegalTransitionError, match=f"phase {phase.value} needs a round"):
                self.manager.set_phase(phase)
        else:
            self.manager.set_phase(phase)
            self.state = phase

    @rule()
    def stop(self):
        self.manager.stop_round()
        self.state = PoCState.STOPPED

    @rule()
    def run(self):
        if self.state == PoCState.GENERATING:
            batch = self.manager.run_batch()
            assert batch.nonces == list(range(self.checked, self.checked + 5))
            self.checked += 5
        else:
            with pytest.raises(IllegalTransitionError, match="run_batch needs"):
                self.manager.run_batch()

    @rule()
    def validate(self):
        if self.begun:
            proof = claim([3, 1], block_height=self.begun.block_height)
            assert self.manager.validate(proof).nonces == [3, 1]
        else:
            with pytest.raises(IllegalTransitionError, match="No round configured: validate needs a round"):
                self.manager.validate(claim([3, 1]))

    @precondition(lambda self: self.state in PHASES)
    @rule()
    def without_a_place(self):
        with pytest.raises(ValueError, match="Node ID"):
            self.manager.start_round(config(node_id=UNSET, node_count=UNSET))

    @invariant()
    def agrees(self):
        status = self.manager.status()
        assert self.manager.state == self.state
        assert status["state"] == self.state.value
        assert status["total_checked"] == self.checked
        assert status["total_valid"] == len(status["valid_nonces"]) == len(status["valid_distances"])
        assert self.manager.config == self.begun


States.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestStates = States.TestCase
