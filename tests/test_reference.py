import itertools

import oracle
import pytest
import torch
from helpers import DTYPES, PLAIN, assert_same_bits, bits_of, expected, from_bits, project, rows_of_every_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from poc_kernels import definition, reference

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Random123's kat_vectors, philox4x32 10: counter, key, result.
PHILOX_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    given_words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in given_words] == words == oracle.philox(counter, key)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    domain=st.integers(0, 2**32 - 1),
    k_start=st.integers(0, 65536 - 20),
    n_start=st.integers(0, 2**32 - 1 - 5),
    k=st.integers(1, 20),
    n=st.integers(1, 5),
)
def test_entries_follow_the_text(seed, domain, k_start, n_start, k, n):
    e = reference.entries(definition.seed_tensor(seed), domain, k_start, k, n_start, n)
    assert e.dtype == torch.int16
    assert e.tolist() == [
        [oracle.entry(seed, domain, row, column) for column in range(n_start, n_start + n)]
        for row in range(k_start, k_start + k)
    ]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_entries_may_be_none(shape):
    e = reference.entries(definition.seed_tensor(1), 0, 5, shape[0], 5, shape[1])
    assert e.shape == shape
    assert e.dtype == torch.int16


def oracle_result(x, seed, std, domain, activation_bits, columns, residual):
    options = {"domain": domain, "std": std, "activation_bits": activation_bits}
    rows = [
        oracle.project_row(row, NAMES[x.dtype], seed, columns=columns, residual=residual, **options)
        for row in bits_of(x).tolist()
    ]
    return from_bits(torch.tensor(rows), x.dtype)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    domain=st.sampled_from([0, 1, 2**32 - 1]),
    k=st.integers(1, 20),
    std=st.sampled_from([0.01, 1.0, 1e-38, 1e-42, 1e39, 3e40]),
    x_seed=st.integers(0, 2**31),
    residual=st.booleans(),
)
def test_results_follow_the_text(dtype, activation_bits, seed, domain, k, std, x_seed, residual):
    x = rows_of_every_kind(10, k, dtype, x_seed)
    start, count = (k // 3, k - k // 3) if residual else (x_seed, 4)
    y = expected(
        x,
        seed=seed,
        std=std,
        domain=domain,
        activation_bits=activation_bits,
        column_start=start,
        columns=count,
        residual=residual,
    )
    assert_same_bits(y, oracle_result(x, seed, std, domain, activation_bits, range(start, start + count), residual))


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_follow_the_text(dtype, activation_bits):
    x = rows_of_every_kind(60, 7, dtype, 3)
    rows = reference.quantise(x, activation_bits)
    assert rows.finite.any()
    assert not rows.finite.all()
    for m, bits in enumerate(bits_of(x).tolist()):
        numbers = [oracle.decode(word, NAMES[dtype]) for word in bits]
        if any(number in ("nan", "inf", "-inf") for number in numbers):
            assert not rows.finite[m]
            assert not rows.q[m].any()
            continue
        q, exponent = oracle.quantised(numbers, activation_bits)
        assert rows.q[m].tolist() == q
        assert rows.exponent[m].item() == exponent


def test_quantised_rows_reach_the_limits_of_the_text():
    x = torch.tensor([[2.0**-1 * (2 - 2**-23), -(2 - 2**-23) / 2, 0.0]])
    assert reference.quantise(x, 16).q.tolist() == [[16384, -16384, 0]]
    assert reference.quantise(x, 8).q.tolist() == [[127, -127, 0]]


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("k", [1, 16, 1000, 1024, 1025, 4096])
def test_sums_without_float64_are_the_same(k, activation_bits):
    x = rows_of_every_kind(20, k, torch.float32, k)
    q = reference.quantise(x, activation_bits).q
    e = reference.entries(definition.seed_tensor(2**63 + 5), 1, 0, k, 11, 33)
    exact = reference.partial_sums(q.double(), e)
    assert exact.dtype == torch.float64
    assert exact.tolist() == (q.long() @ e.long()).tolist()
    sums = reference.partial_sums(q, e)
    assert sums.dtype == torch.int64
    assert sums.tolist() == exact.tolist()


def test_sums_without_float64_are_the_same_at_their_largest():
    k = 65536
    e = reference.entries(definition.seed_tensor(9), 0, 0, k, 0, 2)
    q = torch.stack([16384.0 * e[:, 0].sign(), torch.full((k,), -16384.0), torch.full((k,), 127.0)])
    exact = q.long() @ e.long()
    assert exact.abs().max() > 7e10
    assert reference.partial_sums(q.double(), e).tolist() == exact.tolist()
    assert reference.partial_sums(q, e).tolist() == exact.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_without_float64_gives_the_same_bits(dtype, monkeypatch):
    x = rows_of_every_kind(24, 1030, dtype, 4)
    y = expected(x, columns=40)
    monkeypatch.setattr(reference, "_has_float64", lambda device: False)
    assert_same_bits(expected(x, columns=40), y)


def test_only_apples_gpu_has_no_float64():
    assert reference._has_float64(torch.device("cpu"))
    assert reference._has_float64(torch.device("cuda"))
    assert not reference._has_float64(torch.device("mps"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_over_parts_of_k_add_up(dtype):
    x = rows_of_every_kind(12, 777, torch.bfloat16, 5)
    rows = reference.quantise(x, 16)
    seed = definition.seed_tensor(5)
    parts = [0, 1, 16, 130, 700, 777]
    sums = sum(
        reference.partial_sums(rows.q[:, start:stop].to(dtype), reference.entries(seed, 0, start, stop - start, 0, 777))
        for start, stop in itertools.pairwise(parts)
    )
    y = reference.finish(sums, rows, definition.coefficient(0.01), x, x.dtype)
    assert_same_bits(y, expected(x, seed=5))


@pytest.mark.parametrize("mask", [None, [True] * 6, [False] * 6, [True, False] * 3])
def test_results_are_contiguous_for_any_strides_and_mask(mask):
    x = torch.randn(300, 6).t()
    y = project(PLAIN, x, row_mask=None if mask is None else torch.tensor(mask))
    assert y.is_contiguous()


def test_bfloat16_conversion_is_that_of_the_text():
    floats = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0)).int()
    floats = torch.cat([floats, torch.arange(0, 2**23, 2099).int(), torch.tensor([0, 0x7F800000, 0x7F7FFFFF]).int()])
    floats = floats.view(torch.float32)
    floats = floats[~floats.isnan()]
    halves = [oracle.encode(oracle.decode(bits, "float32"), "bfloat16") for bits in bits_of(floats).tolist()]
    assert bits_of(reference._round_to(floats, torch.bfloat16)).tolist() == halves
