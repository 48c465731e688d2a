"""What is computed from the records of a demonstration."""

from __future__ import annotations

import pytest
from records import chat, results

from poc_kernels.demo.results import Chat, Check, median_and_tail


def test_a_chat_knows_its_times():
    served = chat("IDLE", 2.0, 0.25)
    assert served.served
    assert served.gaps == pytest.approx([0.25, 0.25])
    silent = Chat("IDLE", 0.0, 1.0)
    assert not silent.served
    assert silent.gaps == []


def test_times_are_those_of_the_chats_served_in_a_state():
    given = results()
    given.chats.append(Chat("IDLE", 0.0, 9.0, (4.0, 9.0), "cut off", status=0, error="gone"))
    assert given.firsts("IDLE") == pytest.approx([0.02, 0.02])
    assert given.gaps("VALIDATING") == pytest.approx([0.05, 0.05])
    assert given.firsts("GENERATING") == []


def test_results_pass_only_if_all_checks_passed():
    assert results().passed
    assert not results(checks=[]).passed
    assert not results(checks=[Check("a", True), Check("b", False)]).passed


def test_summary_says_what_was_measured():
    rows = dict(results().summary())
    assert rows["nonces checked while generating"] == "500.0 per second"
    assert rows["nonces recomputed while users are served"] == "250.0 per second"
    assert rows["valid nonces, distance below 1.4010"] == "210 of 1000: 21.0%, expected 20.0%"
    assert rows["share of the round spent in the two projections"] == "1.00%"
    assert rows["memory for P"] == "8 Bytes, its seed; stored, P would take 512.0 KiB"
    assert rows["time to first token, idle"] == "median 20.0 ms, 95th percentile 20.0 ms"
    assert rows["time between tokens, validating"] == "median 50.0 ms, 95th percentile 50.0 ms"


def test_summary_of_nothing_says_so():
    rows = dict(results(chats=[], samples=[], parts={}).summary())
    assert rows["time to first token, idle"] == "not measured"
    assert rows["share of the round spent in the two projections"] == "0.00%"
    assert rows["valid nonces, distance below 1.4010"] == "0 of 0: 0.0%, expected 20.0%"


def test_median_and_tail():
    assert median_and_tail([0.004]) == "median 4.0 ms, 95th percentile 4.0 ms"
    assert median_and_tail([value / 1000 for value in range(101)]) == "median 50.0 ms, 95th percentile 95.0 ms"
