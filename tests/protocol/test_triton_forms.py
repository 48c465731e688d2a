"""The kernels of vectors and fingerprints, interpreted against torch's operators and compiled for GPUs."""

import logging

import artifact_oracle
import pytest
import torch
from helpers import CPU, DTYPES, PASSING_ERRORS, assert_same_bits
from identity_engine import IdentityEngine

triton = pytest.importorskip("triton")
from triton_compiled import compile_for

from poc_kernels.kernels import trial
from poc_kernels.protocol import EngineProver, PoCConfig, Row, form_kernels, plain_forms, triton_forms
from poc_kernels.protocol.fingerprint.signs import flips_seed

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
MASKS = [torch.int16, torch.int32]

interpreted = pytest.mark.skipif(
    isinstance(triton_forms.signs_kernel, triton.runtime.JITFunction),
    reason="kernels are compiled here, not interpreted: TRITON_INTERPRET was not set when Triton was imported",
)


def states_of(rows, positions, width, dtype, seed=0):
    return torch.randn(rows, positions, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", MASKS)
@pytest.mark.parametrize(("layers", "rows", "count"), [(1, 1, 1), (3, 2, 127), (2, 3, 128), (1, 2, 1025), (4, 1, 1300)])
def test_signs_have_the_bits_of_torch_s_operators(layers, rows, count, dtype):
    seeds = torch.tensor([flips_seed("block", "key", nonce) for nonce in range(rows)])
    drawn, expected = (torch.full((layers, rows + 2, count), 7, dtype=dtype) for _ in range(2))
    triton_forms.sign_masks(seeds, drawn[:, 1:-1])
    plain_forms.sign_masks(seeds, expected[:, 1:-1])
    assert_same_bits(drawn, expected)  # with what lies around
    minus = drawn[-1, 1] != 0
    assert minus.tolist() == (artifact_oracle.flips("block", "key", 0, layers - 1, count) < 0).tolist()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "pairs", "width"), [(1, 4, 16), (3, 7, 200), (1, 130, 17)])
def test_mixes(rows, pairs, width, dtype):
    """Sums of float64 are in another order here; almost all are the same float32."""
    states = states_of(rows, 2 * pairs + 9, width, dtype)[:, 8 : 8 + 2 * pairs]
    masks = torch.zeros(1, rows, pairs, dtype=torch.int32)
    plain_forms.sign_masks(torch.arange(rows), masks)
    mixed, expected = (functions.mixed(states, masks[0]) for functions in (triton_forms, plain_forms))
    assert (mixed - expected).abs().max() <= 1e-6 * expected.abs().max()
    for row in range(rows):  # whatever else is in the batch
        assert_same_bits(triton_forms.mixed(states[row : row + 1], masks[0, row : row + 1])[0], mixed[row])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 200, 257])
def test_reflections(width, dtype):
    generator = torch.Generator().manual_seed(1)
    states = torch.randint(-15, 16, (3, 5, width), generator=generator).to(dtype)  # with exact sums
    axis = (torch.randint(-127, 128, (width,), generator=generator) / 512).to(dtype)
    expected, spread = states.clone(), torch.stack([states, states])[:, :, ::2]
    plain_forms.reflect(expected, axis)
    triton_forms.reflect(states, axis)
    assert_same_bits(states, expected)
    assert not spread[0].is_contiguous()
    triton_forms.reflect(spread[0], axis)
    assert_same_bits(spread[0], expected[:, ::2])
    assert (spread[1] != spread[0]).any()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_position(value, dtype):
    states, axis = states_of(1, 3, 40, dtype), states_of(1, 1, 40, dtype)[0, 0]
    states[0, 1, 7] = value
    states.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[0, 1, 8] = -1  # a GPU's NaN
    expected = states.clone()
    plain_forms.reflect(expected, axis)
    triton_forms.reflect(states, axis)
    assert states[0, 1].isnan().all()
    assert expected[0, 1].isnan().all()
    assert states[0, ::2].isfinite().all()


@interpreted
def test_none_of_nothing():
    masks = torch.zeros(2, 0, 5, dtype=torch.int16)
    triton_forms.sign_masks(torch.zeros(0, dtype=torch.int64), masks)
    assert triton_forms.mixed(torch.zeros(0, 8, 5), torch.zeros(0, 4, dtype=torch.int32)).shape == (0, 5)
    triton_forms.reflect(torch.zeros(0, 8, 5), torch.zeros(5))


@interpreted
@pytest.mark.parametrize("proof", ["vectors", "fingerprint"])
def test_a_prover_computes_with_the_kernels(proof, monkeypatch):
    of = PoCConfig("block", 7, "key", proof=proof, batch_size=2, seq_len=19)
    rows = [Row("key", 1), Row("key", 2)]

    def proved():
        return EngineProver(IdentityEngine(40, 3, torch.float16)).prove(of, rows).values

    expected = proved()
    monkeypatch.setattr(form_kernels, "_wrong_results", None)
    for module in ("fingerprint.flips", "fingerprint.mix", "vectors.reflections"):
        monkeypatch.setattr(f"poc_kernels.protocol.{module}.on", lambda device: triton_forms)
    computed = proved()
    distances = [
        sum((a - b) ** 2 for a, b in zip(*map(artifact_oracle.decoded, pair), strict=True)) ** 0.5
        for pair in zip(computed, expected, strict=True)
    ]
    assert max(distances) < 0.01


