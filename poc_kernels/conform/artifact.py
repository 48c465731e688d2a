"""Artifacts as the wire has them: base64 of float16 numbers, little endian; how far apart they are, and forged ones."""

from __future__ import annotations

import base64
import math
import random

import numpy as np
from numpy.typing import NDArray

from .outcome import FailedError

NORM_TOLERANCE = 1e-2


def encode(vector: NDArray[np.floating]) -> str:
    """Return the text of a vector [k]."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def decode(text: str, k_dim: int) -> NDArray[np.float64]:
    """Return the vector [k_dim] of a text.

    Raises:
        FailedError: it is none, or not a unit vector of finite numbers.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FailedError(f"not base64 in the standard alphabet with its padding: {text[:40]!r} ({error})") from error
    if len(content) != 2 * k_dim:
        raise FailedError(f"an artifact has {len(content)} bytes, {k_dim} float16 are {2 * k_dim}")
    vector = np.frombuffer(content, "<f2").astype(np.float64)
    if not np.isfinite(vector).all():
        raise FailedError(f"an artifact has a NaN or an infinity: {text[:40]!r}")
    norm = float(np.linalg.norm(vector))
    if abs(norm - 1) > NORM_TOLERANCE:
        raise FailedError(f"an artifact has norm {norm:.4f}, not 1 within {NORM_TOLERANCE}")
    return vector


def distance(one: str, other: str, k_dim: int) -> float:
    """Return the L2 distance of two artifacts."""
    return 0.0 if one == other else float(np.linalg.norm(decode(one, k_dim) - decode(other, k_dim)))


def random_artifact(seed: str, k_dim: int) -> str:
    """Return an artifact that nobody computed."""
    drawn = random.Random(seed)
    vector = np.array([drawn.gauss(0, 1) for _ in range(k_dim)])
    return encode(vector / np.linalg.norm(vector))


def moved(text: str, k_dim: int, by: float) -> str:
    """Return a unit vector at the distance ``by``, in (0, 2), of the artifact ``text``."""
    vector = decode(text, k_dim)
    vector /= np.linalg.norm(vector)
    across = np.eye(k_dim)[int(np.abs(vector).argmin())]
    across = across - (across @ vector) * vector
    angle = 2 * math.asin(by / 2)
    return encode(math.cos(angle) * vector + math.sin(angle) * across / np.linalg.norm(across))


def scaled(text: str, k_dim: int, factor: float) -> str:
    """Return the artifact ``text`` with another norm."""
    return encode(factor * decode(text, k_dim))


def with_first(text: str, k_dim: int, value: float) -> str:
    """Return the artifact ``text`` with another first number."""
    vector = decode(text, k_dim)
    vector[0] = value
    return encode(vector)
