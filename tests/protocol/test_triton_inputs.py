"""The kernels that draw a batch's random numbers, interpreted against torch's operators and compiled for GPUs."""

import json
import logging
import math
from pathlib import Path
from unittest import mock

import poc2_oracle
import pytest
import torch
from helpers import CPU, DTYPES, PASSING_ERRORS, assert_same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_engine import SmallEngine

triton = pytest.importorskip("triton")
import triton.language as tl
from triton_compiled import CAPABILITIES, compile_for

from poc_kernels import backends
from poc_kernels.kernels import trial
from poc_kernels.protocol import (
    DistanceProver,
    form_kernels,
    inputs,
    permutations,
    triton_inputs,
)

SEEDS = [0, 1, 2**31, 2**32 - 1]
CASES = json.loads((Path(__file__).parent.parent / "data" / "poc2_vectors.json").read_text())["cases"]
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

interpreted = pytest.mark.skipif(
    isinstance(triton_inputs.normal_kernel, triton.runtime.JITFunction),
    reason="kernels are compiled here, not interpreted: TRITON_INTERPRET was not set when Triton was imported",
)


def column(seeds):
    return inputs._seed_column(seeds, CPU)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 1000, 1001, 2047, 5003])
def test_normal_numbers_have_the_bits_of_torch_s_operators(count, dtype):
    drawn = triton_inputs.normal(column(SEEDS), count, dtype)
    assert_same_bits(drawn, inputs.normal(SEEDS, count, dtype=dtype))


@interpreted
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), count=st.integers(1, 1500))
@settings(max_examples=30)
def test_any_seeds_and_counts(seeds, count):
    drawn = triton_inputs.normal(column(seeds), count, torch.float32)
    assert_same_bits(drawn, inputs.normal(seeds, count))
    for row, seed in enumerate(seeds):  # whatever else is in the batch
        assert_same_bits(drawn[row], triton_inputs.normal(column([seed]), count, torch.float32)[0])
    hashes = triton_inputs.hash32(column(seeds), 0, count)
    assert_same_bits(hashes, inputs.hash32(seeds, 0, count))


@interpreted
@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 2**31 - 8))
@example(seed=2**32 - 1, start=2**31 - 8)
@settings(max_examples=30)
def test_hashes_are_murmur_s(seed, start):
    hashes = [value % 2**32 for value in triton_inputs.hash32(column([seed]), start, 7)[0].tolist()]
    assert hashes == [poc2_oracle.murmur(start + i, seed) for i in range(7)]


@interpreted
def test_the_vectors():
    for case in CASES:
        count = case["seq_len"] * case["dim"]
        x = triton_inputs.normal(column(case["seeds"]["inputs"]), count, torch.float32)
        # The vectors were printed in decimal.
        assert (x[:, :8] - torch.tensor(case["inputs_first8"])).abs().max() < 2e-5
        assert (x[:, -4:] - torch.tensor(case["inputs_last4"])).abs().max() < 2e-5
        hashes = triton_inputs.hash32(column([case["seeds"]["target"]]), 0, 4)
        assert [value % 2**32 for value in hashes[0].tolist()] == case["murmur_first4"]


@interpreted
def test_none_of_nothing():
    assert triton_inputs.normal(column(SEEDS), 0, torch.float32).shape == (4, 0)
    assert triton_inputs.hash32(column(SEEDS), 0, 0).shape == (4, 0)
    assert triton_inputs.normal(column([]), 5, torch.float32).shape == (0, 5)


# ---- elementary functions ------------------------------------------------------------------------------------------


@triton.jit
def functions_kernel(u, logs, cosines, sines, N: tl.constexpr):  # noqa: N803
    index = tl.arange(0, N)
    values = tl.load(u + index)
    tl.store(logs + index, triton_inputs._log(values))
    cosine, sine = triton_inputs._cos_sin(values * triton_inputs._TWO_PI)
    tl.store(cosines + index, cosine)
    tl.store(sines + index, sine)


# Of all 83886081 values of a hash, those with results nearest to the middle between two float32: of ln ...
NEAR_TIES = ["0x1.827a74p-7", "0x1.f0ddep-8", "0x1.862690p-12", "0x1.566842p-3"]
# ... and, as angles, of cos and sin.
NEAR_ANGLES = ["0x1.20ffccp-7", "0x1.bf4e1cp-3", "0x1.544ce4p0", "0x1.e7061ep-2", "0x1.9eab2ep-4", "0x1.e64002p-2"]


