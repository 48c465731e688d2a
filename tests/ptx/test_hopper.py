"""What Triton compiles for sm_90 is run on the emulator: every kernel, bit for bit against the reference."""

import pytest

pytest.importorskip("triton")
from ptx_checks import assert_right, case_id, skip_unsafe
from ptx_emulator.cases import Product, Sizes, usual_cases
from ptx_emulator.results import run_elsewhere

from poc_kernels.kernels.triton import tiles


@pytest.mark.parametrize("case", usual_cases(90), ids=case_id)
def test_compiled_kernels_give_the_bits_of_the_reference(case):
    skip_unsafe(90)
    executed = assert_right(case).executed
    if isinstance(case, Product | Sizes):
        assert any(opcode.startswith("wgmma.mma_async") for opcode in executed)


@pytest.mark.skipif(tiles.unsafe((9, 0)) is None, reason="this Triton puts fences where they are needed")
def test_a_triton_that_leaves_out_fences_is_noticed():
    problems = run_elsewhere(Product(90, "int8", 16, 64, 16, 1, "masked")).problems
    assert problems
    assert all("async proxy reads generic writes without fence.proxy.async" in problem for problem in problems)
