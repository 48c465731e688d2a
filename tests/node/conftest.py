"""Fixtures of a whole node: one a module, reset after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from nodes import (
    MAX_BODY,
    SETTINGS,
    Alone,
    posted,
    running,
    status,
)
from web import eventually

from poc_kernels.node.node import Node


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