@interpreted
def test_functions_round_as_float64_does_at_the_hardest_values_and_at_the_ends():
    turn = torch.tensor(2 * math.pi, dtype=torch.float32)
    hard = torch.tensor([float.fromhex(value) for value in NEAR_ANGLES], dtype=torch.float32)
    near = [hard / turn]  # the u of an angle, or beside it
    for _ in range(2):
        near = [near[0].nextafter(torch.zeros(())), *near, near[-1].nextafter(torch.ones(()))]
    quarters = torch.arange(1, 8) / 8
    ends = torch.tensor([1e-10, 2.0**-32, 1.0, 1 - 2.0**-24, 0.5, 2.0**-0.5, 0.25])
    special = torch.cat([torch.tensor([float.fromhex(value) for value in NEAR_TIES]), *near, quarters, ends])
    u = torch.cat([special, torch.rand(4096 - len(special), generator=torch.Generator().manual_seed(1)) + 2.0**-25])
    logs, cosines, sines = (torch.empty_like(u) for _ in range(3))
    functions_kernel[(1,)](u, logs, cosines, sines, N=4096)
    angles = (u * (2 * math.pi)).double()
    assert set(hard.tolist()) <= set(angles.tolist())
    assert_same_bits(logs, u.double().log().float(), "ln")
    assert_same_bits(cosines, angles.cos().float(), "cos")
    assert_same_bits(sines, angles.sin().float(), "sin")


# ---- choice --------------------------------------------------------------------------------------------------------


class Stub:
    """Kernels for a device that is not there."""

    def __init__(self, normal=inputs._plain_normal, hash32=inputs._plain_hash32):
        self.normal, self.hash32 = normal, hash32


def test_kernels_with_the_right_answers_pass():
    assert inputs._wrong_draws(Stub(), CPU) == []


def test_kernels_with_wrong_answers_are_found():
    off = Stub(normal=lambda *arguments: inputs._plain_normal(*arguments).nextafter(torch.zeros(())))
    assert inputs._wrong_draws(off, CPU)[0] == "normal numbers in torch.float32"
    off = Stub(hash32=lambda *arguments: inputs._plain_hash32(*arguments) + 1)
    assert inputs._wrong_draws(off, CPU) == ["hashes"]


@interpreted
def test_the_kernels_pass_their_check():
    assert inputs._wrong_draws(triton_inputs, CPU) == []


@pytest.fixture
def fresh_kernels():
    inputs._kernels.cache_clear()
    trial.verdicts.clear()
    yield
    inputs._kernels.cache_clear()
    trial.verdicts.clear()


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("wrong", [["hashes"], []])
def test_a_gpu_gets_kernels_that_pass(monkeypatch, caplog, wrong):
    monkeypatch.setattr(inputs, "_wrong_draws", lambda *_: wrong)
    with caplog.at_level(logging.ERROR, logger="poc_kernels"):
        chosen = inputs._kernels(torch.device("cuda", 0))
    assert chosen is (None if wrong else triton_inputs)
    said = "draw of inputs by Triton gives wrong answers on cuda:0 and will not be used there: hashes"
    assert (said in caplog.text) == bool(wrong)


