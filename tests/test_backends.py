"""What every backend must give: the vectors, and rows that depend on nothing but themselves."""

import dataclasses

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    LAYOUTS,
    NAN_BITS,
    assert_same_bits,
    bits_of,
    expected,
    from_bits,
    laid_out,
    project,
    requested,
    rows_of_every_kind,
)
from torch.overrides import TorchFunctionMode
from vectors import PRODUCTS, VECTORS, activations, options_of, product_id, sha256

from poc_kernels import backends, definition
from poc_kernels.kernels import Backend, self_test, trial


@pytest.mark.parametrize("case", VECTORS["entries"], ids=lambda c: f"{c['seed']}-{c['domain']}-{c['k0']}-{c['n0']}")
def test_entries_of_the_vectors(backend, case):
    seed = definition.seed_tensor(int(case["seed"], 16))
    e = backend.entries(seed, case["domain"], case["k0"], case["K"], case["n0"], case["N"])
    assert e.dtype == torch.int16
    assert e.shape == (case["K"], case["N"])
    assert e.untyped_storage().nbytes() == e.nbytes, "a view of more than was asked for"
    assert e[0, : len(case["first_row"])].tolist() == case["first_row"]
    assert sha256(e) == case["sha256_int16_le"]


@pytest.mark.parametrize("item", PRODUCTS, ids=product_id)
def test_products_of_the_vectors(backend, item):
    kind, case = item
    x = activations(case)
    y = project(backend, x, **options_of(kind, case), columns=case.get("N", case["K"]))
    assert y.dtype == x.dtype
    if "y0" in case:
        assert y[0, : len(case["y0"])].tolist() == case["y0"]
    if case.get("y_hex"):
        words = torch.tensor([[int(word, 16) for word in row.split()] for row in case["y_hex"]])
        assert_same_bits(y, from_bits(words, x.dtype))
    assert sha256(y) == case["sha256"]


@pytest.mark.parametrize("case", VECTORS["edge"], ids=lambda case: product_id(("edge", case)))
def test_masks_and_shards_of_the_vectors(backend, case):
    x, options = activations(case), options_of("edge", case)
    masked = project(backend, x, **options, row_mask=torch.tensor(case["mask"], dtype=torch.bool))
    assert sha256(masked) == case["masked_sha256"]
    shard = project(backend, x, **options, column_start=case["column_start"], columns=case["columns"])
    assert sha256(shard) == case["shard_sha256"]


@pytest.mark.parametrize("case", VECTORS["residual"] + VECTORS["edge"], ids=lambda c: product_id(("x", c)))
def test_the_self_test_makes_the_activations_of_the_vectors(case):
    assert_same_bits(self_test.activations(case), activations(case))


