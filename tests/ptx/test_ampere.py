"""What Triton compiles for sm_80, sm_89 and sm_120 is run on the emulator, bit for bit against the reference.

All three multiply by mma.sync.
"""

import pytest

pytest.importorskip("triton")
from ptx_checks import assert_right, case_id
from ptx_emulator.cases import Product, usual_cases


@pytest.mark.parametrize("case", [*usual_cases(80), *usual_cases(89), *usual_cases(120)], ids=case_id)
def test_compiled_kernels_give_the_bits_of_the_reference(case):
    executed = assert_right(case).executed
    if isinstance(case, Product):
        assert any(opcode.startswith("mma.sync") for opcode in executed)