@pytest.mark.usefixtures("fresh_kernels")
def test_kernels_that_raise_are_not_used(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(inputs, "_wrong_draws", broken)
    assert inputs._kernels(torch.device("cuda", 0)) is None
    assert "RuntimeError: no such instruction" in caplog.text


@pytest.mark.usefixtures("fresh_kernels")
def test_a_triton_that_cannot_be_imported_is_reported_and_not_used(monkeypatch, caplog):
    def broken(name):
        raise OSError("libcuda.so.1 is too short")

    monkeypatch.setattr(inputs.importlib, "import_module", broken)
    assert inputs._kernels(torch.device("cuda", 0)) is None
    assert "will not be used there: OSError: libcuda.so.1 is too short" in caplog.text


@pytest.mark.usefixtures("fresh_kernels")
def test_a_missing_triton_is_nothing_to_report(monkeypatch, caplog):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(inputs.importlib, "import_module", None)
    assert inputs._kernels(torch.device("cuda", 0)) is None
    assert not caplog.records


@pytest.mark.usefixtures("fresh_kernels")
def test_a_first_draw_while_a_graph_is_captured_is_refused_and_not_remembered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(inputs, "_wrong_draws", lambda *_: [])
    with pytest.raises(RuntimeError, match="draw of inputs by Triton on cuda:0 cannot be chosen while a CUDA graph"):
        inputs._kernels(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert inputs._kernels(torch.device("cuda", 0)) is triton_inputs


@pytest.mark.parametrize(("device", "pinned"), [(CPU, False), (torch.device("cuda", 0), True)])
def test_seeds_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch, device, pinned):
    local = mock.Mock(return_value=mock.MagicMock())
    monkeypatch.setattr(inputs.torch, "tensor", local)
    inputs._seed_column([1, 2**32 - 1], device)
    local.assert_called_once_with([1, 2**32 - 1], dtype=torch.uint32, device="cpu", pin_memory=pinned)
    signed = local.return_value.view
    signed.assert_called_once_with(torch.int32)
    signed.return_value.unsqueeze.return_value.to.assert_called_once_with(device, non_blocking=True)


def test_kernels_of_a_gpu_are_compiled_before_they_are_wanted(monkeypatch):
    """Those of the projection too, whether or not a round has asked for it yet."""
    device, calls = torch.device("cuda", 0), mock.Mock()
    monkeypatch.setattr(inputs, "normal", calls.normal)
    monkeypatch.setattr(inputs, "hash32", calls.hash32)
    monkeypatch.setattr(backends, "warmup", calls.warmup)
    monkeypatch.setattr(form_kernels, "on", calls.on)
    prover = DistanceProver(SmallEngine(hidden_size=64, dtype=torch.bfloat16))
    prover.compile_kernels()
    assert not calls.mock_calls
    prover.engine.device = device
    prover.compile_kernels()
    assert calls.mock_calls == [
        mock.call.normal([0], 1, device, torch.bfloat16),
        mock.call.hash32([0], 0, 1, device),
        mock.call.on(device),
        mock.call.warmup(device, 64, dtype=torch.bfloat16),
    ]


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("error", PASSING_ERRORS, ids=repr)
def test_a_condition_that_passes_says_nothing_of_the_kernels(error, monkeypatch, caplog):
    def full(*_):
        raise error

    monkeypatch.setattr(inputs, "_wrong_draws", full)
    with pytest.raises(type(error)) as raised:
        inputs._kernels(torch.device("cuda", 0))
    assert raised.value is error
    monkeypatch.setattr(inputs, "_wrong_draws", lambda *_: [])
    assert inputs._kernels(torch.device("cuda", 0)) is triton_inputs
    assert not caplog.records


@pytest.mark.usefixtures("fresh_kernels")
def test_a_cpu_gets_torch_s_operators():
    assert inputs._kernels(CPU) is None


@interpreted
def test_the_public_functions_draw_by_the_kernels(monkeypatch):
    expected = inputs.nonce_inputs("block", "key", [1, 2], 5, 13, dtype=torch.bfloat16)
    order = permutations("block", "key", [1, 2], 1000)
    monkeypatch.setattr(inputs, "_kernels", lambda device: triton_inputs)
    monkeypatch.setattr(inputs, "_plain_normal", None)
    monkeypatch.setattr(inputs, "_plain_hash32", None)
    assert_same_bits(inputs.nonce_inputs("block", "key", [1, 2], 5, 13, dtype=torch.bfloat16), expected)
    assert_same_bits(permutations("block", "key", [1, 2], 1000), order)


# ---- compiled ------------------------------------------------------------------------------------------------------

FLOAT64 = r"^(@!?P\d )?D(FMA|ADD|MUL|SETP)"
PAIRS = triton_inputs._BLOCK // (32 * triton_inputs._WARPS)
"""Pairs of normal numbers that a thread draws."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_compiled_kernel_of_normal_numbers(capability, dtype):
    compiled = compile_for(
        triton_inputs.normal_kernel,
        {"seeds": "*i32", "out": TYPES[dtype], "count": "i32", "half": "i32", "blocks": "i32"},
        {"BLOCK": triton_inputs._BLOCK},
        capability,
        num_warps=triton_inputs._WARPS,
        options={"enable_fp_fusion": False},
    )
    assert compiled.spills == 0
    assert compiled.warps_per_sm() >= 32
    assert compiled.count(r"\b(LDL|STL)") == 0
    # What takes the time on cards with little float64; libraries' functions take more.
    assert compiled.count(FLOAT64) <= 44 * PAIRS
    assert "sqrt.rn.f32" in compiled.ptx
    assert "fma.rn.f64" in compiled.ptx
    assert ".ftz" not in compiled.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_compiled_kernel_of_hashes(capability):
    compiled = compile_for(
        triton_inputs.hash_kernel,
        {"seeds": "*i32", "out": "*i32", "start": "i32", "count": "i32", "blocks": "i32"},
        {"BLOCK": triton_inputs._BLOCK},
        capability,
        num_warps=triton_inputs._WARPS,
    )
    assert compiled.spills == 0
    assert compiled.warps_per_sm() >= 48
