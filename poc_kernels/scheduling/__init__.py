"""Validation beside inference on one device: two priorities, slices, and who computes when.

It knows neither a server nor a protocol: another serving stack can use `StreamPartition`, `Turns` and `SlicedForward`
as they are.
"""

from .slices import Pause, SlicedForward, Slices
from .streams import InFlight, StreamPartition, threads_have_priorities
from .turns import Pacing, Turn, Turns, TurnsClosed

__all__ = [
    "InFlight",
    "Pacing",
    "Pause",
    "SlicedForward",
    "Slices",
    "StreamPartition",
    "Turn",
    "Turns",
    "TurnsClosed",
    "threads_have_priorities",
]
