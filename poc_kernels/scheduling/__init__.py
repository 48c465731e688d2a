"""Validation beside inference on one device: two priorities, slices, and who computes when.

It knows neither a server nor a protocol: another serving stack can use `PriorityLanes`, `Turns` and `SlicedForward`
as they are.
"""

from .lanes import InFlight, PriorityLanes, threads_have_priorities
from .slices import Pause, SlicedForward, Slices
from .turns import Pacing, Turn, Turns, TurnsClosed

__all__ = [
    "InFlight",
    "Pacing",
    "Pause",
    "PriorityLanes",
    "SlicedForward",
    "Slices",
    "Turn",
    "Turns",
    "TurnsClosed",
    "threads_have_priorities",
]
