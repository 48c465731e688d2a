"""The emulator notices one wrong instruction in the compiled product."""

import pytest

pytest.importorskip("triton")
from ptx_checks import skip_unsafe
from ptx_emulator.cases import KnownAnswers, Product
from ptx_emulator.mutations import HALVES_UP, mutations
from ptx_emulator.results import run_elsewhere

MUTANTS = [
    pytest.param(capability, parts, mutation, id=f"sm_{capability}-{parts}-{mutation.what}".replace(" ", "_"))
    for capability in (80, 90)
    for parts in (1, 3)
    for mutation in mutations(capability, parts)
    if (mutation in mutations(capability, 1)) == (parts == 1)
]


@pytest.mark.parametrize(("capability", "parts", "mutation"), MUTANTS)
def test_a_wrong_instruction_is_noticed(capability, parts, mutation):
    skip_unsafe(capability)
    assert run_elsewhere(Product(capability, "int8", 16, 64, 16, parts, mutation.variant), mutation).problems


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", ["masked", "shard", "ties"])
def test_without_a_mutation_nothing_is_noticed(capability, variant):
    skip_unsafe(capability)
    assert not run_elsewhere(Product(capability, "int8", 16, 64, 16, 3, variant)).problems


def test_known_answers_notice_halves_that_are_rounded_up():
    (wrong,) = run_elsewhere(KnownAnswers(80, "edges"), HALVES_UP).wrong
    assert "residual sha256 of bfloat16, K = 17, 16 bits" in wrong
    assert "residual shard_sha256 of bfloat16, K = 17, 8 bits" in wrong
    assert "float32" not in wrong
