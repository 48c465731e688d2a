"""The PoC routes of a vLLM server under generated requests. Last: callbacks to nobody stay in its queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx2
import schemathesis
from fuzzed_rounds import *  # noqa: F403
from nodes import POW, Alone, begin, claim, posted
from web import CHAT, chat, text_of

pytest_plugins = ["vllm_server"]


@pytest.fixture(scope="module")
def fuzzed(idle_http: httpx2.Client, alone: Alone) -> Iterator[httpx2.Client]:
    """The server, which must be as good after all tests as before."""
    before = text_of(idle_http.post(CHAT, json=chat(max_tokens=4)))
    yield idle_http
    begin(idle_http, "validate")
    assert posted(idle_http, "/validate", claim(range(9)))["distances"] == alone.distances(range(9))
    assert text_of(idle_http.post(CHAT, json=chat(max_tokens=4))) == before
    assert idle_http.get("/health").status_code == 200
    posted(idle_http, "/stop")


@pytest.fixture(scope="module")
def api(fuzzed: httpx2.Client) -> Any:
    return schemathesis.openapi.from_url(str(fuzzed.base_url.join("/openapi.json"))).include(path_regex=f"^{POW}/")
