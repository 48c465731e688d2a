"""Rounds over HTTP, on a real server with a real, tiny model."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from architectures import tiny
from nodes import (
    MAX_QUEUED,
    POW,
    ROUND,
    STATUS_KEYS,
    Alone,
    Blocked,
    begin,
    checked,
    claim,
    posted,
    running,
    settings,
    status,
)
from served import load
from web import TIMEOUT, eventually

from poc_kernels.node.node import Node

pytest_plugins = ["round_fixtures"]


def test_before_any_round(model_dir: Path) -> None:
    with running(model_dir) as (_, http):
        assert status(http) == {
            **dict.fromkeys(STATUS_KEYS, 0),
            "state": "IDLE",
            "status": "IDLE",
            "is_model_initialized": True,
            "ignored": [],
            "valid_nonces": [],
            "valid_distances": [],
            "r_target": None,
            "generation_ended": None,
            "config": None,
            "validation": {
                **dict.fromkeys(("queued_batches", "queued_nonces", "submitters", "nonces_per_second"), 0),
                "running": None,
                "share": 0.1,
                "pacing": "free" if sys.platform == "linux" else "paced",
                "slices": None,
            },
            "callbacks": {
                **dict.fromkeys(("pending_batches", "pending_nonces", "delivered_batches", "failed_attempts"), 0),
                **dict.fromkeys(("dropped_batches", "dropped_nonces"), 0),
                "last_error": None,
            },
        }
        for path, body in (("/phase/generate", None), ("/phase/validate", None), ("/validate", claim([1]))):
            answer = http.post(POW + path, json=body)
            assert (answer.status_code, "needs a round, none was begun" in answer.text) == (400, True), path
        assert posted(http, "/stop")["pow_status"]["state"] == "STOPPED"
        assert http.post(f"{POW}/phase/validate").status_code == 400
        assert http.post(f"{POW}/validate", json=claim([1])).status_code == 400
        assert begin(http, "init")["state"] == "IDLE"


# ---- validation ----


def test_a_restarted_node_gives_the_same_distances(http: httpx2.Client, model_dir: Path) -> None:
    begin(http, use_random_projection=True)
    found = checked(http, 40)
    posted(http, "/stop")
    with running(model_dir, random_projection=True) as (_, again):
        begin(again, "validate", batch_size=ROUND["batch_size"])
        verdict = posted(again, "/validate", claim(found["valid_nonces"], found["valid_distances"]))
    assert verdict["distances"] == found["valid_distances"]
    assert verdict["fraud_detected"] is False


def test_the_queue_is_bounded_to_the_nonce(
    http: httpx2.Client, node: Node, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(http, "validate")
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(posted, http, "/validate", claim(range(MAX_QUEUED - 4)))
            eventually(lambda: status(http)["queued_nonces"] == MAX_QUEUED - 4)
            full = http.post(f"{POW}/validate", json=claim(range(5)))
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) > 0
            hopeless = http.post(f"{POW}/validate", json=claim(range(MAX_QUEUED + 1)))
            assert (hopeless.status_code, f"at most {MAX_QUEUED} nonces" in hopeless.text) == (400, True)
            last = pool.submit(posted, http, "/validate", claim(range(100, 104)), "192.0.2.1")
            eventually(lambda: status(http)["queued_nonces"] == MAX_QUEUED)
        finally:
            blocked.release()
        assert first.result(TIMEOUT)["distances"] == alone.distances(range(MAX_QUEUED - 4))
        assert last.result(TIMEOUT)["distances"] == alone.distances(range(100, 104))


@pytest.mark.parametrize("path", ["/stop", "/stop and begin again"])
def test_validations_end_with_their_round(
    http: httpx2.Client, node: Node, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    begin(http, "validate")
    blocked = Blocked(node.engine.forward)
    monkeypatch.setattr(node.engine, "forward", blocked)
    with ThreadPoolExecutor(2) as pool:
        try:
            waiting = [pool.submit(http.post, f"{POW}/validate", json=claim(range(12))) for _ in range(2)]
            eventually(lambda: status(http)["queued_nonces"] == 24)
            posted(http, "/stop")
            if path != "/stop":
                begin(http, "validate", r_target=1.9)
        finally:
            blocked.release()
        assert [answer.result(TIMEOUT).status_code for answer in waiting] == [409, 409]


def test_a_directory_is_served_by_its_last_part(model_dir: Path) -> None:
    with contextlib.closing(Node(settings(model_dir, served_name=None))) as node:
        assert node.inference.name == model_dir.name


@pytest.mark.parametrize("position", [-1, 12])
def test_a_model_whose_rows_depend_on_others_does_not_start(model_dir: Path, position: int) -> None:
    """Also where the last position, which distances read, shows nothing of it."""
    model, tokenizer = load(model_dir)

    def look_at_others(_: object, __: object, output: Any) -> Any:
        states = output.last_hidden_state
        if states.shape[:2] == (4, 16):
            states[:, position] += states[:, position].amax(0, keepdim=True) * 2.0**-10
        return output

    model.base_model.register_forward_hook(look_at_others)
    with (
        contextlib.closing(Node(settings(model_dir), model, tokenizer)) as node,
        pytest.raises(ValueError, match="depend on nothing else, here they depend on the rows beside it"),
    ):
        node.start()


def test_a_model_that_cannot_be_served_rightly_does_not_start(model_dir: Path) -> None:
    model = tiny("xlnet")
    with (
        contextlib.closing(Node(settings(model_dir), model, load(model_dir)[1])) as node,
        pytest.raises(ValueError, match="serve with its own text, XLNetLMHeadModel is not"),
    ):
        node.start()
