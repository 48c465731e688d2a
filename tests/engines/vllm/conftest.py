"""Fixtures of the tests of vLLM's engine."""

import pytest
import vllm_stand_ins


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins for the parts of vLLM that an engine meets."""
    return vllm_stand_ins.install(monkeypatch)
