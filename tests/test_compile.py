"""torch.compile: one graph, for every seed and batch."""

import pytest
import torch
from helpers import assert_same_bits, expected, rows_of_every_kind

from poc_kernels import (
    RandomProjection,
    projection_entries,
    projection_matrix,
    random_projection,
    residual_projection,
    seed_tensor,
)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def round_of(projections, x, mask=None):
    """The two projections, with no model between them."""
    return projections.post(projections.pre(x, mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_round_compiles_to_one_graph_with_the_same_bits(backend):
    x = rows_of_every_kind(6, 40, torch.float32, 1)
    mask = torch.arange(6) % 2 == 0
    projections = RandomProjection(5, 40)
    compiled = torch.compile(round_of, fullgraph=True, backend=backend)
    y = expected(expected(x, seed=5, row_mask=mask), seed=5, domain=1)
    assert_same_bits(compiled(projections, x, mask), y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_seed_does_not_compile_again(backend):
    x = rows_of_every_kind(6, 40, torch.bfloat16, 2)
    projections = RandomProjection(5, 40)
    compiled = torch.compile(round_of, fullgraph=True, backend=backend)
    with torch.inference_mode():
        compiled(projections, x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (6, -1, 2**64 - 7):
                projections.set_seed(seed)
                y = expected(expected(x, seed=seed), seed=seed, domain=1)
                assert_same_bits(compiled(projections, x), y, f"seed {seed}")


def test_another_batch_does_not_compile_again_when_dynamic():
    projections = RandomProjection(5, 40)
    compiled = torch.compile(round_of, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(projections, rows_of_every_kind(6, 40, torch.float32, 3), torch.ones(6, dtype=torch.bool))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 7, 33):
            x = rows_of_every_kind(rows, 40, torch.float32, rows)
            mask = torch.arange(rows) % 2 == 0
            y = expected(expected(x, seed=5, row_mask=mask), seed=5, domain=1)
            assert_same_bits(compiled(projections, x, mask), y, f"{rows} rows")


def test_an_error_on_recompilation_is_one():
    """What the tests above rely on: an int seed in the graph would be noticed."""
    compiled = torch.compile(lambda x, seed: x + seed, fullgraph=True, backend="eager", dynamic=False)
    compiled(torch.ones(2), 5)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="Recompiling function"):
        compiled(torch.ones(2), 6)


def test_a_domain_for_each_layer_compiles_twice_at_most():
    """Once for the first domain and once for all others, however many layers there are."""
    x, seed = rows_of_every_kind(3, 40, torch.float32, 6), seed_tensor(9)
    compiled = torch.compile(
        lambda x, domain: residual_projection(x, seed, domain=domain), fullgraph=True, backend="aot_eager"
    )
    for domain in range(2, 4):
        compiled(x, domain)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for domain in (*range(4, 40), 2**32 - 1):
            assert_same_bits(compiled(x, domain), expected(x, seed=9, domain=domain), f"domain {domain}")


def test_shards_entries_and_matrices_compile_with_dynamic_sizes():
    seed = seed_tensor(9)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def parts(x, start, width):
        return (
            random_projection(x, seed, width, column_start=start),
            projection_entries(seed, 0, start, width, start, width),
            projection_matrix(seed, 0, start, width, start, width, dtype=torch.bfloat16),
        )

    x = rows_of_every_kind(5, 33, torch.float16, 4)
    for start, width in [(3, 9), (5, 21), (100, 64)]:
        y, e, matrix = parts(x, start, width)
        assert_same_bits(y, expected(x, seed=9, column_start=start, columns=width, residual=False))
        assert_same_bits(e, projection_entries(seed, 0, start, width, start, width))
        assert_same_bits(matrix, projection_matrix(seed, 0, start, width, start, width, dtype=torch.bfloat16))


def test_an_exported_program_gives_the_same_bits():
    x = rows_of_every_kind(6, 40, torch.float32, 5)
    batch = torch.export.Dim("batch", min=2)

    class Round(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projections = RandomProjection(5, 40)

        def forward(self, x):
            return round_of(self.projections, x)

    program = torch.export.export(Round(), (x,), dynamic_shapes=({0: batch},))
    assert_same_bits(program.module()(x[:3]), expected(expected(x[:3], seed=5), seed=5, domain=1))
