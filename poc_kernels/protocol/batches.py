"""What batches of every form are checked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .checks import MAX_NONCE, check_distinct, check_int, check_ints, check_list, check_text
from .config import MAX_NODE_ID, UNSET


class NodesBatch(Protocol):
    """Nonces of one node in one round."""

    @property
    def public_key(self) -> str: ...
    @property
    def block_hash(self) -> str: ...
    @property
    def block_height(self) -> int: ...
    @property
    def node_id(self) -> int: ...
    @property
    def nonces(self) -> list[int]: ...


def check_batch(batch: NodesBatch, name: str, outcomes: Sequence[object], one: str) -> None:
    """Check the fields that batches of every form have; what the outcomes are is for the form to check.

    Args:
        batch: its node, round and nonces are checked.
        name, outcomes: the list of outcomes: empty, or with one per nonce.
        one: what the list has for each nonce, as an error says it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """
    check_text("public_key", batch.public_key)
    check_text("block_hash", batch.block_hash)
    check_int("block_height", batch.block_height, 0, MAX_NONCE)
    check_int("node_id", batch.node_id, UNSET, MAX_NODE_ID)
    check_list("nonces", batch.nonces)
    check_list(name, outcomes)
    check_ints("nonces", batch.nonces, 0, MAX_NONCE)
    check_distinct("nonces", batch.nonces)
    if len(outcomes) not in (0, len(batch.nonces)):
        raise ValueError(
            f"{name} must be empty or have {one} for each of the {len(batch.nonces)} nonces, got {len(outcomes)}"
        )
