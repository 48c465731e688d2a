"""Global memory: the storages of CPU tensors at made-up addresses, with who wrote each byte.

Allocation i lies at (i + 1) << 40, so that what is out of bounds is in nobody's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .findings import EmulationError, Findings

if TYPE_CHECKING:
    from .warp import Warp

_SLOT_BITS = 40
BYTES = {n: np.arange(n, dtype=np.int64) for n in (1, 2, 4, 8, 16)}
"""Offsets of the n bytes of an access."""
_ADDED = -1


class Allocation:
    """One storage. Arrays have an element for each byte."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.accessible = np.zeros(len(data), bool)
        """It belongs to a tensor that a kernel was given."""
        self.written = np.ones(len(data), bool)
        self.writer = np.zeros(len(data), np.int32)
        """The warp of this launch that stored here, 0 for none, _ADDED for atomics."""
        self.names: set[str] = set()
        """Of the arguments of this launch that lie here."""


class GlobalMemory:
    """Storages of CPU tensors.

    ``padding`` has, by kernel, the arguments with rows that nobody writes and that reach no result: that they are read
    is a note. Any other read of what nobody wrote is a fault.
    """

    def __init__(self, findings: Findings, padding: dict[str, frozenset[str]]) -> None:
        self.findings, self.padding = findings, padding
        self.allocations: list[Allocation] = []
        self._tensors: list[torch.Tensor] = []  # kept, so that no storage takes another's place
        self._of_storage: dict[int, int] = {}

    def _allocation_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._of_storage:
            self._of_storage[storage.data_ptr()] = len(self.allocations)
            self.allocations.append(Allocation(_bytes_of(storage)))
            self._tensors.append(tensor)
        return self._of_storage[storage.data_ptr()]

    def address(self, tensor: torch.Tensor, name: str) -> int:
        """Return the address of a tensor's first element; its bytes, not the storage's, become accessible."""
        index = self._allocation_of(tensor)
        allocation, size = self.allocations[index], tensor.element_size()
        allocation.names.add(name)
        offset = tensor.storage_offset() * size
        if tensor.numel():
            shape, strides = (*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1)
            np.lib.stride_tricks.as_strided(allocation.accessible[offset:], shape, strides)[...] = True
        return ((index + 1) << _SLOT_BITS) + offset

    def poison(self, tensor: torch.Tensor, random: np.random.Generator) -> None:
        """Fill a tensor's storage with random bytes that count as not written."""
        allocation = self.allocations[self._allocation_of(tensor)]
        allocation.data[:] = random.integers(0, 256, len(allocation.data), np.uint8)
        allocation.written[:] = False

    def begin_launch(self) -> None:
        """Forget who wrote what, as a launch sees all that earlier ones on its stream did, and what they were given."""
        for allocation in self.allocations:
            allocation.writer[:] = 0
            allocation.accessible[:] = False
            allocation.names.clear()

    def _pieces(self, address: np.ndarray, n: int, line: int) -> Iterator[tuple[Allocation, np.ndarray, np.ndarray]]:
        """Yield (allocation, which of the lanes, offsets [lanes, n] of their bytes) for the addresses of some lanes."""
        address = address.view(np.int64)
        if (address % n).any():
            raise EmulationError(f"line {line}: global address is not a multiple of {n}")
        slots = (address >> _SLOT_BITS) - 1
        for slot in [slots[0]] if (slots == slots[0]).all() else np.unique(slots):
            if not 0 <= slot < len(self.allocations):
                raise EmulationError(f"line {line}: global address {int(address[slots == slot][0]):#x} is in no tensor")
            allocation, lanes = self.allocations[slot], slots == slot
            at = (address[lanes] & ((1 << _SLOT_BITS) - 1))[:, None] + BYTES[n]
            if at.size and (at.max() >= len(allocation.data) or not allocation.accessible[at].all()):
                names = ", ".join(sorted(allocation.names)) or f"tensor {slot}"
                raise EmulationError(f"line {line}: out of bounds of {names}, up to byte {at.max()}")
            yield allocation, lanes, at

    def load(self, warp: Warp, address: np.ndarray, n: int, line: int) -> np.ndarray:
        """Load n bytes at each address: [lanes, n] uint8."""
        out = np.empty((len(address), n), np.uint8)
        for allocation, lanes, at in self._pieces(address, n, line):
            out[lanes] = allocation.data[at]
            if not allocation.written[at].all():
                self._unwritten(allocation, line)
            writer = allocation.writer[at]
            if ((writer > 0) & (writer != warp.uid)).any():
                self.findings.fault("read of what another warp of the launch stores", line)
            if (writer == _ADDED).any() and not warp.block.acquired_before():
                self.findings.fault("read of what is added by atomics, without an acquire before a barrier", line)
        return out

    def _unwritten(self, allocation: Allocation, line: int) -> None:
        if allocation.names & self.padding.get(self.findings.kernel, frozenset()):
            self.findings.note("read of padding that nobody wrote", line)
        else:
            self.findings.fault("read of global memory that nobody wrote", line)

    def store(self, warp: Warp, address: np.ndarray, data: np.ndarray, line: int) -> None:
        """Store data [lanes, n] uint8."""
        for allocation, lanes, at in self._pieces(address, data.shape[1], line):
            writer = allocation.writer[at]
            if ((writer != 0) & (writer != warp.uid)).any():
                self.findings.fault("store over what another warp of the launch stores or adds", line)
            allocation.data[at] = data[lanes]
            if (allocation.data[at] != data[lanes]).any():
                self.findings.fault("lanes store different bytes to one address", line)
            allocation.written[at], allocation.writer[at] = True, warp.uid

    def add(self, address: np.ndarray, values: np.ndarray, line: int) -> np.ndarray:
        """Add uint32 values, one lane after the other; return what was there before each."""
        before = np.zeros(len(address), np.uint32)
        for allocation, lanes, at in self._pieces(address, 4, line):
            if (allocation.writer[at] > 0).any():
                self.findings.fault("atomic on what a warp of the launch stores", line)
            if not allocation.written[at].all():
                self.findings.fault("atomic on memory that nobody wrote", line)
            allocation.writer[at] = _ADDED
            for lane, where in zip(np.flatnonzero(lanes), at, strict=True):
                word = allocation.data[where].view(np.uint32)
                before[lane] = word[0]
                allocation.data[where] = (word + values[lane : lane + 1]).view(np.uint8)
        return before


class _Bytes:
    """A torch storage as NumPy sees it, kept alive by the array."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.__array_interface__ = {
            "data": (storage.data_ptr(), False),
            "shape": (len(storage),),
            "typestr": "|u1",
            "version": 3,
        }


def _bytes_of(storage: Any) -> np.ndarray:
    return np.asarray(_Bytes(storage)) if len(storage) else np.zeros(0, np.uint8)
