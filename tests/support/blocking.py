"""Forwards that a test holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from web import TIMEOUT


class Computes(Protocol):
    """Calls ``before_forward`` before each forward."""

    before_forward: Callable[[], object]


@contextlib.contextmanager
def blocked(computes: Computes) -> Iterator[threading.Event]:
    """Forwards wait until the block ends; the event says that one does. What a test sets in the block stays."""
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert release.wait(TIMEOUT)

    computes.before_forward = wait
    try:
        yield entered
    finally:
        if computes.before_forward is wait:
            computes.before_forward = lambda: None
        release.set()
