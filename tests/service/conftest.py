"""Fixtures of a tiny node that speaks today's wire: one a module, reset after each test."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from current_wire import POW
from tiny_service import ArtifactProver, TinyNode, tiny_node
from web import client, serving


@pytest.fixture(scope="module")
def node() -> Iterator[TinyNode]:
    models = ("tiny", "/models/tiny", "tiny")  # the name of a model and --model may be the same
    with tiny_node(ArtifactProver(), shutdown_seconds=1.0, max_queued_nonces=2000, models=models) as node:
        yield node


@pytest.fixture(scope="module")
def server(node: TinyNode) -> Iterator[httpx2.Client]:
    with serving(node.app) as url, client(url) as http:
        yield http


@pytest.fixture
def http(node: TinyNode, server: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.post(f"{POW}/stop")
    node.prover.before_forward = lambda: None
    node.prover.missing.clear()
