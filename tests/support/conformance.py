"""What a server of the small model must give: every check of the wire passes, and there is no hole."""

from __future__ import annotations

from nodes import MAX_QUEUED
from served import NAME
from web import TIMEOUT

from poc_kernels.conform.outcome import Outcome
from poc_kernels.conform.plan import MLNODE_PREFIX, Plan
from poc_kernels.conform.run import ALL, conform


def assert_conforms(url: str, prefix: str, proof: str) -> None:
    """Play all checks on a server with `SETTINGS` of nodes."""
    sizes = {"seq_len": 16, "batch_size": 4, "queue_limit": MAX_QUEUED}
    report = conform(Plan(url=url, prefix=prefix, proof=proof, timeout_seconds=TIMEOUT, **sizes))
    assert [result.name for result in report.results] == [each.name for each in ALL]
    assert report.model == NAME
    others = {result.name: result for result in report.results if result.outcome is not Outcome.PASS}
    of_form = {"verdict.norm"} if proof == "vectors" else {"generate.stronger_rng"}
    of_engines = {"health", "versions"} if prefix == MLNODE_PREFIX else set()
    assert others.keys() == of_form | of_engines, others
    assert {result.outcome for result in others.values()} == {Outcome.SKIPPED}
