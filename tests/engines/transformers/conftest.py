"""Fixtures of tests of the OpenAI routes: a tiny model on a real server, one a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# What serves HTTP is imported by what needs it: tests of the engine also run on machines with a GPU that lack it.
if TYPE_CHECKING:
    import httpx2
    from fastapi import FastAPI

    from poc_kernels.engines.transformers.inference import Inference


@pytest.fixture(scope="module")
def inference(tiny_model_dir: Path) -> Iterator[Inference]:
    from served import MAX_NEW, load, started

    with started(*load(tiny_model_dir), max_new_tokens=MAX_NEW) as inference:
        yield inference


@pytest.fixture(scope="module")
def app(inference: Inference) -> FastAPI:
    from poc_kernels.engines.transformers import openai_app

    return openai_app.build(inference)


@pytest.fixture(scope="module")
def http(app: FastAPI) -> Iterator[httpx2.Client]:
    from web import client, serving

    with serving(app) as url, client(url) as http:
        yield http


@pytest.fixture
def nothing_stays_in_flight(inference: Inference) -> Iterator[None]:
    from web import TIMEOUT

    yield
    assert inference.wait_idle(TIMEOUT)
    assert inference.trouble() is None
    assert inference.restarts == 0
