"""Phases 1 to 5 written from the text of the protocol in Python integers and float64: slow, and independent."""

import hashlib
import math
import struct

import numpy as np

_MASK = 0xFFFFFFFF


def seed32(text):
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:8], 16)


def _rotate(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def murmur(key, seed):
    """MurmurHash3_x86_32 of the 4-byte key, without the xor of the length."""
    k = _rotate(key * 0xCC9E2D51 & _MASK, 15) * 0x1B873593 & _MASK
    h = (_rotate(seed ^ k, 13) * 5 + 0xE6546B64) & _MASK
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK
    return h ^ h >> 16


def _float32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def normal(seed, n):
    half = math.ceil(n / 2)
    u = [_float32(murmur(i, seed)) / 2**32 for i in range(2 * half)]
    radius = [math.sqrt(-2 * math.log(max(x, 1e-10))) for x in u[:half]]
    cosines = [r * math.cos(2 * math.pi * x) for r, x in zip(radius, u[half:], strict=True)]
    sines = [r * math.sin(2 * math.pi * x) for r, x in zip(radius, u[half:], strict=True)]
    return np.array((cosines + sines)[:n])


def inputs(block_hash, public_key, nonce, seq_len, dim):
    return normal(seed32(f"{block_hash}_{public_key}_nonce{nonce}"), seq_len * dim).reshape(seq_len, dim)


def permutation(block_hash, public_key, nonce, vocab):
    seed = seed32(f"{block_hash}_{public_key}_nonce_{nonce}_permutations")
    return sorted(range(vocab), key=lambda i: murmur(i, seed))


def target(block_hash, vocab):
    direction = normal(seed32(f"{block_hash}_target"), vocab)
    return direction / np.linalg.norm(direction)


def distance(logits, block_hash, public_key, nonce):
    permuted = np.asarray(logits, dtype=np.float64)[permutation(block_hash, public_key, nonce, len(logits))]
    return float(np.linalg.norm(permuted / np.linalg.norm(permuted) - target(block_hash, len(logits))))
