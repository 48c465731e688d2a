"""What tests of compiled kernels on the emulator share."""

from __future__ import annotations

import pytest
from ptx_emulator.cases import Case, Product
from ptx_emulator.results import Result, run_elsewhere

from poc_kernels.kernels.triton import tiles


def case_id(case: Case) -> str:
    """A case as the name of a test."""
    return "-".join(map(str, (type(case).__name__, *case))).replace(" ", "_")


def skip_unsafe(capability: int) -> None:
    """Skip where this Triton's code for a capability is not safe, and refused there."""
    reason = tiles.unsafe(divmod(capability, 10))
    if reason:
        pytest.skip(reason)


def assert_right(case: Case) -> Result:
    """Run a case: every bit is right and nothing is at fault; returns how it went."""
    result = run_elsewhere(case)
    assert not result.problems, "\n".join(result.problems)
    assert result.launches
    if isinstance(case, Product):
        assert ("atom.global.gpu.acq_rel.add.u32" in result.executed) == (case.parts > 1 and case.variant != "ties")
        if case.variant == "whole tiles":
            what = [what for _, _, what in result.notes]
            assert "read of padding that nobody wrote" not in what
            assert "float16 product whose sum need not be exact" not in what
    return result
