"""The configuration of a round as one node sees it, and which nonces that node tries."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .checks import MAX_NONCE, check_bool, check_float, check_int, check_probability, check_text, check_url

UNSET = -1
"""node_id and node_count of a node that was not told its place: it validates, and cannot generate."""

MAX_BATCH_SIZE = 4096
MAX_SEQ_LEN = 2**20
_MAX_NODES = 2**31
MAX_K_DIM = 256
MAX_NODE_ID = 2**62
"""So that nonces stay in [0, 2**63)."""


@dataclass(frozen=True)
class PoCConfig:
    """A round as one node sees it.

    Args:
        block_hash: the block that seeds inputs, permutations, target and projections.
        block_height: its height, carried into every batch.
        public_key: the node's key; its nonces' inputs depend on it.
        r_target: a positive number; in a round of distances, a nonce is valid if its distance, in [0, 2], is below it.
            None in rounds of forms that select nothing.
        fraud_threshold: a batch is fraud if an honest node sends one like it with a probability below this.
        node_id, node_count: this node is number node_id of node_count (of its group), whether a network counts from 0
            or from 1; `UNSET` both for a validator. At most 2**31 nodes over all groups.
        batch_size: rows of every forward, whatever the number of nonces in it.
        seq_len: positions of every input.
        callback_url: where proofs and verdicts are posted, http or https, without a fragment. ``/generated`` and
            ``/validated`` are added to its path, before its query.
        use_random_projection: the projections before and after the model; off, neither is computed.
        group_id, n_groups: the node's group, where a network numbers nodes by group.
        proof: name of the proof form. Which there are, and which settings each takes, the forms and provers say.
        k_dim: entries of an artifact, in forms that have artifacts; None for the form's own number.
        stronger_rng: inputs are drawn under eight seeds per nonce instead of one, in forms that know both.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    block_hash: str
    block_height: int
    public_key: str
    r_target: float | None = None
    fraud_threshold: float = 0.01
    node_id: int = 0
    node_count: int = 1
    batch_size: int = 32
    seq_len: int = 256
    callback_url: str | None = field(default=None, repr=False)  # it can hold secrets
    use_random_projection: bool = False
    group_id: int = 0
    n_groups: int = 1
    proof: str = "distances"
    k_dim: int | None = None
    stronger_rng: bool = False

    def __post_init__(self) -> None:
        check_text("block_hash", self.block_hash)
        check_int("block_height", self.block_height, 0, MAX_NONCE)
        check_text("public_key", self.public_key)
        check_text("proof", self.proof)
        if self.r_target is not None:
            check_float("r_target", self.r_target)
            if not self.r_target > 0:
                raise ValueError(f"r_target must be positive, got {self.r_target}")
        check_probability("fraud_threshold", self.fraud_threshold)
        check_int("n_groups", self.n_groups, 1, _MAX_NODES)
        check_int("group_id", self.group_id, 0, self.n_groups - 1)
        check_int("node_count", self.node_count, UNSET, _MAX_NODES)
        check_int("node_id", self.node_id, UNSET, MAX_NODE_ID)
        if (self.node_id == UNSET) != (self.node_count == UNSET):
            raise ValueError(
                f"Node ID and node count must be set together: got node_id {self.node_id}, node_count {self.node_count}"
            )
        if self.node_count == 0:
            raise ValueError("node_count must be positive, or -1 with node_id for a validator, got 0")
        if self.node_count * self.n_groups > _MAX_NODES:
            raise ValueError(
                f"node_count * n_groups must be at most {_MAX_NODES}, so that nonces stay in [0, 2**63), "
                f"got {self.node_count} * {self.n_groups}"
            )
        check_int("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        check_int("seq_len", self.seq_len, 1, MAX_SEQ_LEN)
        if self.k_dim is not None:
            check_int("k_dim", self.k_dim, 1, MAX_K_DIM)
        check_bool("use_random_projection", self.use_random_projection)
        check_bool("stronger_rng", self.stronger_rng)
        if self.callback_url is not None:
            check_url("callback_url", self.callback_url)

    @property
    def positions(self) -> int:
        """Positions of every forward: rows that are missing are filled up."""
        return self.batch_size * self.seq_len

    def forward_key(self) -> Hashable:
        """Return what determines a forward, as the configuration says it; `ProofForm.forward_key` fills in defaults."""
        return (
            self.proof,
            self.block_hash,
            self.batch_size,
            self.seq_len,
            self.use_random_projection,
            self.k_dim,
            self.stronger_rng,
        )

    def nonce(self, index: int) -> int:
        """Return the nonce that this node tries as its ``index``-th, counted from 0.

        Raises:
            ValueError: node_id and node_count are not set.
        """
        if self.node_count == UNSET:
            raise ValueError(
                "Node ID and node count must be set to generate: "
                f"got node_id {self.node_id}, node_count {self.node_count}"
            )
        offset = self.node_id + self.group_id * self.node_count
        return offset + index * self.node_count * self.n_groups

    def nonces_up_to(self, last: int) -> int:
        """Return how many nonces this node has that are at most ``last``: those of the indices below that number.

        Raises:
            ValueError: as `nonce`.
        """
        return max(0, (last - self.nonce(0)) // (self.node_count * self.n_groups) + 1)
