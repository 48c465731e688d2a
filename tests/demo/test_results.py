"""What is computed from the records of a demonstration."""

from __future__ import annotations

import math

import pytest
from records import chat, results

from poc_kernels.demo.results import Chat, Check, Claim, Judged, Latency


def test_a_chat_knows_its_times():
    served = chat("IDLE", 2.0, 0.25)
    assert served.served
    assert served.gaps == pytest.approx([0.25, 0.25])
    silent = Chat("IDLE", 0.0, 1.0)
    assert not silent.served
    assert silent.gaps == []


def test_waits_are_those_of_the_chats_served_alone_and_while_validating():
    given = results()
    given.chats.append(Chat("IDLE", 0.0, 9.0, (4.0, 9.0), "cut off", status=0, error="gone"))
    waits = {(wait.what, wait.when): wait.milliseconds for wait in given.latencies()}
    assert list(waits) == [
        ("first token", "users alone"),
        ("first token", "while validating"),
        ("between tokens", "users alone"),
        ("between tokens", "while validating"),
    ]
    # Before and after the round; neither the warm-up nor what broke off.
    assert waits["first token", "users alone"] == pytest.approx([20.0] * 3)
    assert waits["between tokens", "users alone"] == pytest.approx([10.0] * 6)
    assert waits["first token", "while validating"] == pytest.approx([100.0])
    assert waits["between tokens", "while validating"] == pytest.approx([50.0] * 2)


def test_results_pass_only_if_all_checks_passed():
    assert results().passed
    assert not results(checks=[]).passed
    assert not results(checks=[Check("a", True), Check("b", False)]).passed


def test_summary_says_what_was_measured():
    rows = dict(results().summary())
    assert rows == {
        "proofs while GENERATING": "500.0 fingerprints per second",
        "proofs while users are served": "250.0 fingerprints per second, 50%",
        "fingerprints within 0.300": "1 of 1 honest claims accepted, 1 of 1 cheats caught",
        "valid nonces, distance below 1.4010": "210 of 1000: 21.0%, expected 20.0%",
        "share of the two projections in the compute": "1.00%",
        "memory for P": "0 bytes, and 8 for its seed; stored, P would take 512.0 KiB",
        "first token, users alone": "p50 20.0 ms, p99 20.0 ms, 3 samples",
        "first token, while validating": "p50 100.0 ms, p99 100.0 ms, 1 samples",
        "between tokens, users alone": "p50 10.0 ms, p99 10.0 ms, 6 samples",
        "between tokens, while validating": "p50 50.0 ms, p99 50.0 ms, 2 samples",
    }


def test_summary_of_nothing_says_so():
    nothing = results(chats=[], parts={}, checked=0, valid=0, generating_rate=0.0, validating_rate=0.0)
    rows = dict(nothing.summary())
    assert rows["first token, users alone"] == "not measured"
    assert rows["proofs while users are served"] == "0.0 fingerprints per second, 0%"
    assert rows["share of the two projections in the compute"] == "0.00%"
    assert rows["valid nonces, distance below 1.4010"] == "0 of 0: 0.0%, expected 20.0%"


def test_judged_claims_count_what_is_a_fingerprint():
    judged = results().judged[1]
    assert judged.median == 1.1
    assert (judged.below(0.3), judged.below(1.1)) == (0, 1)
    nothing = Judged(Claim("nothing", "", (None,)), (math.nan,), 1, 0.02, False)
    assert math.isnan(nothing.median)
    assert nothing.below(2.0) == 0
    missed = results(judged=[*results().judged, nothing])
    assert (missed.accepted, missed.caught, missed.forged) == (1, 1, 2)


def test_percentiles():
    assert Latency("", "", [4.0]).percentile(99) == 4.0
    many = Latency("", "", list(range(101)))
    assert (many.percentile(50), many.percentile(99)) == (50.0, 99.0)
    assert str(Latency("", "", []).percentile(50)) == "nan"
