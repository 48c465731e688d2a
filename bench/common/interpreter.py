"""Triton's interpreter beside a NumPy that makes no int of an array of one element any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def counting(patch: Callable[..., None]) -> Callable[..., None]:
    """Return the interpreter's ``_patch_lang_tensor`` so that tensors count loops, which before 3.9 they do not."""

    def patch_and_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch_and_index
