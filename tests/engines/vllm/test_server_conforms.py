"""A vLLM server with rounds speaks the wire of artifacts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import httpx2
from conformance import assert_conforms
from nodes import begin

pytest_plugins = ["vllm_server"]


@pytest.fixture(autouse=True)
def idle(http: httpx2.Client) -> Iterator[None]:
    """Before and after, the status is that of the older wire, as those who reset the server read it."""
    begin(http, "init")
    yield
    begin(http, "init")


@pytest.mark.parametrize(("prefix", "proof"), [("/api/v1/pow", "vectors"), ("/api/v1/inference/pow", "fingerprint")])
def test_every_check_passes(http: httpx2.Client, prefix: str, proof: str) -> None:
    assert_conforms(str(http.base_url), prefix, proof)
