"""Fixtures for any server with rounds, for `pytest_plugins`; to read metrics, `http` is a client of the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from nodes import small_model
from prometheus_client.parser import text_string_to_metric_families

pytest_plugins = ["callback_receivers"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def metrics(http: httpx2.Client) -> Callable[..., float]:
    def read(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return sum(
            s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()
        )

    return read
