"""Runs cases, in processes in which Triton compiles kernels and does not interpret them."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from helpers import bits_of

from poc_kernels import machine_code

from . import cases
from .cases import Case
from .launches import Mutate, unchanged


@dataclass
class Result:
    """How a case went."""

    case: Case
    wrong: list[str]
    """What has other bits than it should, or the error that ended the emulation."""
    faults: dict[tuple[str, int, str], int]
    """`Findings.faults`."""
    notes: dict[tuple[str, int, str], int]
    """`Findings.notes`."""
    launches: list[tuple[str, tuple[int, ...]]]
    """(kernel, grid) of each."""
    executed: Counter[str]
    """Instructions that warps have executed, by opcode."""

    @property
    def problems(self) -> list[str]:
        """All that is wrong; empty if nothing is."""
        return self.wrong + [f"{kernel}, line {line}: {what}" for kernel, line, what in self.faults]


def run(case: Case, mutate: Mutate = unchanged) -> Result:
    """Run a case here, where Triton compiles."""
    wrong = []
    emulator = cases.emulator(case.capability, getattr(case, "order", 0), mutate)
    with cases.launchers_on(emulator):
        try:
            for y, expected in case.run():
                differ = int((bits_of(y) != bits_of(expected)).sum()) if y.shape == expected.shape else expected.numel()
                if differ or y.dtype != expected.dtype:
                    wrong.append(f"{differ} of {expected.numel()} differ")
        except Exception as error:  # whatever ends it is what is wrong
            wrong.append(f"{type(error).__name__}: {error}")
    return Result(
        case,
        wrong,
        dict(emulator.findings.faults),
        dict(emulator.findings.notes),
        [(record.kernel, record.grid) for record in emulator.records],
        sum((record.executed for record in emulator.records), Counter()),
    )


def ptx_of(case: Case, kernel: str) -> str:
    """Return the PTX of the first launch of ``kernel`` in a case."""
    seen: list[str] = []

    def look(name: str, ptx: str) -> str:
        if name == kernel:
            seen.append(ptx)
        return ptx

    run(case, mutate=look)
    return seen[0]


@functools.cache
def processes(count: int = 1) -> concurrent.futures.ProcessPoolExecutor:
    """Return processes that compile kernels as those of the package are, even where this one interprets them."""
    pool = concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
    with mock.patch.dict(os.environ, machine_code.ENVIRONMENT):  # they start as work comes, so all of them here
        concurrent.futures.wait([pool.submit(time.sleep, 0.1) for _ in range(count)])
    return pool


def _begin() -> None:
    torch.set_num_threads(1)


def run_elsewhere(case: Case, mutate: Mutate = unchanged) -> Result:
    """Run a case in another process: `run`."""
    return processes().submit(run, case, mutate).result()
