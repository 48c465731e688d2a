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


MODES = {"paced": True, "free": False}
"""Whether slices are paced. A node's are on a GPU; on a CPU they are free."""


def turns_of(mode: str, share: float = 0.25, max_wait: float = LONG, linger: float = 0.0) -> Turns:
    """Turns in which nobody waits for time to pass, unless told to."""
    return Turns(Pacing(share=share, max_wait_seconds=max_wait, linger_seconds=linger, paced=MODES[mode]))
