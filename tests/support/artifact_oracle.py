"""Vectors and fingerprints of `IdentityEngine`, from their definitions: float64, and Python's integers. Slow."""

import base64
import hashlib

import numpy as np
import torch
from oracle import entry, philox, seed_of
from poc2_oracle import murmur, normal, seed32


def decoded(text):
    return np.frombuffer(base64.b64decode(text), "<f2").astype(float)


def to_dtype(x, dtype):
    return torch.tensor(x).to(dtype).double().numpy()


def normed(states, dtype):
    """The norm of the engine, in its dtype."""
    return to_dtype(states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-6), dtype)


# ---- vectors ----


def stronger_inputs(block, key, nonce, seq_len, dim):
    seeds = seed_words(f"{block}_{key}_nonce{nonce}")
    count = seq_len * dim
    segment = -(-count // 8)
    parts = [normal(seed, min(segment, count - j * segment)) for j, seed in enumerate(seeds) if j * segment < count]
    return np.concatenate(parts).reshape(seq_len, dim)


def seed_words(text):
    """The eight words of the digest."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return [int(digest[at : at + 8], 16) for at in range(0, 64, 8)]


def reflected(x, axis):
    return x - 2 * (x @ axis)[..., None] * axis


def unit(x):
    return x / np.linalg.norm(x)


def vector(x, block, key, nonce, *, layers, k, dtype=torch.float32):
    """The vector of inputs x [seq_len, dim]."""
    states = to_dtype(x, dtype)
    for layer in range(layers):
        states = reflected(states, unit(normal(seed32(f"{block}_layer_{layer}_householder"), x.shape[1])))
    h = unit(normed(states, dtype)[-1])
    seed = seed32(f"{block}_{key}_nonce_{nonce}_pick_{k}")
    smallest = sorted(range(len(h)), key=lambda d: murmur(d, seed))[:k]
    y = h[[*sorted(smallest[:-1]), smallest[-1]]]
    for place in range(k - 1):
        y = reflected(y, unit(normal(seed32(f"{block}_{key}_nonce_{nonce}_haar_hh_{k}_{place}"), k)))
    return unit(y)


# ---- fingerprints ----


def sign(seed, layer, place):
    words = philox([place >> 7, layer, 0, 0], [seed % 2**32, seed >> 32])
    bit = place & 127
    return 1 - 2 * (words[bit >> 5] >> (bit & 31) & 1)


def flips(block, key, nonce, layer, dim):
    seed = seed_of(f"{block}_{key}_nonce_{nonce}_flips")
    return np.array([sign(seed, layer, d) for d in range(dim)])


def mix_signs(block, key, nonce, pairs):
    seed = seed_of(f"{block}_{key}_nonce_{nonce}_mix")
    return np.array([sign(seed, 0, j) for j in range(pairs)])


def mix(x, block, key, nonce, *, layers, dtype=torch.float32):
    """The mix of inputs x [seq_len, dim]."""
    states = to_dtype(x, dtype)
    for layer in range(layers):
        states = states * flips(block, key, nonce, layer, x.shape[1])
    h = normed(states, dtype)
    pairs = [(t, t + 1) for t in range(8, len(h), 2) if t + 1 < len(h)]
    signs = mix_signs(block, key, nonce, len(pairs))
    return sum(e * (h[first] - h[second]) for e, (first, second) in zip(signs, pairs, strict=True))


def fingerprint(x, block, key, nonce, *, layers, dtype=torch.float32):
    u = mix(x, block, key, nonce, layers=layers, dtype=dtype)
    seed = seed_of(block)
    return unit(np.array([sum(u[k] * entry(seed, 2, k, n) for k in range(len(u))) for n in range(64)]))
