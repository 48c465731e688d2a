"""Shared memory of a block, with who touched each byte when.

It begins at SHARED_BASE: Hopper keeps the first KiB for itself, so that matrix descriptors see a base that is not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .findings import EmulationError, Findings
from .global_memory import BYTES

if TYPE_CHECKING:
    from .warp import Warp

SHARED_BASE = 1024
WARPS_PER_EPOCH = 64
"""A warp's key is epoch * WARPS_PER_EPOCH + its number + 1; an epoch lies between two barriers of the block."""
_SEVERAL = WARPS_PER_EPOCH - 1
_PENDING = np.int64(1) << 62
_WHOLE_WARP, _ORDERED, _NO_LANE = -1, -3, -2


class SharedMemory:
    """Bytes of a block and the keys of the warps that last wrote and read each.

    Two warps that touch a byte between the same two barriers race if one of them writes. What one lane of a warp wrote,
    another reads only after a barrier, of the block or of the warp. The async proxy, by which wgmma reads, sees a byte
    only past a fence.proxy.async.
    """

    def __init__(self, size: int, findings: Findings) -> None:
        self.findings = findings
        self.data = np.zeros(size, np.uint8)
        self.writer = np.zeros(size, np.int64)
        """Key of the last writer: 0 for nobody, _PENDING for a cp.async that has not landed."""
        self.reader = np.zeros(size, np.int64)
        """Key of the last reader, or _SEVERAL in place of its warp."""
        self.lane = np.zeros(size, np.int16)
        """Of the writer; _WHOLE_WARP: all lanes together; _ORDERED: a barrier of the warp came after."""
        self.fenced = np.zeros(size, np.uint32)
        """A bit for each warp by whose async proxy the byte may be read."""
        self.async_reads = np.zeros(size, np.int16)
        """Reads by the async proxy under way."""

    def offsets(self, address: np.ndarray, n: int, line: int) -> np.ndarray:
        """Return the offsets [lanes, n] of the bytes at these addresses."""
        at = address.astype(np.int64) - SHARED_BASE
        if (at % n).any():
            raise EmulationError(f"line {line}: shared address is not a multiple of {n}")
        if at.size and (at.min() < 0 or at.max() + n > len(self.data)):
            raise EmulationError(f"line {line}: shared memory out of bounds: {at.min()} .. {at.max() + n}")
        return at[:, None] + BYTES[n]

    # ---- generic proxy ----

    def load(self, warp: Warp, at: np.ndarray, lanes: np.ndarray | None, line: int) -> np.ndarray:
        """Load bytes [lanes, n]; lanes None: by the warp together."""
        if self._settled(warp, at, line):
            own = self.writer[at] == warp.key
            if own.any():
                lane, reader = self.lane[at], _NO_LANE if lanes is None else lanes[:, None]
                if (own & (lane != reader) & (lane != _ORDERED)).any():
                    self.findings.fault("read of what another lane of the warp wrote, without a barrier", line)
        self._read_by(warp, at)
        return self.data[at]

    def store(self, warp: Warp, at: np.ndarray, data: np.ndarray, lanes: np.ndarray | None, line: int) -> None:
        """Store bytes [lanes, n]; lanes None: by the warp together."""
        self._check_write(warp, at, line, data)
        self._put(warp, at, data, lanes)
        if (self.data[at] != data).any():
            self.findings.fault("lanes store different bytes to one shared address", line)

    def order_lanes(self, warp: Warp) -> None:
        """bar.warp.sync: what a lane of this warp wrote is good for all its lanes."""
        self.lane[self.writer == warp.key] = _ORDERED

    # ---- cp.async ----

    def expect_copy(self, warp: Warp, at: np.ndarray, line: int) -> None:
        """Begin a cp.async to these bytes: nobody may touch them until it lands."""
        self._check_write(warp, at, line)
        self.writer[at] = _PENDING

    def land_copy(self, warp: Warp, at: np.ndarray, data: np.ndarray, lanes: np.ndarray, line: int) -> None:
        """End a cp.async: until a barrier, its bytes are good for its own lane alone."""
        if not (self.writer[at] == _PENDING).all():
            self.findings.fault("written before a cp.async landed", line)
        self._put(warp, at, data, lanes)

    # ---- async proxy ----

    def fence(self, warp: Warp) -> None:
        """fence.proxy.async: what this warp wrote is good for all, what barriers made known to it for itself."""
        self.fenced[self.writer < warp.epoch_key] |= np.uint32(1 << warp.number)
        self.fenced[self.writer == warp.key] = np.uint32(0xFFFFFFFF)

    def begin_async_read(self, warp: Warp, at: np.ndarray, line: int) -> np.ndarray:
        """Read bytes of the operand of a wgmma, which stay under way until `end_async_read`."""
        if at.min() < 0 or at.max() >= len(self.data):
            raise EmulationError(f"line {line}: wgmma reads beyond shared memory")
        self._settled(warp, at, line)
        if not (self.fenced[at] >> np.uint32(warp.number) & 1).all():
            self.findings.fault("async proxy reads generic writes without fence.proxy.async", line)
        self.async_reads[at] += 1
        return self.data[at]

    def end_async_read(self, warp: Warp, at: np.ndarray, data: np.ndarray, line: int) -> None:
        """End the read that found ``data``."""
        if (self.data[at] != data).any():
            self.findings.fault("operand of a wgmma changed under it", line)
        self.async_reads[at] -= 1
        self._read_by(warp, at)

    # ---- checks ----

    @staticmethod
    def _unordered(key: np.ndarray, warp: Warp) -> np.ndarray:
        """Tell which bytes another warp has touched since the last barrier."""
        return (key >= warp.epoch_key) & (key != warp.key)

    def _settled(self, warp: Warp, at: np.ndarray, line: int) -> bool:
        """Check that what is read was written before, and that no other warp or copy writes it now."""
        writer = self.writer[at]
        if not writer.all():
            raise EmulationError(f"line {line}: read of shared memory that nobody wrote")
        if (writer == _PENDING).any():
            self.findings.fault("read of shared memory that a cp.async is still to write", line)
        elif self._unordered(writer, warp).any():
            self.findings.fault("shared memory race: read after write of another warp", line)
        else:
            return True
        return False

    def _read_by(self, warp: Warp, at: np.ndarray) -> None:
        self.reader[at] = np.where(self._unordered(self.reader[at], warp), warp.epoch_key + _SEVERAL, warp.key)

    def _check_write(self, warp: Warp, at: np.ndarray, line: int, data: np.ndarray | None = None) -> None:
        """Check a write of ``data``; None: it comes later. The same bytes from several warps do no harm."""
        writer = self.writer[at]
        if (writer == _PENDING).any():
            self.findings.fault("write to shared memory that a cp.async is still to write", line)
        elif (unordered := self._unordered(writer, warp)).any():
            if data is not None and (self.data[at] == data)[unordered].all():
                self.findings.note("several warps write the same bytes to shared memory", line)
            else:
                self.findings.fault("shared memory race: write after write of another warp", line)
        if self._unordered(self.reader[at], warp).any():
            self.findings.fault("shared memory race: write after read of another warp", line)
        if self.async_reads[at].any():
            self.findings.fault("write to shared memory that a wgmma is still reading", line)

    def _put(self, warp: Warp, at: np.ndarray, data: np.ndarray, lanes: np.ndarray | None) -> None:
        self.data[at] = data
        self.writer[at] = warp.key
        self.lane[at] = _WHOLE_WARP if lanes is None else lanes[:, None]
        self.fenced[at] = 0
