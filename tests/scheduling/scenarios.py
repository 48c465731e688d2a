"""What scenarios of several threads share."""

from __future__ import annotations

import os
from collections.abc import Callable

from poc_kernels.scheduling import Pacing, Turns

THOROUGH = os.environ.get("POC_INTERLEAVINGS") == "all"
"""Larger scenarios, for many minutes."""

Record = Callable[[str, object], None]
"""The type of pytest's ``record_property``."""

LONG = 1000.0
"""Seconds of virtual time that pass only where a wake-up is missing."""


def turns_of(concurrent: bool = False) -> Turns:
    """Turns in which nobody waits for time to pass."""
    return Turns(Pacing(share=0.5, max_wait_seconds=LONG, linger_seconds=0.0), concurrent=concurrent)
