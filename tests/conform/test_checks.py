"""Each check passes where the wire is spoken, and finds the fault that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conform_stand_in import MODEL, QUEUE_LIMIT, stand_in
from web import TIMEOUT

from poc_kernels.conform import run
from poc_kernels.conform.checks import CHECKS
from poc_kernels.conform.outcome import Outcome
from poc_kernels.conform.plan import ENGINE_PREFIX, MLNODE_PREFIX, Plan

FAULTS = [
    ("health", "unhealthy"),
    ("versions", "versions_lack_a_key"),
    ("init.starts", "init_is_short"),
    ("init.unknown_keys", "forbids_keys"),
    ("status.generating", "status_of_another"),
    ("status.generating", "no_stats"),
    ("init.already_generating", "init_replaces"),
    ("init.already_generating", "says_no_reason"),
    ("init.other_model", "any_model"),
    ("init.params_forbid", "params_allow"),
    ("init.malformed", "malformed_is_500"),
    ("stop.stops", "stop_is_idle"),
    ("stop.stops", "stop_goes_on"),
    ("stop.again", "stops_once"),
    ("left_idle", "stop_goes_on"),
    ("generate.waits", "drops_a_nonce"),
    ("generate.encoding", "big_endian"),
    ("generate.encoding", "wide"),
    ("generate.encoding", "no_norm"),
    ("generate.encoding", "finds_nan"),
    ("generate.encoding", "k_dim_is_less"),
    ("generate.encoding", "no_alphabet"),
    ("generate.queues", "queued_differs"),
    ("generate.queues", "ids_are_numbers"),
    ("generate.queues", "never_done"),
    ("generate.wait_is_false", "waits_by_default"),
    ("generate.unknown_id", "knows_all_ids"),
    ("generate.unknown_keys", "forbids_keys"),
    ("generate.params_forbid", "params_allow"),
    ("generate.malformed", "malformed_is_500"),
    ("generate.int32", "small_nonces"),
    ("generate.unequal_claims", "claims_of_others"),
    ("generate.stronger_rng", "one_rng"),
    ("generate.in_a_round", "no_requests_in_a_round"),
    ("generate.queue_full", "unlimited"),
    ("generate.queue_full", "says_no_reason"),
    ("determinism.repeated", "drifts"),
    ("determinism.alone", "sees_neighbours"),
    ("determinism.permuted", "sees_places"),
    ("determinism.beside_others", "key_of_the_one_before"),
    ("determinism.batch_size", "sees_batches"),
    ("determinism.after_a_round", "sees_rounds"),
    ("determinism.nonces", "one_for_all"),
    ("determinism.keys_and_blocks", "no_key"),
    ("determinism.keys_and_blocks", "no_block"),
    ("determinism.seq_len", "no_seq_len"),
    ("verdict.honest", "all_mismatch"),
    ("verdict.honest", "leaves_one_out"),
    ("verdict.order", "claims_by_place"),
    ("verdict.one_forged", "p_of_more"),
    ("verdict.one_forged", "one_for_all_forged"),
    ("verdict.random", "all_agree"),
    ("verdict.random", "never_fraud"),
    ("verdict.other_nonces", "any_place"),
    ("verdict.other_key", "no_key"),
    ("verdict.other_block", "no_block"),
    *((f"verdict.{name}", "one_for_all_forged") for name in ("nan", "inf", "short", "long", "empty", "not_base64")),
    ("stat_test.dist_threshold", "own_threshold"),
    ("stat_test.defaults", "other_defaults"),
    ("stat_test.partial", "all_or_nothing"),
    ("stat_test.fraud_threshold", "own_level"),
    ("stat_test.p_value_threshold", "never_fraud"),
    ("generated.body", "own_key"),
    ("generated.body", "no_node"),
    ("generated.body", "decodes_urls"),
    ("generated.nonces", "no_groups"),
    ("generated.nonces", "leaves_out"),
    ("generated.nonces", "posts_twice"),
    ("generated.artifacts", "round_differs"),
    ("generated.stops", "generates_on"),
    ("generated.again", "posts_once"),
    ("generated.of_request", "no_request_id"),
    ("generated.of_request", "posts_nothing"),
    ("validated.body", "own_key"),
    ("validated.body", "no_request_id"),
    ("validated.body", "excludes_another"),
    ("validated.honest", "posts_frauds_alone"),
    ("validated.again", "posts_once"),
]
HOLES = [
    ("verdict.nan", "not_finite_agrees"),
    ("verdict.inf", "not_finite_agrees"),
    ("verdict.short", "lengths_raise"),
    ("verdict.long", "lengths_agree"),
    ("verdict.empty", "empty_agrees"),
    ("verdict.not_base64", "base64_is_422"),
    ("stat_test.p_value_threshold", "own_name_alone"),
]
OF_FINGERPRINTS = [
    ("verdict.norm", "any_norm", Outcome.HOLE),
    ("verdict.norm", "one_for_all_forged", Outcome.FAIL),
    ("generate.encoding", "no_padding", Outcome.FAIL),
]
OF_MLNODES = [
    ("init.starts", "no_results"),
    ("status.generating", "no_backends"),
    ("generate.unknown_id", "no_backends"),
]
WAITED_FOR = {"never_done", "posts_nothing", "posts_once", "posts_frauds_alone", "decodes_urls"}
"""Faults that show when patience ends. Others are found at once: whoever is in no hurry finds no other fault."""


@pytest.fixture(scope="module")
def server():
    with stand_in() as server:
        yield server


@pytest.fixture
def outcome(server):
    """Plays one check on the stand-in with a fault, or none; its outcome."""
    faulty, url = server

    def outcome(name, fault, **changes):
        faulty.reset(fault)
        seconds = 0.4 if fault in WAITED_FOR else TIMEOUT
        plan = Plan(**{"url": url, "model": MODEL, "queue_limit": QUEUE_LIMIT, "timeout_seconds": seconds, **changes})
        report = run.conform(plan, ("init.starts" if name == "left_idle" else name,))
        return {result.name: result.outcome for result in report.results}[name]

    yield outcome
    faulty.reset()


@pytest.mark.parametrize("prefix", [ENGINE_PREFIX, MLNODE_PREFIX])
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_server_that_speaks_the_wire_passes(server, prefix, proof):
    faulty, url = server
    faulty.reset()
    report = run.conform(Plan(url=url, prefix=prefix, proof=proof, queue_limit=QUEUE_LIMIT))
    seen = {result.name: (result.outcome.value, result.seen) for result in report.results}
    assert {outcome for outcome, _ in seen.values()} <= {"pass", "skipped"}, seen
    skipped = {name for name, (outcome, _) in seen.items() if outcome == "skipped"}
    of_form = {"verdict.norm"} if proof == "vectors" else {"generate.stronger_rng"}
    assert skipped == of_form | ({"health", "versions"} if prefix == MLNODE_PREFIX else set())
    assert list(seen) == ["idle_before", "model", *(each.name for each in CHECKS), "left_idle"]
    assert report.conforms(strict=True)
    assert faulty.round is None


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_is_found_by_its_check(outcome, name, fault):
    assert outcome(name, fault) is Outcome.FAIL


@pytest.mark.parametrize(("name", "fault"), HOLES)
def test_holes_of_published_implementations_are_told_apart(outcome, name, fault):
    assert outcome(name, fault) is Outcome.HOLE


@pytest.mark.parametrize(("name", "fault", "expected"), OF_FINGERPRINTS)
def test_faults_with_fingerprints(outcome, name, fault, expected):
    assert outcome(name, fault, proof="fingerprint", k_dim=64) is expected


@pytest.mark.parametrize(("name", "fault"), OF_MLNODES)
def test_faults_of_mlnodes(outcome, name, fault):
    assert outcome(name, fault, prefix=MLNODE_PREFIX) is not Outcome.PASS


def test_an_mlnode_may_tell_its_engines_ids(outcome):
    assert outcome("generate.queues", "engines_ids", prefix=MLNODE_PREFIX) is Outcome.PASS


def test_every_check_has_a_fault_that_it_finds():
    covered = {name for name, *_ in [*FAULTS, *OF_FINGERPRINTS]}
    assert covered >= {each.name for each in CHECKS} | {"left_idle"}


def test_the_docs_have_every_check():
    documented = (Path(__file__).parents[2] / "docs" / "conform.md").read_text()
    rows = re.findall(r"^\| `(\S+)` +\| (.*?) +\|$", documented.partition("\n## Checks\n")[2], re.MULTILINE)
    assert sorted(rows) == sorted((each.name, each.says) for each in run.ALL)
    sections = {heading.lower() for heading in re.findall(r"^### (.*)$", documented, re.MULTILINE)}
    assert sections == {each.section for each in run.ALL}
