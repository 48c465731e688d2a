"""Fixtures of tests of the OpenAI routes: a tiny model on a real server, one a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from served import MAX_NEW, load, started
from web import TIMEOUT, client, serving

from poc_kernels.engines.transformers import openai_app
from poc_kernels.engines.transformers.inference import Inference


@pytest.fixture(scope="module")
def inference(tiny_model_dir: Path) -> Iterator[Inference]:
    with started(*load(tiny_model_dir), max_new_tokens=MAX_NEW) as inference:
        yield inference


@pytest.fixture(scope="module")
def app(inference: Inference) -> FastAPI:
    return openai_app.build(inference)


@pytest.fixture(scope="module")
def http(app: FastAPI) -> Iterator[httpx2.Client]:
    with serving(app) as url, client(url) as http:
        yield http


@pytest.fixture
def nothing_stays_in_flight(inference: Inference) -> Iterator[None]:
    yield
    assert inference.wait_idle(TIMEOUT)
    assert inference.trouble() is None
    assert inference.restarts == 0
