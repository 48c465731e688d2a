"""The harness that compiles kernels without a GPU, on kernels whose machine code is known."""

import pytest

pytest.importorskip("triton")
from known_kernels import fused, int8_product
from triton_compiled import CAPABILITIES, compile_for

MATRIX_INSTRUCTION = {80: r"IMMA\.16832\.S8", 89: r"IMMA\.16832\.S8", 90: r"IGMMA\.", 100: r"IMMA|UTCIMMA"}
"""On sm_100 Triton 3.6 compiles to the instruction of sm_80, 3.9 to that of the fifth generation."""
SIGNATURE = {"x_ptr": "*i8", "p_ptr": "*i8", "y_ptr": "*i32", "k": "i32"}
TILE = {"M": 64, "N": 64, "K": 64}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_int8_product_uses_the_matrix_instruction_in_its_loop(capability):
    compiled = compile_for(int8_product, SIGNATURE, TILE, capability, num_warps=4, aligned=[*SIGNATURE])
    loop = compiled.loop_with(MATRIX_INSTRUCTION[capability])
    assert 10 < len(loop) < len(compiled.code)
    assert 0 < loop.count(MATRIX_INSTRUCTION[capability]) <= compiled.count(MATRIX_INSTRUCTION[capability])
    assert loop.instructions[-1].opcode.startswith("BRA")
    assert sum(loop.histogram.values()) == len(loop)
    assert compiled.spills == 0
    assert compiled.count(r"\b(STL|LDL)") == 0
    assert 24 <= compiled.registers <= 255
    assert 0 < compiled.shared_bytes <= 100 * 1024
    assert compiled.warps_per_sm() >= 4
    assert ".target sm_" + str(capability) in compiled.ptx
    assert "ttg.num-warps" in compiled.ttgir


def test_too_few_registers_are_seen_as_spills():
    compiled = compile_for(
        int8_product, SIGNATURE, {"M": 128, "N": 128, "K": 64}, 80, num_warps=4, options={"maxnreg": 64}
    )
    assert compiled.registers <= 64
    assert compiled.spills > 0
    assert compiled.count(r"\bSTL") > 0


def test_a_fused_multiply_add_is_seen_and_can_be_forbidden():
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "factor": "fp32"}
    assert compile_for(fused, signature, {}, 90, num_warps=1).count(r"\bFFMA") == 1
    apart = compile_for(fused, signature, {}, 90, num_warps=1, options={"enable_fp_fusion": False})
    assert (apart.count(r"\bFFMA"), apart.count(r"\bFMUL"), apart.count(r"\bFADD")) == (0, 1, 1)
    assert apart.code.loops == ()
    with pytest.raises(AssertionError, match="no loop holds IMMA"):
        apart.loop_with("IMMA")


def test_the_same_request_is_compiled_once():
    first = compile_for(int8_product, SIGNATURE, TILE, 80)
    assert compile_for(int8_product, dict(SIGNATURE), dict(TILE), 80, num_warps=4, num_stages=3) is first


@pytest.mark.parametrize(
    ("signature", "constants", "words"),
    [({}, TILE, "no type or constant"), ({**SIGNATURE, "z": "i32"}, TILE, "has no arguments")],
)
def test_arguments_that_do_not_fit_the_kernel_are_named(signature, constants, words):
    with pytest.raises(AssertionError, match=words):
        compile_for(int8_product, signature, constants, 80)
