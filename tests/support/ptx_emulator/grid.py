"""Runs the grid of a translated kernel: blocks and warps in an order that is drawn from a seed."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from .findings import EmulationError, Findings
from .global_memory import GlobalMemory
from .shared_memory import SharedMemory
from .translation import Translation
from .warp import Warp

_SWITCH = 0.3
"""Probability that another warp goes on where one may. Else the same does: it may get far ahead of the others."""
_MAX_STEPS_PER_BLOCK = 20_000

_Addition = tuple[int, int, np.ndarray, np.ndarray, int]


class Block:
    """A block that runs, with its shared memory and its warps."""

    def __init__(self, launch: Launch, position: tuple[int, ...], number: int) -> None:
        self.launch, self.position, self.number = launch, position, number
        self.shared = SharedMemory(launch.shared_bytes, launch.findings)
        self.epoch = 1
        """Barriers passed, and one: nothing was touched in epoch 0."""
        self.acquired_at: int | None = None
        """The epoch of an atomic that acquired."""
        self.additions: list[_Addition] = []
        """red.relaxed that need not have reached memory: (epoch, warp, address, value, line)."""
        self.products: dict[int, list[tuple[int, int, bool]]] = {}
        """(line, descriptor, whether it adds) of every wgmma of each warp group."""
        self.warps = [Warp(self, number) for number in range(launch.warps)]

    def acquired_before(self) -> bool:
        """Tell whether one of its warps acquired before the last barrier."""
        return self.acquired_at is not None and self.epoch > self.acquired_at

    def add_now(self, which: Callable[[_Addition], bool]) -> None:
        """Let the additions of ``which`` reach memory, in any order."""
        chosen = [which(addition) for addition in self.additions]
        now = [addition for addition, is_chosen in zip(self.additions, chosen, strict=True) if is_chosen]
        self.additions = [each for each, is_chosen in zip(self.additions, chosen, strict=True) if not is_chosen]
        for i in self.launch.random.permutation(len(now)):
            _, _, address, value, line = now[i]
            self.launch.memory.add(address, value, line)

    def pass_barrier(self) -> None:
        """Let all warps go on once they wait at the same barrier."""
        at = {warp.waits_at for warp in self.warps}
        if at == {None} or (None in at and not any(warp.done for warp in self.warps)):
            return
        if any(warp.done for warp in self.warps):
            raise EmulationError(f"barrier on lines {at - {None}} that not all warps reach")
        if len(at) > 1:
            raise EmulationError(f"warps wait at different barriers: lines {at}")
        self.epoch += 1
        for warp in self.warps:
            warp.begin_epoch()
            warp.waits_at = None

    def end(self) -> None:
        """Check what a block may not leave behind."""
        self.add_now(lambda addition: True)
        if any(warp.has_unfinished for warp in self.warps):
            self.launch.findings.fault("block ends with copies or products that nobody waited for", 0)
        if len({warp.products_done for warp in self.warps}) > 1:
            self.launch.findings.fault("warps of a block took part in different numbers of wgmma", 0)


class Launch:
    """One launch of a kernel.

    Args:
        translation: the kernel.
        grid: up to three numbers of blocks.
        arguments: by the names of its parameters; pointers are addresses of ``memory``.
        shared_bytes: dynamic shared memory of a block.
        memory: global memory.
        findings: of ``memory`` as well.
        seed: of the order of blocks, warps and atomics.
        resident: blocks that run at a time.
    """

    def __init__(
        self,
        translation: Translation,
        grid: tuple[int, ...],
        arguments: Mapping[str, int],
        shared_bytes: int,
        memory: GlobalMemory,
        findings: Findings,
        seed: int,
        resident: int = 3,
    ) -> None:
        self.translation, self.grid, self.arguments = translation, (*grid, 1, 1)[:3], arguments
        self.shared_bytes, self.memory, self.findings, self.resident = shared_bytes, memory, findings, resident
        self.random = np.random.default_rng(seed)
        self.warps = translation.kernel.threads // 32
        self.entered = np.zeros(len(translation.segments), np.int64)

    def run(self) -> Counter[str]:
        """Run all blocks; return how many instructions of each opcode warps have executed."""
        self.findings.kernel = self.translation.kernel.name
        with np.errstate(all="ignore"):  # integers wrap; infinities and NaN are seen in the results
            self._run()
        return self.translation.executed(self.entered)

    def _run(self) -> None:
        positions = [(x, y, z) for z in range(self.grid[2]) for y in range(self.grid[1]) for x in range(self.grid[0])]
        waiting = [(int(i), positions[i]) for i in self.random.permutation(len(positions))]
        blocks: list[Block] = []
        warp = None
        for _ in range(_MAX_STEPS_PER_BLOCK * len(positions)):
            while waiting and len(blocks) < self.resident:
                number, position = waiting.pop()
                blocks.append(Block(self, position, number))
            if not blocks:
                return
            ready = [each for block in blocks for each in block.warps if each.waits_at is None and not each.done]
            if warp not in ready or self.random.random() < _SWITCH:
                warp = ready[self.random.integers(len(ready))]
            self._step(warp)
            if warp.done and all(each.done for each in warp.block.warps):
                warp.block.end()
                blocks.remove(warp.block)
        raise EmulationError("does not end")

    def _step(self, warp: Warp) -> None:
        try:
            warp.waits_at = next(warp.steps)
        except StopIteration:
            warp.done = True
        except Exception as error:
            raise EmulationError(self._where(warp, error)) from error
        if warp.done or warp.waits_at is not None:
            warp.block.pass_barrier()

    def _where(self, warp: Warp, error: Exception) -> str:
        """Say what went wrong with the line of PTX at which it did."""
        words = str(error) if isinstance(error, EmulationError) else repr(error)
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename == self.translation.file:
                line = self.translation.ptx_line.get(frame.lineno or 0, 0)
                text = self.translation.kernel.lines[line - 1].strip()
                return f"{words} at line {line}: {text} (block {warp.block.position}, warp {warp.number})"
        return words
