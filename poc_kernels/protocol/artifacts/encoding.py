"""Artifacts as text: base64, in the standard alphabet and padded, of float16 numbers, little endian."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def encode(vector: NDArray[np.float16]) -> str:
    """Return the text of a vector float16 [k]."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def decode(texts: Sequence[str | None], k: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the vectors of texts, [len(texts), k], and which of them are vectors of k finite numbers, [len(texts)].

    Where one is none (no text, not base64, another length, a NaN or an infinity), its row is all zeros.
    """
    parts = [_bytes(text, 2 * k) for text in texts]
    raw = b"".join(bytes(2 * k) if part is None else part for part in parts)
    vectors = np.frombuffer(raw, "<f2").reshape(len(texts), k).astype(np.float32)
    good = np.array([part is not None for part in parts], dtype=np.bool_) & np.isfinite(vectors).all(1)
    vectors[~good] = 0
    return vectors, good


def bounded(text: str, k: int) -> str:
    """Return the text, or an empty one where its length or alphabet alone says that it is no vector of k numbers."""
    return text if len(text) == _characters(2 * k) and text.isascii() else ""


def _characters(length: int) -> int:
    return 4 * ((length + 2) // 3)


def _bytes(text: str | None, length: int) -> bytes | None:
    if text is None or len(text) != _characters(length):
        return None
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError:  # characters of no alphabet, or a wrong padding
        return None
    return found if len(found) == length else None