# ---- rows that depend on nothing but themselves --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(backend, dtype, bits):
    row = rows_of_every_kind(1, 100, dtype, 2)
    alone = project(backend, row, activation_bits=bits)
    assert not alone.isnan().any()
    for place in range(0, 23, 2):
        for seed, neighbour in enumerate([None, torch.nan, torch.inf, 0.0]):
            x = rows_of_every_kind(23, 100, dtype, seed)
            if neighbour is not None:
                x[:] = neighbour
            x[place] = row[0]
            y = project(backend, x, activation_bits=bits)
            assert_same_bits(y[place], alone[0], f"row {place} among {neighbour}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_the_batch_changes_nothing(backend, dtype):
    x = rows_of_every_kind(41, 65, dtype, 5)
    whole = project(backend, x)
    for parts in (1, 2, 3, 7):
        assert_same_bits(torch.cat([project(backend, part) for part in x.tensor_split(parts)]), whole)


@pytest.mark.parametrize("residual", [True, False])
def test_splitting_the_columns_changes_nothing(backend, residual):
    x = rows_of_every_kind(9, 300, torch.bfloat16, 6)
    whole = project(backend, x, residual=residual)
    for width in (1, 7, 16, 100, 299):
        shards = [
            project(backend, x, residual=residual, column_start=n, columns=min(width, 300 - n))
            for n in range(0, 300, width)
        ]
        assert_same_bits(torch.cat(shards, dim=1), whole, f"shards of {width}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_strides_do_not_matter(backend, dtype, layout, masked):
    x = laid_out(rows_of_every_kind(30, 37, dtype, 7), layout)
    mask = torch.arange(30) % 3 != 0 if masked else None
    y = project(backend, x, row_mask=mask)
    assert y.is_contiguous()
    assert_same_bits(y, expected(x.contiguous(), row_mask=mask))


# ---- rows of the definition that have a rule of their own ----------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, "payload", "both"])
@pytest.mark.parametrize("place", [0, 15, 16, 39])
def test_a_row_that_is_not_finite_becomes_the_quiet_nan(backend, dtype, bad, place, residual):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    good = project(backend, x, residual=residual)
    if bad == "payload":  # a signalling NaN with a sign
        exponent = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
        x[2, place] = from_bits(torch.tensor([exponent + 1 + (1 << (8 * dtype.itemsize - 1))]), dtype)[0]
    elif bad == "both":
        x[2, place], x[2, place - 1] = torch.nan, torch.inf
    else:
        x[2, place] = bad
    y = project(backend, x, residual=residual)
    assert (bits_of(y[2]) == NAN_BITS[dtype]).all()
    others = [0, 1, 3, 4]
    assert_same_bits(y[others], good[others])


@pytest.mark.parametrize("k", [1, 2, 16, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [16, 8])
def test_zeros_of_either_sign_give_positive_zero(backend, dtype, k, bits):
    signs = torch.tensor([1.0, -1.0])[torch.randint(0, 2, (6, k), generator=torch.Generator().manual_seed(k))]
    x = torch.cat([0.0 * signs, torch.full((3, k), -0.0), 1e-40 * signs]).to(dtype)
    assert (bits_of(project(backend, x, activation_bits=bits, residual=False, columns=20)) == 0).all()
    assert (bits_of(project(backend, x[:9], activation_bits=bits)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_beyond_the_dtype_is_infinite(backend, dtype):
    x = torch.full((3, 64), torch.finfo(dtype).max, dtype=dtype)
    y = project(backend, x, std=1.0)
    assert {torch.inf, -torch.inf} <= set(y.flatten().tolist())
    assert not y.isnan().any()
    assert_same_bits(y, expected(x, std=1.0))


# ---- what surrounds a call -----------------------------------------------------------------------------------------


class DefaultDeviceAsked(TorchFunctionMode):
    """Refuses tensors that are made where the default device says."""

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in self.MAKERS and options.get("device") is None:
            raise AssertionError(f"torch.{function.__name__} without a device")
        return function(*arguments, **options)


def test_the_default_device_does_not_matter(backend):
    """A server may have made another device the default before the first call."""
    x, seed = torch.ones(2, 40), definition.seed_tensor(7, "cpu")
    request = requested(x, row_mask=torch.tensor([True, False]))
    with DefaultDeviceAsked():
        backend.entries(seed, 0, 3, 20, 5, 6)
        backend.project(x, seed, request)
        assert self_test.wrong_answers(backend, CPU) == []


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(backend, default):
    torch.set_default_dtype(default)
    assert self_test.wrong_answers(backend, CPU) == []


def test_autocast_does_not_matter(backend):
    with torch.autocast("cpu", torch.bfloat16):
        assert self_test.wrong_answers(backend, CPU) == []


# ---- the first use of a GPU ----------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def serving(fresh_choice, monkeypatch):
    """Backends that serve a GPU, which need not be there, without a look at its answers."""
    choice = [
        Backend(name, project=None, entries=None, unavailable=lambda device: None) for name in ("compiled", "plain")
    ]
    monkeypatch.setattr(backends, "backends", lambda: tuple(choice))
    monkeypatch.setattr(self_test, "wrong_answers", lambda backend, device: [])
    return choice


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.usefixtures("serving")
def test_a_first_use_while_a_graph_is_captured_is_refused_and_not_remembered(monkeypatch, capturing):
    with pytest.raises(RuntimeError, match="backend compiled on cuda:0 cannot be chosen while a CUDA graph is being"):
        backends.select(GPU)
    assert not backends._selected
    assert not trial.verdicts
    assert backends.select(CPU).name == "compiled", "graphs hold nothing of the CPU"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert backends.select(GPU).name == "compiled"


@pytest.mark.usefixtures("serving")
def test_a_backend_that_was_tried_can_be_captured(monkeypatch):
    backends.select(GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.select(GPU).name == "compiled"
    backends._selected.clear()  # as use_backend does
    assert backends.select(GPU).name == "compiled"


def test_warmup_compiles_what_the_chosen_backend_takes(serving):
    calls = []
    serving[0] = dataclasses.replace(
        serving[0], warmup=lambda *arguments, **options: calls.append((arguments, options))
    )
    backends.warmup("cpu", 40, dtype=torch.float16, activation_bits=8)
    assert calls == [((CPU, 40), {"dtype": torch.float16, "activation_bits": 8})]
    assert backends._selected[CPU].name == "compiled"
    backends._selected.clear()
    serving.reverse()
    backends.warmup("cpu", 40)
    assert backends._selected[CPU].name == "plain"
    assert len(calls) == 1
