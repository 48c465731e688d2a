"""The report of what the emulator has run, and when it fails."""

from collections import Counter

import pytest

pytest.importorskip("triton")
from ptx_emulator import report
from ptx_emulator.cases import Entries, Product
from ptx_emulator.mutations import Mutation
from ptx_emulator.results import Result

RACE = ("product_kernel", 7, "shared memory race: write after write of another warp")


def product(wrong=(), faults=()):
    return Result(
        Product(90, "int8", 16, 64, 16, 3, "masked"),
        list(wrong),
        dict.fromkeys(faults, 1),
        {},
        [("quantise_kernel", (27, 1, 1)), ("product_kernel", (2, 3, 1))],
        Counter({"wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8": 1200, "bar.sync": 34}),
    )


def entries():
    return Result(
        Entries(80, 0, 64, 0, 128), [], {}, {}, [("entries_kernel", (1, 1, 1))] * 5, Counter({"prmt.b32": 10})
    )


def mutant(what, *wrong):
    return report.Mutant(90, 3, Mutation(what, "a", "b"), product(wrong))


def test_every_case_and_mutation_is_in_the_report():
    mutants = [mutant("fence dropped", "12 of 100 differ", "a | b"), mutant("bar.sync 3 dropped")]
    results = [product(), product(["1 of 9 differ"], [RACE]), entries()]
    lines = report.report(results, mutants, "All cases", "- commit: 1234").splitlines()
    assert "| sm_80 | Entries | 1 | 1 | 1 | 5 | 10 | 0 |" in lines
    assert "| sm_90 | Product | 2 | 1 | 1 | 4 | 2,468 | 2,400 |" in lines
    what = "arithmetic int8, bits 16, columns 64, rows 16, parts 3, variant masked, order 0"
    launches = "quantise_kernel 27 x 1, product_kernel 2 x 3"
    assert f"| sm_90 | Product | {what} | {launches} | 1,234 | equal | none |" in lines
    assert f"| sm_90 | Product | {what} | {launches} | 1,234 | 1 of 9 differ | {RACE[2]} |" in lines
    assert "| sm_80 | Entries | k_start 0, k 64, n_start 0, n 128 | 5 x entries_kernel | 10 | equal | none |" in lines
    assert "| sm_90 | 3 | fence dropped | 12 of 100 differ (and 1 more) |" in lines
    assert "| sm_90 | 3 | bar.sync 3 dropped | not noticed |" in lines
    assert any(line.startswith("1 of 2 were noticed.") for line in lines)
    assert "- commit: 1234" in lines


@pytest.mark.parametrize(
    ("results", "mutants", "why"),
    [
        ([product(), entries()], [mutant("fence dropped", "x"), mutant("bar.sync 3 dropped")], []),
        ([product(["1 of 9 differ"])], [], ["1 of 9 differ"]),
        ([product(faults=[RACE])], [], ["product_kernel, line 7: shared memory race"]),
        ([], [mutant("fence dropped")], ["not noticed on sm_90: fence dropped"]),
    ],
)
def test_what_makes_a_run_fail(results, mutants, why):
    failed = report.failed(results, mutants)
    assert len(failed) == len(why)
    assert all(words in each for words, each in zip(why, failed, strict=True))
