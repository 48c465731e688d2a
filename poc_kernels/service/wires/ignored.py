"""The keys of a body that mean nothing here, as the status tells them."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from ..outbox import printable

_MAX_IGNORED = 50
_MAX_NAME = 64


def ignored_keys(names: Collection[str]) -> list[str]:
    """Return the first 50 of the names, and how many more there are."""
    more = len(names) - _MAX_IGNORED
    shown = [printable(name[:_MAX_NAME]) for name in itertools.islice(names, _MAX_IGNORED)]
    return [*shown, f"and {more} more"] if more > 0 else shown
