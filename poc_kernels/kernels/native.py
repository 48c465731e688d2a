"""The compiled module ``poc_kernels._native``, where it was built."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType


@functools.cache
def load() -> ModuleType | None:
    """Return the compiled module, or None, with one warning, where it was not built or does not load."""
    try:
        return importlib.import_module("poc_kernels._native")
    except ImportError as error:
        root = Path(__file__).parents[2]
        where = f"imported from its sources in {root}" if (root / "pyproject.toml").exists() else "installed"
        warnings.warn(
            f"poc_kernels is {where} without its native core ({error}): plain torch serves in its place, with the "
            "same bits and much slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
