"""Our own node speaks the wire: every check over HTTP, without a hole."""

from __future__ import annotations

import pytest
from nodes import MAX_QUEUED, NAME, SETTINGS, running
from web import TIMEOUT

from poc_kernels.conform.outcome import Outcome
from poc_kernels.conform.plan import ENGINE_PREFIX, MLNODE_PREFIX, Plan
from poc_kernels.conform.run import ALL, conform

pytest_plugins = ["node_fixtures"]


@pytest.fixture(scope="module")
def url(model_dir):
    with running(model_dir, **SETTINGS) as (_, http):
        yield str(http.base_url)


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
@pytest.mark.parametrize("prefix", [ENGINE_PREFIX, MLNODE_PREFIX])
def test_every_check_passes(url, prefix, proof, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    plan = Plan(
        url=url, prefix=prefix, proof=proof, seq_len=16, batch_size=4, queue_limit=MAX_QUEUED, timeout_seconds=TIMEOUT
    )
    report = conform(plan)
    assert report.model == NAME
    others = {result.name: result for result in report.results if result.outcome is not Outcome.PASS}
    of_form = {"verdict.norm"} if proof == "vectors" else {"generate.stronger_rng"}
    of_engines = {"health", "versions"} if prefix == MLNODE_PREFIX else set()
    assert others.keys() == of_form | of_engines, others
    assert {result.outcome for result in others.values()} == {Outcome.SKIPPED}
    assert [result.name for result in report.results] == [each.name for each in ALL]
