"""Rounds over HTTP, on a real vLLM server with a real, tiny model."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from artifacts_over_http import *  # noqa: F403
from rounds_over_http import *  # noqa: F403

pytest_plugins = ["vllm_server"]
