"""On a GPU: the backends that serve there give the definition's bits."""

import pytest
import torch
from helpers import DTYPES, PLAIN, assert_same_bits, expected, project, rows_of_every_kind
from vectors import VECTORS

from poc_kernels import RandomProjection, backends, self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda", 0)


def test_the_reference_gives_the_vectors():
    assert self_test.wrong_answers(PLAIN, GPU, VECTORS) == []


def test_the_chosen_backend_gives_the_vectors():
    assert self_test.wrong_answers(backends.select(GPU), GPU, VECTORS) == []


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind_have_the_bits_of_the_cpu(dtype, bits):
    x = rows_of_every_kind(70, 1000, dtype, bits)
    mask = torch.arange(70) % 3 != 0
    y = project(PLAIN, x.to(GPU), activation_bits=bits, row_mask=mask.to(GPU))
    assert y.device == GPU
    assert_same_bits(y, expected(x, activation_bits=bits, row_mask=mask))


def test_a_round_on_the_gpu():
    x = rows_of_every_kind(7, 64, torch.bfloat16, 3)
    projections = RandomProjection(5, 64).to(GPU)
    assert projections.seed.device == GPU
    y = projections.post(projections.pre(x.to(GPU)))
    assert_same_bits(y, expected(expected(x, seed=5), seed=5, domain=1))
