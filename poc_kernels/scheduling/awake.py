"""A clock for watchdogs, which stands still while this process does."""

from __future__ import annotations

import threading
import time

_PERIOD_SECONDS = 0.1
_MAX_GAP_SECONDS = 1.0


class AwakeClock:
    """Counts the seconds in which this process ran, not those in which it was stopped, frozen or suspended.

    Whoever reads it several times a second keeps it going; `start` has a thread do so. A gap of more than a second
    between two readings means that the process stood still: it counts as a tenth of a second. A watchdog on this clock
    never takes its own standing still for a stall of what it watches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._read = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self) -> float:
        """Return the seconds in which the process ran since the clock was made."""
        with self._lock:
            now = time.monotonic()
            gap, self._read = now - self._read, now
            self._seconds += gap if gap <= _MAX_GAP_SECONDS else _PERIOD_SECONDS
            return self._seconds

    def start(self) -> None:
        """Start a thread that keeps the clock going until `stop`."""
        self._thread = threading.Thread(target=self._keep_going, name="poc-clock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread of `start`, if there is one. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _keep_going(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            self.now()
