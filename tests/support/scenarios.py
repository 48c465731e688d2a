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


MODES: dict[str, dict[str, bool]] = {
    "exclusive": {"concurrent": False, "paced": True},
    "concurrent": {"concurrent": True, "paced": True},
    "free": {"concurrent": True, "paced": False},
}
"""How steps and slices share a device. A node is concurrent on a GPU and free on a processor."""


def turns_of(mode: str = "exclusive", share: float = 0.5, max_wait: float = LONG, linger: float = 0.0) -> Turns:
    """Turns in which nobody waits for time to pass, unless told to."""
    concurrent, paced = MODES[mode].values()
    pacing = Pacing(share=share, max_wait_seconds=max_wait, linger_seconds=linger, paced=paced)
    return Turns(pacing, concurrent=concurrent)
