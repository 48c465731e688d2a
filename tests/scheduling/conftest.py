"""Stand-ins for threads and time."""

import pytest
from interleaving import Instruments

from poc_kernels.scheduling import turns


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """A simulated clock, and threads that run one at a time, in `turns`."""
    made = Instruments()
    made.patch(monkeypatch, turns)
    return made
