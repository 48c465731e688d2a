"""What transformers' continuous batching is configured with: the KV cache, the steps, the sampling."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from .compat import BLOCK_SIZE

logger = logging.getLogger("poc_kernels")

# A CPU's memory is not continuous batching's alone, and short prefill steps keep turns short.
_CPU_DEFAULTS = {BLOCK_SIZE: 32, "num_blocks": 512, "max_batch_tokens": 1024, "max_memory_percent": 0.8}
# Proofs need the rest of the free memory; and there are logits of that many requests in a buffer.
_ACCELERATOR_DEFAULTS = {"max_memory_percent": 0.6, "max_requests_per_batch": 256}


_MAX_LAYER_TYPES = 4  # each has blocks of its own
_TRIAL_BATCH_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class InferenceLimits:
    """Bounds of what is served.

    Attributes:
        max_new_tokens: tokens that a request may generate at most, and what it gets if it asks for no number.
        kv_block_size: tokens per block of the KV cache.
        kv_blocks: blocks in the KV cache.
        max_batch_tokens: tokens in one step of the model; longer prompts take several steps.
        kv_memory: share, in (0, 1], of the free memory that the KV cache may take.
        stall_seconds: continuous batching is rebuilt when no step ends for this long while requests are in flight.

    The KV cache defaults to 512 blocks of 32 tokens on a CPU, elsewhere to what fits into 0.6 of the free memory.
    """

    max_new_tokens: int
    stall_seconds: float
    kv_block_size: int | None = None
    kv_blocks: int | None = None
    max_batch_tokens: int | None = None
    kv_memory: float | None = None


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")


def max_positions(config: Any) -> int:
    """Return how many tokens a sequence of a model with this configuration can have; 2**20 where it sets no limit."""
    text_config = config.get_text_config()
    found = (getattr(text_config, name, None) for name in _POSITIONS)
    return next((value for value in found if isinstance(value, int) and value > 0), 2**20)


def batched_positions(config: Any) -> int:
    """Return how many tokens a sequence can have beside others: `max_positions`, or less with LongRoPE.

    transformers takes LongRoPE's long factors for a whole step as soon as one sequence in it has more tokens than
    ``original_max_position_embeddings``: its neighbours' text would change.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # of all layers, or by their type
    original: list[int] = [
        one["original_max_position_embeddings"] for one in each if one.get("rope_type") == "longrope"
    ]
    return min([max_positions(config), *original])


_WITHOUT_EFFECT = (
    "cache_implementation",
    "dola_layers",
    "max_time",
    "num_beams",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "stop_strings",
    "token_healing",
)
"""Settings of a generation config for another search than one token after another, or for more than a model."""

_NOT_ASKED_FOR = ("max_length", "output_attentions", "output_hidden_states", "output_logits", "output_scores")


def generation_config(model: Any, tokenizer: Any, temperature: float | None) -> GenerationConfig:
    """Make the sampling of requests that do not say: as the model does, or with ``temperature``, greedy at 0.

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
    config.forced_eos_token_id = None  # an answer that its limit cuts off does not look complete
    if config.pad_token_id is None:
        config.pad_token_id = 0  # never used, but transformers would log that it chooses one for each request
    defaults = GenerationConfig()  # type: ignore[no-untyped-call]
    lost = [
        name for name in _WITHOUT_EFFECT if getattr(config, name, None) not in (None, 1, getattr(defaults, name, None))
    ]
    if lost:
        logger.warning("settings of the model's generation config have no effect", extra={"settings": lost})
    for name in (*_WITHOUT_EFFECT, *_NOT_ASKED_FOR):
        setattr(config, name, getattr(defaults, name, None))
    config.use_cache = False  # continuous batching has a cache of its own
    config.num_return_sequences = 1
    return config


def batching_config(limits: InferenceLimits, device_type: str) -> ContinuousBatchingConfig:
    """Make continuous batching's own settings, within ``limits``, for a device of that type."""
    settings: dict[str, Any] = dict(_CPU_DEFAULTS if device_type == "cpu" else _ACCELERATOR_DEFAULTS)
    given = {
        BLOCK_SIZE: limits.kv_block_size,
        "num_blocks": limits.kv_blocks,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_memory_percent": limits.kv_memory,
    }
    settings.update({key: value for key, value in given.items() if value is not None})
    # Not asynchronous: a step is over when its turn is.
    return ContinuousBatchingConfig(use_async_batching=False, **settings)


def given_tokens(config: ContinuousBatchingConfig) -> int | None:
    """Return how many tokens the KV cache is set to hold; None if that is left to continuous batching."""
    return None if config.num_blocks is None else config.num_blocks * getattr(config, BLOCK_SIZE)


def trial_batching_config(config: ContinuousBatchingConfig, *, tokens: int, requests: int) -> ContinuousBatchingConfig:
    """Change continuous batching's settings for a trial with that many tokens, in that many requests, at once.

    The cache has room for them and little more, and prompts are cut into several steps.
    """
    block_size = getattr(config, BLOCK_SIZE)
    blocks = tokens // block_size + 2 * requests
    return replace(
        config,
        num_blocks=_MAX_LAYER_TYPES * blocks,
        max_batch_tokens=min(config.max_batch_tokens or _TRIAL_BATCH_TOKENS, _TRIAL_BATCH_TOKENS),
    )
