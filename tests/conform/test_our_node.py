"""Our own node speaks the wire: every check over HTTP, without a hole."""

from __future__ import annotations

import pytest
from conformance import assert_conforms
from nodes import SETTINGS, running

from poc_kernels.conform.plan import ENGINE_PREFIX, MLNODE_PREFIX

pytest_plugins = ["round_fixtures"]


@pytest.fixture(scope="module")
def url(model_dir):
    with running(model_dir, **SETTINGS) as (_, http):
        yield str(http.base_url)


@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
@pytest.mark.parametrize("prefix", [ENGINE_PREFIX, MLNODE_PREFIX])
def test_every_check_passes(url, prefix, proof, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    assert_conforms(url, prefix, proof)
