"""The validation queue over HTTP: results by poll, fairness between addresses, progress, and the end."""

from __future__ import annotations

import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from nodes import (
    MAX_QUEUED,
    POW,
    ROUND,
    Alone,
    Blocked,
    begin,
    claim,
    forwarded,
    polled,
    posted,
    queued,
    running,
    status,
)
from web import TIMEOUT, eventually

from poc_kernels.node.node import Node
from poc_kernels.service import queue as validation_queue

pytest_plugins = ["round_fixtures"]

BATCH = ROUND["batch_size"]


@pytest.fixture
def blocked(http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch) -> Blocked:
    """A round in state VALIDATING whose forwards wait."""
    begin(http, "validate")
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    return blocked


def test_progress(http: httpx2.Client, alone: Alone, blocked: Blocked) -> None:
    try:
        first = queued(http, claim(range(3 * BATCH)))
        assert blocked.entered.wait(TIMEOUT)
        second = queued(http, claim(range(5)), "192.0.2.1")
        waiting = {"id": first.rpartition("/")[2], "nonces_done": 0, "nonces": 3 * BATCH}
        answer = http.get(first)
        assert (answer.status_code, answer.json()) == (202, {"status": "RUNNING", **waiting})
        answer = http.get(second)
        assert (answer.status_code, answer.json()["status"], answer.json()["nonces_done"]) == (202, "QUEUED", 0)
        told = status(http)
        assert told["queued_nonces"] == told["validation"]["queued_nonces"] == 3 * BATCH + 5
        assert (told["validation"]["queued_batches"], told["validation"]["submitters"]) == (2, 2)
        assert told["validation"]["running"] == waiting
        metrics = http.get("/metrics").text
        assert f"poc_validation_queue_nonces {3 * BATCH + 5}.0" in metrics
        assert "poc_validation_queue_batches 2.0" in metrics
    finally:
        blocked.release()
    assert polled(http, first)["distances"] == alone.distances(range(3 * BATCH))
    assert polled(http, second)["distances"] == alone.distances(range(5))
    told = status(http)["validation"]
    assert told["nonces_per_second"] > 0
    assert (told["queued_batches"], told["submitters"], told["running"]) == (0, 0, None)
    assert told["slices"]["count"] >= 1
    assert told["slices"]["longest_seconds"] > 0


def test_no_address_fills_the_queue_for_others(http: httpx2.Client, alone: Alone, blocked: Blocked) -> None:
    try:
        mine = [queued(http, claim(range(MAX_QUEUED // 4))) for _ in range(2)]
        assert blocked.entered.wait(TIMEOUT)
        for path in ("/validate", "/validate?wait=false"):
            full = http.post(POW + path, json=claim([1]))
            assert (full.status_code, "a submitter with 32 nonces waiting" in full.json()["detail"]) == (429, True)
            assert 1 <= int(full.headers["retry-after"]) <= 600
        theirs = queued(http, claim(range(MAX_QUEUED // 2)), "192.0.2.1")
        for path in ("/validate", "/validate?wait=false"):
            full = http.post(POW + path, json=claim([1]), headers=forwarded("192.0.2.2"))
            assert (full.status_code, f"at most {MAX_QUEUED} nonces" in full.json()["detail"]) == (429, True)
            assert 1 <= int(full.headers["retry-after"]) <= 600
    finally:
        blocked.release()
    for location, count in ((mine[0], MAX_QUEUED // 4), (mine[1], MAX_QUEUED // 4), (theirs, MAX_QUEUED // 2)):
        assert polled(http, location)["distances"] == alone.distances(range(count))


def test_a_stop_is_told_to_all_at_once(http: httpx2.Client, metrics: Any, receiver: Receiver, blocked: Blocked) -> None:
    begin(http, "validate", callback_url=receiver.url)
    before = metrics("poc_validations_total", outcome="cancelled")
    with ThreadPoolExecutor(1) as pool:
        try:
            polled = [queued(http, claim(range(8), [1.0] * 8), name) for name in ("192.0.2.1", "192.0.2.2")]
            waited = pool.submit(http.post, f"{POW}/validate", json=claim(range(8), [1.0] * 8))
            eventually(lambda: status(http)["queued_nonces"] == 24)
            assert blocked.entered.wait(TIMEOUT)
            answer = posted(http, "/stop")["pow_status"]
            # The forward that runs has not ended.
            assert (answer["queued_nonces"], answer["validation"]["running"]) == (0, None)
            assert waited.result(TIMEOUT).status_code == 409
            for location in polled:
                over = http.get(location)
                assert (over.status_code, "the round ended" in over.json()["detail"]) == (409, True)
        finally:
            blocked.release()
    assert metrics("poc_validations_total", outcome="cancelled") == before + 3
    begin(http, "validate", callback_url=receiver.url)
    posted(http, "/validate", claim([1], [1.0]))
    receiver.wait(1)
    assert [batch["nonces"] for batch in receiver.contents()] == [[1]]  # nothing of what was cancelled


def test_a_batch_that_fails_is_told_to_who_asks(
    http: httpx2.Client, node: Node, alone: Alone, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http, "validate")
    before = metrics("poc_validations_total", outcome="failed")

    def fail(*_: object) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(node.engine, "forward", fail)
        location = queued(http, claim([1]))
        eventually(lambda: http.get(location).status_code == 503)
    answer = http.get(location)
    assert answer.json()["detail"] == "the batch could not be computed: RuntimeError"
    assert int(answer.headers["retry-after"]) > 0
    assert metrics("poc_validations_total", outcome="failed") == before + 1
    assert polled(http, queued(http, claim([1])))["distances"] == alone.distances([1])


def test_results_end(http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(http, "validate")
    for unknown in ("nothing", "0" * 32, "%00"):
        assert http.get(f"{POW}/validate/{unknown}").status_code == 404
    location = queued(http, claim([1]))
    polled(http, location)
    late = time.monotonic() + 3601.0
    monkeypatch.setattr(validation_queue, "time", types.SimpleNamespace(monotonic=lambda: late))
    assert http.get(location).status_code == 404


def test_shutdown_ends_what_waits(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model_dir) as (node, http):
        begin(http, "validate")
        blocked = Blocked(node.engine.forward)
        monkeypatch.setattr(node.engine, "forward", blocked)
        try:
            locations = [queued(http, claim(range(9))) for _ in range(2)]
            assert blocked.entered.wait(TIMEOUT)
            node.begin_shutdown()
            assert [http.get(location).status_code for location in locations] == [409, 409]
        finally:
            blocked.release()
