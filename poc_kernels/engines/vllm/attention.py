"""Attention of whole sequences, causal and without a cache: what the layers of a twin compute in place of vLLM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

QUERIES_AT_ONCE = 256
"""Rows of a mask, or of scores, that exist at a time: their memory grows with the length, not with its square."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an attention layer does besides causal softmax.

    Args:
        scale: factor of the scores.
        window: positions that a query sees, its own included; None for all before it.
        chunk: positions are in chunks of this many, and a query sees none of another chunk; None for one chunk.
        soft_cap: bound that scores approach by tanh; 0 for none.
        sinks: [heads], a score per head that takes weight and gives nothing; None for none.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    soft_cap: float = 0.0
    sinks: Tensor | None = None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """Compute attention of sequences that begin at position 0.

    Args:
        query: [batch, heads, length, size].
        key: [batch, kv_heads, length, size], where kv_heads divides heads.
        value: [batch, kv_heads, length, value_size].
        rules: what the layer does besides causal softmax.

    Returns:
        [batch, heads, length, value_size], in the dtype of ``value``.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    seen = min(bound for bound in (rules.window, rules.chunk, length) if bound is not None)
    if seen == length and not rules.soft_cap and rules.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rules.scale, enable_gqa=groups > 1
        )
    if groups > 1:  # with a mask, fast kernels of torch take no groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attend = _attend_by_scores if rules.soft_cap or rules.sinks is not None else _attend
    parts = [
        attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], _mask(rows, seen, rules, query.device), rules)
        for rows, seen in _blocks(length, rules)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def latent_attention(layer: Any, query: Tensor, latent: Tensor, rotated: Tensor, rules: Rules) -> Tensor:
    """Compute attention whose keys and values are kept as one latent vector per position (MLA).

    Args:
        layer: vLLM's ``MLAAttention``, for its weights and sizes.
        query: [batch, length, heads, nope_size + rope_size].
        latent: [batch, length, rank], what keys and values are expanded from, after its norm.
        rotated: [batch, length, rope_size], the part of the keys that has positions, of all heads.
        rules: what the layer does besides causal softmax.

    Returns:
        [batch, length, heads, value_size].
    """
    batch, length, heads, _ = query.shape
    nope, value_size = layer.qk_nope_head_dim, layer.v_head_dim
    query = query.transpose(1, 2)
    if layer.kv_b_proj.weight.numel() > 0:
        expanded = layer.kv_b_proj(latent.reshape(batch * length, -1))[0]
        key, value = expanded.view(batch, length, heads, nope + value_size).split([nope, value_size], dim=-1)
        key = torch.cat([key, rotated.unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1)
        return causal_attention(query, key.transpose(1, 2), value.transpose(1, 2), rules).transpose(1, 2)
    # The projection was absorbed when the weights were loaded, and given up: attention in the latent space.
    plain, turned = query[..., :nope], query[..., nope:]
    query = torch.cat([plain @ layer.W_UK_T, turned], dim=-1)  # [batch, heads, length, rank + rope_size]
    latent = latent.unsqueeze(1)
    key = torch.cat([latent, rotated.unsqueeze(1)], dim=-1)
    states: Tensor = causal_attention(query, key, latent, rules) @ layer.W_UV
    return states.transpose(1, 2)


def _blocks(length: int, rules: Rules) -> Iterator[tuple[slice, slice]]:
    """Divide the queries, and name for each block the keys that it may see."""
    for begin in range(0, length, QUERIES_AT_ONCE):
        first = 0
        if rules.window is not None:
            first = max(first, begin - rules.window + 1)
        if rules.chunk is not None:
            first = max(first, begin // rules.chunk * rules.chunk)
        end = min(begin + QUERIES_AT_ONCE, length)
        yield slice(begin, end), slice(first, end)


def _mask(rows: slice, seen: slice, rules: Rules, device: torch.device) -> Tensor:
    """Return which keys each query of a block sees: bool [queries, keys]."""
    query = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    key = torch.arange(seen.start, seen.stop, device=device)
    mask = key <= query
    if rules.window is not None:
        mask &= query - key < rules.window
    if rules.chunk is not None:
        mask &= query // rules.chunk == key // rules.chunk
    return mask


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: Rules) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rules.scale)


def _attend_by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: Rules) -> Tensor:
    """Attend as torch's own attention does not: scores are capped, or there are sinks."""
    scores = (query @ key.transpose(2, 3)).float() * rules.scale
    if rules.soft_cap:
        scores = torch.tanh(scores / rules.soft_cap) * rules.soft_cap
    scores = scores.masked_fill(~mask, float("-inf"))
    if rules.sinks is not None:
        sinks = rules.sinks.float().view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(value.dtype) @ value
