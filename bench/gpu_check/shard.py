"""``python -m bench.gpu_check.shard 2/8 ...`` is pytest with every eighth of the selected tests, from the second on.

So several processes share the tests, and what takes most of their time on a new machine: compiling kernels.
"""

from __future__ import annotations

import sys

import pytest


class Shard:
    """A plugin of pytest that keeps the tests of one shard.

    Args:
        text: number of the shard and of all shards, for instance "2/8".
    """

    def __init__(self, text: str) -> None:
        self._number, self._count = map(int, text.split("/"))

    @pytest.hookimpl(trylast=True)  # after -m has chosen
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = items[self._number - 1 :: self._count]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[Shard(sys.argv[1])]))
