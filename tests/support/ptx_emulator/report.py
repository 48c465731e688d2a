"""Runs every case and every mutation, and writes what was executed: ``python -m ptx_emulator.report RESULT.md``.

`make emulate` runs it; it takes half an hour on two cores. The exit status is 1 if a case has a problem, or if a
mutation that has to be noticed was not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from poc_kernels.kernels.triton import tiles

from . import cases
from .cases import Case, Product
from .mutations import Mutation, mutations
from .results import Result, processes, ptx_of, run

_MATRIX = ("mma.", "wgmma.mma_async")


class Mutant(NamedTuple):
    """A mutation and what became of it."""

    capability: int
    parts: int
    mutation: Mutation
    result: Result


def run_cases(todo: Sequence[Case], workers: int) -> list[Result]:
    """Run cases."""
    return _finished(processes(workers).submit(run, case) for case in todo)


def run_mutants(capabilities: Sequence[int], workers: int) -> list[Mutant]:
    """Run every mutation, of every barrier too, on the smallest tile's product with K whole and in parts."""
    named = []
    for capability in capabilities:
        for parts in (1, 3):
            product = Product(capability, "int8", 16, 64, 16, parts, "masked")
            ptx = processes(workers).submit(ptx_of, product, "product_kernel").result()
            for mutation in mutations(capability, parts, ptx):
                if parts == 1 or mutation not in mutations(capability, 1):
                    named.append((capability, parts, mutation, product._replace(variant=mutation.variant)))
    results = _finished(processes(workers).submit(run, product, mutate=mutation) for _, _, mutation, product in named)
    return [
        Mutant(capability, parts, mutation, result)
        for (capability, parts, mutation, _), result in zip(named, results, strict=True)
    ]


def _finished(futures: Iterable[Future[Result]]) -> list[Result]:
    started, results = list(futures), []
    for number, future in enumerate(started, 1):
        results.append(future.result())
        problems = results[-1].problems
        print(f"{number} of {len(started)}", *results[-1].case, problems[0][:100] if problems else "", flush=True)
    return results


# ---- the text ------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["--"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _text_of(case: Case) -> tuple[str, str]:
    """Return (kind, the rest) of a case."""
    fields = case._asdict()
    del fields["capability"]
    return type(case).__name__, ", ".join(f"{name} {value}" for name, value in fields.items())


def _launches(result: Result) -> str:
    """Return kernels and grids; of many launches only how many."""
    if len(result.launches) > 4:
        counts = Counter(kernel for kernel, _ in result.launches)
        return ", ".join(f"{count} x {kernel}" for kernel, count in counts.items())
    return ", ".join(f"{kernel} {grid[0]} x {grid[1]}" for kernel, grid in result.launches)


def _matrix_instructions(result: Result) -> int:
    return sum(count for opcode, count in result.executed.items() if opcode.startswith(_MATRIX))


def _summary(results: Sequence[Result]) -> str:
    rows = []
    for key in sorted({(result.case.capability, type(result.case).__name__) for result in results}):
        group = [each for each in results if (each.case.capability, type(each.case).__name__) == key]
        rows.append(
            (
                f"sm_{key[0]}",
                key[1],
                len(group),
                sum(not each.wrong for each in group),
                sum(not each.faults for each in group),
                sum(len(each.launches) for each in group),
                f"{sum(each.executed.total() for each in group):,}",
                f"{sum(map(_matrix_instructions, group)):,}",
            )
        )
    head = ("", "cases", "number", "equal bits", "without faults", "launches", "warp instructions", "matrix")
    return _table(head, rows)


def _every_case(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        kind, fields = _text_of(result.case)
        rows.append(
            (
                f"sm_{result.case.capability}",
                kind,
                fields,
                _launches(result),
                f"{result.executed.total():,}",
                "; ".join(result.wrong) or "equal",
                "; ".join(sorted({what for _, _, what in result.faults})) or "none",
            )
        )
    head = ("", "case", "of", "launches: kernel, grid", "warp instructions", "bits", "faults")
    return _table(head, rows)


def _every_mutant(mutants: Sequence[Mutant]) -> str:
    rows = []
    for mutant in mutants:
        problems = mutant.result.problems
        first = problems[0].replace("|", "\\|").split(" (block")[0][:160] if problems else "not noticed"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        rows.append((f"sm_{mutant.capability}", mutant.parts, mutant.mutation.what, first + more))
    return _table(("", "parts of K", "wrong in the PTX of product_kernel", "noticed by"), rows)


def report(results: Sequence[Result], mutants: Sequence[Mutant], which: str, of_run: str) -> str:
    """Return the report as Markdown; ``which`` cases these are, and ``of_run`` says where and of what."""
    noticed = sum(bool(mutant.result.problems) for mutant in mutants)
    return f"""# Compiled Triton kernels on the emulator of PTX

{which} and all mutations. No GPU took part. What this shows and what it does not is in
[docs/emulator.md](../../docs/emulator.md).

{of_run}
- Triton {triton.__version__}

## In sum

{_summary(results)}

## Mutations

{noticed} of {len(mutants)} were noticed. A dropped barrier that is not is one of two of which either is enough, or
stands before the use of bytes that no other warp uses any more.

{_every_mutant(mutants)}

## Every case

{_every_case(results)}
"""


def failed(results: Sequence[Result], mutants: Sequence[Mutant]) -> list[str]:
    """Return what makes the run fail: problems of cases, and mutations that were not noticed, except of barriers."""
    wrong = [f"{result.case}: {result.problems[0]}" for result in results if result.problems]
    return wrong + [
        f"not noticed on sm_{mutant.capability}: {mutant.mutation.what}"
        for mutant in mutants
        if not mutant.result.problems and not mutant.mutation.what.startswith("bar.sync")
    ]


def main() -> int:
    """Run the command line, in the root of the sources."""
    from bench.common.conditions import conditions
    from bench.common.report_text import header

    of_run = header(conditions(torch.device("cpu")))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="the report, a file of Markdown")
    parser.add_argument("--capabilities", type=int, nargs="+", default=cases.CAPABILITIES)
    parser.add_argument("--usual", action="store_true", help="only the cases that `make test` runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    safe = [capability for capability in options.capabilities if not tiles.unsafe(divmod(capability, 10))]
    cases_of = cases.usual_cases if options.usual else cases.all_cases
    results = run_cases([case for capability in safe for case in cases_of(capability)], options.workers)
    mutants = run_mutants([capability for capability in safe if capability in (80, 90)], options.workers)
    which = "The cases of `make test`" if options.usual else "All cases"
    options.result.write_text(report(results, mutants, which, of_run))
    for words in (wrong := failed(results, mutants)):
        print(words, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
