"""Random projection layers for proof of compute: x + x @ P, with P drawn from a seed and never stored."""

from .backends import use_backend
from .definition import DEFINITION, seed_from_block_hash, seed_tensor
from .ops import projection_entries, projection_matrix, random_projection, residual_projection
from .projection import RandomProjection

__version__ = "0.1.0"

__all__ = [
    "DEFINITION",
    "RandomProjection",
    "projection_entries",
    "projection_matrix",
    "random_projection",
    "residual_projection",
    "seed_from_block_hash",
    "seed_tensor",
    "use_backend",
]
