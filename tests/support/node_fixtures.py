"""Fixtures of a whole node, for `pytest_plugins`: one node a module, reset after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from nodes import (
    MAX_BODY,
    SETTINGS,
    Alone,
    posted,
    running,
    small_model,
    status,
)
from prometheus_client.parser import text_string_to_metric_families
from web import eventually

from poc_kernels.node.node import Node


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def alone(model_dir: Path) -> Alone:
    return Alone(model_dir)


@pytest.fixture(scope="module")
def running_node(model_dir: Path) -> Iterator[tuple[Node, httpx2.Client]]:
    with running(model_dir, max_body_bytes=MAX_BODY, **SETTINGS) as running_node:
        yield running_node


@pytest.fixture
def node(running_node: tuple[Node, httpx2.Client]) -> Node:
    return running_node[0]


@pytest.fixture
def http(running_node: tuple[Node, httpx2.Client], monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    node, http = running_node
    monkeypatch.setenv("NO_PROXY", "*")
    yield http
    posted(http, "/stop")
    eventually(lambda: status(http)["queued_nonces"] == 0 and node.app.in_flight == 0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


@pytest.fixture
def metrics(http: httpx2.Client) -> Any:
    def read(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return sum(
            s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()
        )

    return read
