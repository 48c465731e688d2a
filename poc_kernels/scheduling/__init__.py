"""Validation and inference co-located on one device: two priorities, slices of forwards, and who computes when.

It knows no server, no engine and no protocol: another serving stack can use `PriorityLanes`, `Turns` and
`RepeatedForward` as they are.
"""

from .awake import AwakeClock
from .lanes import InFlight, PriorityLanes, threads_have_priorities
from .repeated import RepeatedForward
from .slices import Pause, SlicedForward, Slices
from .turns import Pacing, Turn, Turns, TurnsClosed

__all__ = [
    "AwakeClock",
    "InFlight",
    "Pacing",
    "Pause",
    "PriorityLanes",
    "RepeatedForward",
    "SlicedForward",
    "Slices",
    "Turn",
    "Turns",
    "TurnsClosed",
    "threads_have_priorities",
]
