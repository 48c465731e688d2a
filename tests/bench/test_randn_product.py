"""The peer that draws normals inside a product computes what it says, so its time is one of that work."""

import pytest
import torch
from helpers import CPU

triton = pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU")
@pytest.mark.parametrize("rows", [1, 33, 130])
def test_it_is_the_product_with_its_own_matrix(module, rows):
    randn_product = module("randn_product")
    p = randn_product.randn_matrix(200, 5, torch.float32, CPU, std=0.5)
    assert abs(float(p.mean())) < 0.01
    assert float(p.std()) == pytest.approx(0.5, rel=0.02)
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))
    y = randn_product.randn_product(x, 5, std=0.5)
    torch.testing.assert_close(y.double(), x.double() + x.double() @ p.double(), rtol=1e-4, atol=1e-4)
