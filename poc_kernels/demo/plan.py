"""What the demonstration plays: blocks, keys, durations and amounts."""

from __future__ import annotations

from dataclasses import dataclass

EARLIER_HASH = "0x00000000000000000001a2b3c4d5e6f7"
BLOCK_HASH = "0x0000000000000000000263f1c9e3a7d5"
UNKNOWN_HASH = "0x00000000000000000000ffffffffffff"
EARLIER_HEIGHT = 1_000_000
BLOCK_HEIGHT = EARLIER_HEIGHT + 1
PUBLIC_KEY = "demo-node"
OTHER_KEY = "another-node"
FRAUD_THRESHOLD = 0.01


@dataclass(frozen=True)
class Plan:
    """Durations and amounts.

    Args:
        warm_up_seconds: how long users chat before anything is measured.
        idle_seconds: how long users chat before the rounds, and again after them.
        generate_seconds: minimum time in GENERATING for fingerprints, which continues until there are ``fingerprints``.
        older_seconds: minimum time in GENERATING for distances, which continues until ``proofs`` are found.
        max_generate_seconds: maximum time in GENERATING, in each round.
        validate_seconds: how long batches of honest proofs, and of each survey, are sent; at least two are.
        fingerprints: minimum number of fingerprints to compute.
        compared: fingerprints that are recomputed, and as many more that are validated.
        proofs: minimum number of nonces to find whose distance is valid; at least one batch.
        earlier: nonces checked in the round of the previous block, the best of which are replayed.
        calibrate: nonces recomputed to set r_target, where geometry does not.
        survey: nonces recomputed for the distribution of distances.
        batch_nonces: nonces per batch of a validator, and nonces that each cheat claims.
        rows: nonces per forward; with fewer, tokens of chats wait for less time.
        seq_len: positions of a nonce's inputs.
        valid_share: share of nonces whose distance is to be valid; sets r_target.
        users: chats at the same time.
        max_tokens: maximum number of tokens of an answer.
    """

    warm_up_seconds: float = 4.0
    idle_seconds: float = 6.0
    generate_seconds: float = 12.0
    older_seconds: float = 2.0
    max_generate_seconds: float = 300.0
    validate_seconds: float = 12.0
    fingerprints: int = 128
    compared: int = 320
    proofs: int = 64
    earlier: int = 160
    calibrate: int = 96
    survey: int = 256
    batch_nonces: int = 32
    rows: int = 16
    seq_len: int = 64
    valid_share: float = 0.2
    users: int = 3
    max_tokens: int = 32