# ---- choice --------------------------------------------------------------------------------------------------------


@interpreted
def test_the_kernels_pass_their_check():
    assert form_kernels._wrong_results(triton_forms, CPU) == []


class Off:
    """Functions that are a little wrong."""

    @staticmethod
    def sign_masks(seeds, out):
        plain_forms.sign_masks(seeds + 1, out)

    @staticmethod
    def mixed(states, masks):
        return plain_forms.mixed(states, masks).nextafter(torch.zeros(()))

    @staticmethod
    def reflect(states, axis):
        plain_forms.reflect(states, -2 * axis)


@pytest.mark.parametrize(
    ("name", "found"), [("sign_masks", "signs as torch.int16"), ("mixed", "mixes of"), ("reflect", "reflections of")]
)
def test_kernels_with_wrong_answers_are_found(name, found, monkeypatch):
    functions = type(
        "Mostly", (), {each: staticmethod(getattr(plain_forms, each)) for each in vars(Off) if each[0] != "_"}
    )
    monkeypatch.setattr(functions, name, staticmethod(getattr(Off, name)))
    wrong = form_kernels._wrong_results(functions, CPU)
    assert any(each.startswith(found) for each in wrong)


@pytest.fixture
def fresh_kernels():
    form_kernels.on.cache_clear()
    trial.verdicts.clear()
    yield
    form_kernels.on.cache_clear()
    trial.verdicts.clear()


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("wrong", [["signs"], []])
def test_a_gpu_gets_kernels_that_pass(monkeypatch, caplog, wrong):
    monkeypatch.setattr(form_kernels, "_wrong_results", lambda *_: wrong)
    with caplog.at_level(logging.ERROR, logger="poc_kernels"):
        chosen = form_kernels.on(torch.device("cuda", 0))
    assert chosen is (plain_forms if wrong else triton_forms)
    said = "vectors and fingerprints by Triton gives wrong answers on cuda:0 and will not be used there: signs"
    assert (said in caplog.text) == bool(wrong)


@pytest.mark.usefixtures("fresh_kernels")
def test_a_missing_triton_is_nothing_to_report(monkeypatch, caplog):
    monkeypatch.setattr(form_kernels.importlib.util, "find_spec", lambda name: None)
    assert form_kernels.on(torch.device("cuda", 0)) is plain_forms
    assert not caplog.records


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("error", PASSING_ERRORS, ids=repr)
def test_a_condition_that_passes_says_nothing_of_the_kernels(error, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(form_kernels, "_wrong_results", full)
    with pytest.raises(type(error)):
        form_kernels.on(torch.device("cuda", 0))
    monkeypatch.setattr(form_kernels, "_wrong_results", lambda *_: [])
    assert form_kernels.on(torch.device("cuda", 0)) is triton_forms


def test_a_cpu_gets_torch_s_operators():
    assert form_kernels.on(CPU) is plain_forms


def test_the_default_device_does_not_matter_to_the_trial():
    torch.set_default_device("meta")
    assert form_kernels._wrong_results(plain_forms, CPU) == []


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "kind", "bits"), [(90, "*i16", 16), (100, "*i32", 32)])
def test_the_compiled_kernel_of_signs(capability, kind, bits):
    compiled = compile_for(
        triton_forms.signs_kernel,
        {"seeds": "*i64", "out": kind, "layer_stride": "i64", "row_stride": "i64", "count": "i32"},
        {"CALLS": triton_forms._CALLS, "BITS": bits},
        capability,
        num_warps=1,
    )
    assert compiled.spills == 0


@pytest.mark.parametrize(("capability", "dtype"), list(zip((80, 90, 100), DTYPES, strict=True)))
def test_the_compiled_kernel_of_mixes(capability, dtype):
    compiled = compile_for(
        triton_forms.mix_kernel,
        {
            "states": TYPES[dtype],
            "masks": "*i32",
            "out": "*fp32",
            "row_stride": "i64",
            "position_stride": "i32",
            "pairs": "i32",
            "width": "i32",
        },
        {"BLOCK": triton_forms._BLOCK},
        capability,
        num_warps=triton_forms._WARPS,
    )
    assert compiled.spills == 0
    assert "add.f64" in compiled.ptx.replace("add.rn.f64", "add.f64")


@pytest.mark.parametrize(("capability", "dtype"), list(zip((100, 90, 80), DTYPES, strict=True)))
def test_the_compiled_kernel_of_reflections(capability, dtype):
    compiled = compile_for(
        triton_forms.reflect_kernel,
        {"states": TYPES[dtype], "axis": TYPES[dtype], "width": "i32"},
        {"BLOCK": 4096},
        capability,
        num_warps=16,
        options={"enable_fp_fusion": False},
    )
    assert compiled.spills == 0
    assert "fma.rn.f32" not in compiled.ptx  # each step is rounded
