"""What differs between the versions of transformers that are supported, 5.17 to 5.23."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import ContinuousBatchingConfig
from transformers.cli.serving.utils import build_response_parser

BLOCK_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
"""Field of continuous batching's configuration for the tokens per block: ``block_size`` in 5.17, then ``page_size``."""


def cache_tokens(cache: Any, limit: int) -> int:
    """Return how many tokens of one request, at most ``limit``, an empty KV cache of continuous batching can hold."""
    if hasattr(cache, "cache_allocators"):  # from 5.18 on: the attention types' allocators share one pool of sectors

        def fits(tokens: int) -> bool:
            sectors = 0
            for allocator in cache.cache_allocators.values():
                blocks = allocator.needs_new_blocks("", 0, tokens)
                sectors += -(-blocks // allocator.blocks_per_sector)
            return bool(sectors <= cache.num_sectors)
    else:  # 5.17

        def fits(tokens: int) -> bool:
            # The scheduler may ask for one block more than the tokens fill.
            return bool(cache.blocks_needed((tokens + 1) // cache.block_size + 1, 0) <= cache.num_blocks)

    return bisect.bisect_left(range(1, limit + 1), True, key=lambda tokens: not fits(tokens))


def response_parser(tokenizer: Any, model: Any, prompt: Sequence[int], tools: Any) -> Any:
    """Make what takes an answer of ``model`` apart; None if its form is not known."""
    given = {"tools": tools} if "tools" in inspect.signature(build_response_parser).parameters else {}  # from 5.19 on
    return build_response_parser(tokenizer, model, prompt, **given)
