"""A warp of a running block: what its instructions do to memory, and the groups of copies and products it waits for.

`translation` writes the calls: each method is an instruction, with arrays [32] of what its operands hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import lanes
from .findings import EmulationError
from .fragments import described_bytes, from_accumulator, matrix_a, multiply, to_accumulator
from .lanes import InFlight
from .shared_memory import WARPS_PER_EPOCH

if TYPE_CHECKING:
    from .grid import Block

_AXES = {"x": 0, "y": 1, "z": 2}


class _Copy(NamedTuple):
    """One cp.async of some lanes."""

    at: np.ndarray
    """[lanes, n] offsets in shared memory."""
    lanes: np.ndarray
    source: np.ndarray
    copied: np.ndarray
    """Per lane; others get zeros."""
    line: int


class _Product(NamedTuple):
    """One wgmma of a warp."""

    at: np.ndarray
    """[n, 32] offsets of B in shared memory."""
    b: np.ndarray
    """What was there."""
    results: list[str]
    """Names of its registers of D."""
    accumulator: list
    """[matrix, products under way]."""
    operands: dict[str, np.ndarray]
    """Registers of A."""
    line: int


class Warp:
    """One warp. ``uid`` is from 1 and unique in the launch; ``key`` is that of its accesses to shared memory."""

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number = block, number
        self.random, self.findings, self.memory = block.launch.random, block.launch.findings, block.launch.memory
        self.uid = block.number * block.launch.warps + number + 1
        self.entered = block.launch.entered
        self.products_done = 0
        self.waits_at: int | None = None
        """The line of the barrier at which it waits."""
        self.done = False
        self._copies: list[_Copy] = []
        self._copy_groups: list[list[_Copy]] = []
        self._products: list[_Product] = []
        self._product_groups: list[list[_Product]] = []
        self.begin_epoch()
        self.steps = block.launch.translation.run(self)
        """Yields wherever other warps may get ahead; the line where it waits at a barrier, else None."""

    def begin_epoch(self) -> None:
        """Go on after a barrier of the block."""
        self.epoch_key = self.block.epoch * WARPS_PER_EPOCH
        self.key = self.epoch_key + self.number + 1

    @property
    def has_unfinished(self) -> bool:
        """It has copies or products that it never waited for."""
        return bool(self._copies or self._copy_groups or self._products or self._product_groups)

    # ---- registers ----

    def special(self, name: str) -> np.ndarray:
        """Return a special register such as %ctaid.x."""
        register, axis = name[1:].split(".")
        if register == "tid":
            return (lanes.LANES + 32 * self.number if axis == "x" else lanes.LANES * 0).astype(np.uint32)
        launch = self.block.launch
        values = {"ntid": (launch.warps * 32, 1, 1), "ctaid": self.block.position, "nctaid": launch.grid}
        return lanes.array(values[register][_AXES[axis]], np.uint32)

    def parameter(self, name: str, dtype: type) -> np.ndarray:
        """Return an argument of the launch."""
        return lanes.array(self.block.launch.arguments[name], dtype)

    def garbage(self, dtype: type) -> np.ndarray:
        """Return what a register holds that no guard let write."""
        return self.random.integers(0, np.iinfo(dtype).max, 32, dtype, endpoint=True)

    def all_lanes(self, mask: np.ndarray, line: int) -> None:
        """Check the mask of an instruction that is emulated for whole warps only."""
        if not (mask == 0xFFFFFFFF).all():
            raise EmulationError(f"line {line}: not by all lanes")

    # ---- memory ----

    def load_global(self, address: np.ndarray, guard: np.ndarray, dtype: type, count: int, line: int) -> np.ndarray:
        """ld.global of ``count`` elements: [count, 32]."""
        return self._loaded(guard, dtype, count, lambda n: self.memory.load(self, address[guard], n, line))

    def load_shared(self, address: np.ndarray, guard: np.ndarray, dtype: type, count: int, line: int) -> np.ndarray:
        """ld.shared of ``count`` elements: [count, 32]."""
        shared, who = self.block.shared, lanes.LANES[guard]
        return self._loaded(
            guard, dtype, count, lambda n: shared.load(self, shared.offsets(address[guard], n, line), who, line)
        )

    def _loaded(self, guard: np.ndarray, dtype: type, count: int, load: Callable[[int], np.ndarray]) -> np.ndarray:
        n = np.dtype(dtype).itemsize * count
        out = np.zeros((32, n), np.uint8)
        if guard.any():
            out[guard] = load(n)
        return np.ascontiguousarray(out.view(dtype).T)

    def store_global(self, address: np.ndarray, guard: np.ndarray, values: Sequence[np.ndarray], line: int) -> None:
        """st.global of as many elements as there are values."""
        if guard.any():
            self.memory.store(self, address[guard], _bytes(values, guard), line)

    def store_shared(self, address: np.ndarray, guard: np.ndarray, values: Sequence[np.ndarray], line: int) -> None:
        """st.shared of as many elements as there are values."""
        if guard.any():
            data, shared = _bytes(values, guard), self.block.shared
            shared.store(self, shared.offsets(address[guard], data.shape[1], line), data, lanes.LANES[guard], line)

    def sync_lanes(self) -> None:
        """bar.warp.sync."""
        self.block.shared.order_lanes(self)

    # ---- atomics ----

    def add_later(self, address: np.ndarray, guard: np.ndarray, value: np.ndarray, line: int) -> None:
        """red.relaxed: it may reach memory at once, or at any time until a release orders it."""
        if guard.any():
            self.block.additions.append((self.block.epoch, self.number, address[guard], value[guard], line))
        if self.random.random() < 0.3:
            self.block.add_now(lambda addition: self.random.random() < 0.5)

    def atomic_add(self, address: np.ndarray, guard: np.ndarray, value: np.ndarray, line: int) -> np.ndarray:
        """atom.acq_rel: after what this warp, and all warps before the last barrier, have added."""
        out = self.garbage(np.uint32)
        if guard.any():
            block = self.block
            block.add_now(lambda addition: addition[0] < block.epoch or addition[1] == self.number)
            out[guard] = self.memory.add(address[guard], value[guard], line)
            block.acquired_at = block.epoch
        return out

    # ---- cp.async ----

    def copy(
        self,
        target: np.ndarray,
        source: np.ndarray,
        size: int,
        given: np.ndarray,
        guard: np.ndarray,
        line: int,
    ) -> None:
        """cp.async of ``size`` bytes, all of them from the source or (given 0) none: then they are zeros."""
        if not guard.any():
            return
        if not np.isin(given, (0, size)).all():
            raise EmulationError(f"line {line}: part of a cp.async")
        shared = self.block.shared
        at = shared.offsets(target[guard], size, line)
        shared.expect_copy(self, at, line)
        copied = given[guard] > 0
        if copied.any():  # checks the source, which may be read at once
            self.memory.load(self, source[guard][copied], size, line)
        self._copies.append(_Copy(at, lanes.LANES[guard], source[guard], copied, line))

    def commit_copies(self) -> None:
        """cp.async.commit_group."""
        self._copy_groups.append(self._copies)
        self._copies = []

    def wait_copies(self, left: int, line: int) -> None:
        """cp.async.wait_group: until at most ``left`` groups are under way. Copies land here, as late as they may."""
        while len(self._copy_groups) > left:
            for copy in self._copy_groups.pop(0):
                data = np.zeros(copy.at.shape, np.uint8)
                if copy.copied.any():
                    data[copy.copied] = self.memory.load(self, copy.source[copy.copied], data.shape[1], copy.line)
                self.block.shared.land_copy(self, copy.at, data, copy.lanes, copy.line)

    # ---- wgmma ----

    def multiply_async(
        self,
        d: dict[str, np.ndarray | InFlight],
        a: dict[str, np.ndarray],
        descriptor: np.ndarray,
        add: np.ndarray,
        n: int,
        element: type,
        total: type,
        line: int,
    ) -> list[InFlight]:
        """wgmma.mma_async of this warp's 16 of the 64 rows: D, or 0, plus A @ B.

        The bytes of B, and the registers, are not to be touched until it is waited for.
        """
        if (descriptor != descriptor[0]).any() or (add != add[0]).any():
            raise EmulationError(f"line {line}: lanes differ about a wgmma")
        self._agree((line, int(descriptor[0]), bool(add[0])))
        accumulator = self._accumulator(list(d.values()), total, line)
        at = described_bytes(int(descriptor[0]), n, line)
        b = self.block.shared.begin_async_read(self, at, line)
        before = accumulator[0] if add[0] else np.zeros_like(accumulator[0])
        accumulator[0] = multiply(before, matrix_a(list(a.values()), element), b.view(element), self, line)
        accumulator[1] += 1
        self._products.append(_Product(at, b, list(d), accumulator, a, line))
        return [InFlight(accumulator, i) for i in range(len(d))]

    def _agree(self, mine: tuple[int, int, bool]) -> None:
        """Check that the four warps of a warp group issue the same wgmma."""
        group = self.block.products.setdefault(self.number // 4, [])
        if len(group) == self.products_done:
            group.append(mine)
        if group[self.products_done] != mine:
            raise EmulationError(f"warps differ about a wgmma: {group[self.products_done]}, {mine}")
        self.products_done += 1

    def _accumulator(self, d: list[np.ndarray | InFlight], total: type, line: int) -> list:
        """Return [matrix, products under way] of the registers of D, which may be in flight as one accumulator."""
        if not isinstance(d[0], InFlight):
            return [from_accumulator(d, total), 0]
        accumulator = d[0].accumulator
        if any(
            not isinstance(r, InFlight) or r.accumulator is not accumulator or r.index != i for i, r in enumerate(d)
        ):
            raise EmulationError(f"line {line}: another accumulator in flight")
        return accumulator

    def commit_products(self) -> None:
        """wgmma.commit_group."""
        self._product_groups.append(self._products)
        self._products = []

    def wait_products(
        self, left: int, accumulators: dict[str, np.ndarray | InFlight], operands: dict[str, np.ndarray], line: int
    ) -> list[np.ndarray | InFlight]:
        """wgmma.wait_group: until at most ``left`` groups are under way.

        ``accumulators`` and ``operands`` are what the registers of D and A of all products hold; returns what those of
        D hold afterwards.
        """
        while len(self._product_groups) > left:
            for product in self._product_groups.pop(0):
                self.block.shared.end_async_read(self, product.at, product.b, product.line)
                product.accumulator[1] -= 1
                if any(operands[name] is not value for name, value in product.operands.items()):
                    raise EmulationError(f"line {product.line}: registers of A written before the wait on line {line}")
                in_place = (getattr(accumulators[name], "accumulator", None) for name in product.results)
                if any(accumulator is not product.accumulator for accumulator in in_place):
                    raise EmulationError(f"line {product.line}: accumulator written before the wait on line {line}")
        ready: dict[int, list[np.ndarray]] = {}
        for value in accumulators.values():
            if isinstance(value, InFlight) and not value.accumulator[1] and id(value.accumulator) not in ready:
                ready[id(value.accumulator)] = to_accumulator(value.accumulator[0])
        return [
            ready[id(value.accumulator)][value.index]
            if isinstance(value, InFlight) and not value.accumulator[1]
            else value
            for value in accumulators.values()
        ]


def _bytes(values: Sequence[np.ndarray], guard: np.ndarray) -> np.ndarray:
    """Return [lanes, bytes] of the lanes that store."""
    return np.stack(values, axis=1).view(np.uint8)[guard]
