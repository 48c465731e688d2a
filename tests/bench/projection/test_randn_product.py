"""The peer that draws normals inside a product computes what it says, so its time is one of that work."""

import pytest
import torch
from bench_processes import ROOT
from helpers import CPU, WOULD_COMPILE, run_python

triton = pytest.importorskip("triton")

from bench.projection import randn_product


@pytest.mark.usefixtures("interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU")
@pytest.mark.parametrize("rows", [1, 33, 130])
def test_it_is_the_product_with_its_own_matrix(rows):
    p = randn_product.randn_matrix(200, 5, torch.float32, CPU, std=0.5)
    assert abs(float(p.mean())) < 0.01
    assert float(p.std()) == pytest.approx(0.5, rel=0.02)
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))
    y = randn_product.randn_product(x, 5, std=0.5)
    torch.testing.assert_close(y.double(), x.double() + x.double() @ p.double(), rtol=1e-4, atol=1e-4)


COMPILED = """
import itertools, sys
sys.path.append(ROOT)
import torch
from bench.projection import randn_product, test_gpu as suite
from collections import Counter
for size, rows in itertools.product(suite.SIZES, suite.ROWS):
    randn_product.randn_product(torch.empty(1, dtype=suite.DTYPE).expand(rows, size), suite.SEED)
    randn_product.randn_matrix(size, suite.SEED, suite.DTYPE, torch.device("cpu"))
print(sorted(Counter(name for name, *_ in compiled).items()))
"""


def test_its_kernels_serve_every_size_of_the_suite(tmp_path):
    pytest.importorskip("pytest_benchmark")
    code = WOULD_COMPILE + COMPILED.replace("ROOT", repr(str(ROOT)))
    printed = run_python(code, tmp_path, TRITON_INTERPRET="0", POC_BENCH_QUICK="0")
    assert printed == "[('randn_matrix_kernel', 1), ('randn_product_kernel', 4)]"
