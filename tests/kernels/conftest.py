"""A GPU that is none, for tests of the package's machine code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def idle(driver_library: Path, classes: Any, tmp_path: Path) -> Iterator[Any]:
    """A GPU that takes launches of every form and runs nothing."""
    import cuda_stand_in

    stand_in = cuda_stand_in.StandIn(driver_library, cuda_stand_in.empty_package(tmp_path), {})
    with cuda_stand_in.in_use(stand_in, tmp_path, classes):
        yield stand_in


@pytest.fixture
def kernel(idle: Any) -> Any:
    """A kernel of more shared memory than is usual."""
    from poc_kernels.kernels.cuda import launcher

    name = next(name for name, code in idle.made.objects.items() if code.shared_bytes > 49152)
    return launcher._loaded((9, 0), name)
