"""pytest -p gpu_shard with POC_TEST_SHARD=2/8: every eighth of the selected tests, from the second on.

So many processes share the tests, and what takes most of their time on a new machine: compiling kernels.
"""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this shard."""
    shard, shards = map(int, os.environ["POC_TEST_SHARD"].split("/"))
    kept = items[shard - 1 :: shards]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
