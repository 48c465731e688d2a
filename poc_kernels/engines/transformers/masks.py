"""Masks of attention: transformers' own, in a capture too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import masking_utils


@contextlib.contextmanager
def masks_as_outside_a_capture() -> Iterator[None]:
    """Have transformers make the masks that it makes for whole sequences: none where attention is simply causal.

    During a capture it cannot check whether a batch is packed or padded, and makes explicit masks to be safe. With
    these, other attention kernels run, whose results are not bit-identical. Only this thread is affected: others may
    serve users meanwhile.
    """
    thread = threading.get_ident()

    def only_here(answer: Any, otherwise: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return answer if threading.get_ident() == thread else otherwise(*arguments, **named)

    with contextlib.ExitStack() as undo:
        for name, answer in (("find_packed_sequence_indices", None), ("is_tracing", False)):
            otherwise = getattr(masking_utils, name)
            undo.callback(setattr, masking_utils, name, otherwise)
            setattr(masking_utils, name, partial(only_here, answer, otherwise))
        yield
