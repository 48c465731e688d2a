"""What transformers' continuous batching ("CB") is configured with."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

# Where nothing is said. A CPU's memory is not CB's alone, and short prefill steps keep turns short.
_CPU_DEFAULTS = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 1024, "max_memory_percent": 0.8}
# Proofs need the rest of the free memory.
_ACCELERATOR_DEFAULTS = {"max_memory_percent": 0.6}


@dataclass(frozen=True)
class InferenceLimits:
    """Bounds of what is served.

    Attributes:
        max_new_tokens: most tokens a request may generate, and what it gets if it asks for no number.
        cb_block_size: tokens in a block of the KV cache.
        cb_num_blocks: blocks in the KV cache.
        cb_max_batch_tokens: tokens in one step of the model; longer prompts take several.
        cb_max_memory_percent: share, in (0, 1], of the free memory that the KV cache may have.
        stall_seconds: CB is rebuilt when no step ends for so long while requests are in flight.

    The KV cache's settings default to 512 blocks of 32 tokens on a CPU, elsewhere to what fits 0.6 of the free memory.
    """

    max_new_tokens: int = 1024
    cb_block_size: int | None = None
    cb_num_blocks: int | None = None
    cb_max_batch_tokens: int | None = None
    cb_max_memory_percent: float | None = None
    stall_seconds: float = 60.0


def generation_config(model: Any, tokenizer: Any, temperature: float | None) -> GenerationConfig:
    """How all requests are sampled: as the model says, or with ``temperature``, greedily at 0.

    Raises:
        ValueError: a negative temperature.
    """
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if temperature == 0:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = None
    elif temperature is not None:
        config.do_sample = True
        config.temperature = temperature
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    config.use_cache = False  # CB has its own
    config.num_return_sequences = 1
    return config


def batching_config(limits: InferenceLimits, device_type: str) -> ContinuousBatchingConfig:
    """CB's own settings, within ``limits``, for a device of that type."""
    # Older versions call a page a block.
    fields = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page_size = "page_size" if "page_size" in fields else "block_size"
    given = {
        "page_size": limits.cb_block_size,
        "num_blocks": limits.cb_num_blocks,
        "max_batch_tokens": limits.cb_max_batch_tokens,
        "max_memory_percent": limits.cb_max_memory_percent,
    }
    settings: dict[str, Any] = dict(_CPU_DEFAULTS if device_type == "cpu" else _ACCELERATOR_DEFAULTS)
    settings.update({key: value for key, value in given.items() if value is not None})
    if "page_size" in settings:
        settings[page_size] = settings.pop("page_size")
    # Not asynchronous: a step is over when its turn is.
    return ContinuousBatchingConfig(use_async_batching=False, **settings)
