"""The PoC routes of our own server under generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from fuzzed_rounds import *  # noqa: F403
from fuzzed_rounds import FUZZED_SETTINGS
from nodes import POW, Alone, begin, claim, posted, running
from web import CHAT, chat, text_of

from poc_kernels.node.node import Node

pytest_plugins = ["round_fixtures"]


@pytest.fixture(scope="module")
def fuzzed_node(model_dir: Path, alone: Alone) -> Iterator[tuple[Node, httpx2.Client]]:
    """A node that must be as good after all tests as before."""
    with running(model_dir, shutdown_seconds=1.0, **FUZZED_SETTINGS) as (node, http):
        before = text_of(http.post(CHAT, json=chat(max_tokens=4)))
        yield node, http
        begin(http, "validate")
        assert posted(http, "/validate", claim(range(9)))["distances"] == alone.distances(range(9))
        assert text_of(http.post(CHAT, json=chat(max_tokens=4))) == before
        assert http.get("/health").status_code == 200
        assert node.inference.restarts == 0


@pytest.fixture(scope="module")
def fuzzed(fuzzed_node: tuple[Node, httpx2.Client]) -> httpx2.Client:
    return fuzzed_node[1]


@pytest.fixture(scope="module")
def api(fuzzed_node: tuple[Node, httpx2.Client]) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", fuzzed_node[0].app).include(path_regex=f"^{POW}/")
