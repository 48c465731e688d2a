"""Rounds over HTTP, on our own server with a real, tiny model."""

from __future__ import annotations

from artifacts_over_http import *  # noqa: F403
from rounds_over_http import *  # noqa: F403

pytest_plugins = ["round_fixtures"]
