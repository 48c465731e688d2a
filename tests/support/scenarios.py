"""What the scenarios of several threads share."""

from __future__ import annotations

import os
from collections.abc import Callable

from poc_kernels.scheduling import Pacing, Turns

THOROUGH = os.environ.get("POC_INTERLEAVINGS") == "all"
"""Whether to run larger scenarios, which take many minutes."""

Record = Callable[[str, object], None]
"""The type of pytest's ``record_property``."""

LONG = 1000.0
"""Seconds of virtual time that pass only if a wake-up is missing."""


MODES = {"paced": True, "free": False}
"""Whether slices are paced. By default a node paces them on a GPU, and on a CPU whose threads have no priorities."""


def turns_of(mode: str, share: float = 0.25, max_wait: float = LONG, linger: float = 0.0) -> Turns:
    """Make turns in which nobody waits for time to pass, unless the arguments say so."""
    return Turns(Pacing(share=share, max_wait_seconds=max_wait, linger_seconds=linger, paced=MODES[mode]))
