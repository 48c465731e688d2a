"""What each proof form reads of hidden states: its own code, apart from the forward, so that states are read often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poc_kernels import seed_from_block_hash, seed_tensor
from poc_kernels.protocol import PoCConfig
from poc_kernels.protocol.artifacts.encoding import decode
from poc_kernels.protocol.artifacts.tensors import texts
from poc_kernels.protocol.distances.distance import distances, permutations, target
from poc_kernels.protocol.engine import Engine
from poc_kernels.protocol.fingerprint.form import FINGERPRINT
from poc_kernels.protocol.fingerprint.mix import FIRST_POSITION, mixed, pairs_of, read
from poc_kernels.protocol.fingerprint.signs import mix_seed
from poc_kernels.protocol.prover import Row
from poc_kernels.protocol.vectors.form import VECTORS
from poc_kernels.protocol.vectors.vector import picks, rotation_axes, vectors

Array = NDArray[np.float64]


class Read(NamedTuple):
    """What was read of some nonces.

    Attributes:
        outcomes: as a prover gives them, one per nonce.
        values: float32 [nonces, numbers of an outcome]; NaN where there is none.
        direction: what the form looks at, [nonces, hidden_size].
    """

    outcomes: list[Any]
    values: Array
    direction: Tensor


class Prepared(NamedTuple):
    """What all reads of some hidden states share.

    Attributes:
        material: what is read of, one row per nonce.
        hidden: the states of the last position that is read, [nonces, hidden_size].
    """

    material: Tensor
    hidden: Tensor

    def first(self, count: int) -> Prepared:
        """Return that of the first nonces."""
        return Prepared(self.material[:count], self.hidden[:count])


class Reader(Protocol):
    """Reads hidden states as one form does."""

    positions: slice
    """Those whose states it reads."""

    def prepare(self, engine: Engine, states: Tensor) -> Prepared:
        """Compute from states [nonces, positions, hidden_size], which ``engine`` gave, what all reads of them share."""

    def draw(self, rows: Sequence[Row]) -> Any:
        """Draw what is seeded: it depends on rows, not on states."""

    def read(self, drawn: Any, prepared: Prepared) -> Read:
        """Compute outcomes."""


class ArtifactReader(Reader, Protocol):
    """Reads artifacts."""

    def doubt(self, drawn: Any, guessed: Read, spread: Tensor) -> Array:
        """Compute how little a prover can rely on what was read of a guess: a number per nonce.

        Args:
            drawn: what is seeded.
            guessed: what was read.
            spread: variance of the last hidden state, [hidden_size].
        """


def _artifacts(units: Tensor, direction: Tensor) -> Read:
    outcomes = texts(units)
    values, good = decode(outcomes, units.shape[1])
    return Read(outcomes, np.where(good[:, None], values, np.nan), direction)


class DistanceReader:
    """Distances of permuted logits to the block's target."""

    positions = slice(-1, None)

    def __init__(self, config: PoCConfig, engine: Engine) -> None:
        self._block_hash, self._device, self._vocab = config.block_hash, engine.device, engine.vocab_size
        self._target = target(self._block_hash, self._vocab, self._device)

    def prepare(self, engine: Engine, states: Tensor) -> Prepared:
        """Compute logits of the last position."""
        hidden = states[:, -1].contiguous()
        return Prepared(engine.compute_logits(hidden), hidden)

    def draw(self, rows: Sequence[Row]) -> Tensor:
        """Draw permutations."""
        return torch.cat(
            [permutations(self._block_hash, row.public_key, [row.nonce], self._vocab, self._device) for row in rows]
        )

    def read(self, drawn: Tensor, prepared: Prepared) -> Read:
        """Compute distances."""
        computed = distances(prepared.material, drawn, self._target)
        return Read(computed.tolist(), computed.double().unsqueeze(1).cpu().numpy(), prepared.hidden)


class VectorReader:
    """Picked coordinates of the last hidden state, rotated."""

    positions = slice(-1, None)

    def __init__(self, config: PoCConfig, engine: Engine) -> None:
        self._block_hash, self._device, self._dim = config.block_hash, engine.device, engine.hidden_size
        self._k = VECTORS.k_dim_of(config)

    def prepare(self, engine: Engine, states: Tensor) -> Prepared:
        """Take the states of the last position."""
        return Prepared(states[:, -1], states[:, -1])

    def draw(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Draw picks [nonces, k] and axes of rotations."""
        picked = picks(self._block_hash, rows, self._dim, self._k, self._device)
        return picked, rotation_axes(self._block_hash, rows, self._k, self._device)

    def read(self, drawn: tuple[Tensor, Tensor], prepared: Prepared) -> Read:
        """Compute vectors."""
        return _artifacts(vectors(prepared.material, *drawn), prepared.hidden)

    def doubt(self, drawn: tuple[Tensor, Tensor], guessed: Read, spread: Tensor) -> Array:
        """Compare the variance of picked coordinates with their guessed energy."""
        picked, _ = drawn
        energy = guessed.direction.float().square().gather(1, picked).sum(1)
        return (spread[picked].sum(1) / energy).double().cpu().numpy()


class FingerprintReader:
    """A mix of positions with seeded signs, projected."""

    def __init__(self, config: PoCConfig, engine: Engine) -> None:
        self._block_hash, self._device = config.block_hash, engine.device
        self._seed = seed_tensor(seed_from_block_hash(config.block_hash), engine.device)
        self.positions = slice(FIRST_POSITION, FIRST_POSITION + 2 * pairs_of(config.seq_len))

    def prepare(self, engine: Engine, states: Tensor) -> Prepared:
        """Take the states of all positions that are mixed."""
        return Prepared(states, states[:, -1])

    def draw(self, rows: Sequence[Row]) -> list[int]:
        """Draw the mixes' seeds."""
        return [mix_seed(self._block_hash, *row) for row in rows]

    def read(self, drawn: list[int], prepared: Prepared) -> Read:
        """Compute fingerprints."""
        mix = mixed(prepared.material, drawn)
        return _artifacts(read(mix, self._seed), mix)

    def doubt(self, drawn: list[int], guessed: Read, spread: Tensor) -> Array:
        """Prefer where the guessed mix is large, against the noise of what is not known."""
        return -guessed.direction.double().norm(dim=1).cpu().numpy()


READERS: dict[str, type[Any]] = {
    "distances": DistanceReader,
    VECTORS.name: VectorReader,
    FINGERPRINT.name: FingerprintReader,
}
