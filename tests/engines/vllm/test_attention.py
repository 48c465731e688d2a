"""Attention of whole sequences against the plain definition in float64, and in its own blocks."""

import math

import pytest
import torch
from vllm_stand_ins import MLAAttention

from poc_kernels.engines.vllm import attention
from poc_kernels.engines.vllm.attention import Rules, causal_attention, latent_attention


def by_definition(query, key, value, rules):
    """Each query's weights over the positions that it sees, one after the other."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        for i in range(query.shape[2]):
            seen = [
                j
                for j in range(i + 1)
                if (rules.window is None or i - j < rules.window)
                and (rules.chunk is None or i // rules.chunk == j // rules.chunk)
            ]
            for row in range(query.shape[0]):
                scores = [float(query[row, head, i] @ key[row, head // groups, j]) * rules.scale for j in seen]
                if rules.soft_cap:
                    scores = [rules.soft_cap * math.tanh(score / rules.soft_cap) for score in scores]
                weights = [math.exp(score) for score in scores]
                total = sum(weights) + (0.0 if rules.sinks is None else math.exp(float(rules.sinks[head])))
                out[row, head, i] = sum(
                    weight / total * value[row, head // groups, j] for weight, j in zip(weights, seen, strict=True)
                )
    return out


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SINKS = random(4, seed=9)
RULES = {
    "plain": Rules(0.3),
    "window": Rules(0.3, window=5),
    "window of one": Rules(0.3, window=1),
    "window longer than the sequence": Rules(0.3, window=100),
    "chunks": Rules(0.3, chunk=4),
    "soft cap": Rules(0.3, soft_cap=0.5),
    "soft cap and window": Rules(0.3, window=5, soft_cap=0.5),
    "sinks": Rules(0.3, sinks=SINKS),
    "sinks and window": Rules(0.3, window=3, sinks=SINKS),
    "all": Rules(0.3, window=6, chunk=8, soft_cap=0.5, sinks=SINKS),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("at_once", [256, 7])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_definition(rules, at_once, kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", at_once)
    query, key, value = random(2, 4, 17, 8), random(2, kv_heads, 17, 8, seed=1), random(2, kv_heads, 17, 6, seed=2)
    expected = by_definition(query, key, value, rules)
    torch.testing.assert_close(causal_attention(query, key, value, rules).double(), expected, rtol=1e-5, atol=1e-6)


def test_blocks_see_no_more_keys_than_the_window():
    rules = Rules(1.0, window=10)
    spans = [(seen.stop - seen.start) for _, seen in attention._blocks(5000, rules)]
    assert max(spans) == attention.QUERIES_AT_ONCE + 9


@pytest.mark.parametrize("window", [None, 4])
def test_latent_attention_is_that_of_expanded_keys_and_values(window):
    layer = MLAAttention(heads=3, nope=8, rope=4, value=6, rank=16)
    query, latent, rotated = random(2, 9, 3, 12), random(2, 9, 16, seed=1), random(2, 9, 4, seed=2)
    rules = Rules(layer.scale, window=window)
    keys, values = (latent @ layer.kv_b_proj.weight.T).view(2, 9, 3, 14).split([8, 6], dim=-1)
    keys = torch.cat([keys, rotated.unsqueeze(2).expand(2, 9, 3, 4)], dim=-1)
    expected = by_definition(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), rules)

    expanded = latent_attention(layer, query, latent, rotated, rules)
    layer.absorb()
    absorbed = latent_attention(layer, query, latent, rotated, rules)

    for states in (expanded, absorbed):
        torch.testing.assert_close(states.transpose(1, 2).double(), expected, rtol=1e-4, atol=1e-6)
