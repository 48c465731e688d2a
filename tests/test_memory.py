"""P is never stored: what a call allocates, and what a process grows by."""

import pytest
import torch
from helpers import CPU, project, run_python

from poc_kernels import backends, definition, reference

MIB = 1 << 20

NATIVE = [backend for backend in backends.backends() if backend.name.startswith("native-")]
RUNNABLE = [backend for backend in NATIVE if backend.unavailable(CPU) is None]
each_native_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            backend, id=backend.name, marks=pytest.mark.skipif(backend not in RUNNABLE, reason="this CPU lacks it")
        )
        for backend in NATIVE
    ],
)


class AllocationsNotedError(Exception):
    """Ends a call once its allocations are known."""


@pytest.fixture
def sizes(monkeypatch):
    """Bytes of each tensor that torch.empty makes."""
    plain_empty, noted = torch.empty, []

    def noting_empty(*size, **options):
        result = plain_empty(*size, **options)
        noted.append(result.nbytes)
        return result

    monkeypatch.setattr(torch, "empty", noting_empty)
    return noted


@each_native_backend
@pytest.mark.parametrize("k", [1, 16, 4096, 8192, 65536])
@pytest.mark.parametrize("rows", [1, 300, 20000])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_a_product_allocates_its_result_and_a_small_workspace(backend, k, rows, activation_bits, monkeypatch):
    """The workspace is the integers of some rows, and a panel for each thread, whatever the size of the product."""
    threads, plain_empty, sizes = 4, torch.empty, []

    def noting_empty(*size, dtype, **options):
        sizes.append(torch.Size(size).numel() * dtype.itemsize)
        if len(sizes) == 2:
            raise AllocationsNotedError
        return plain_empty(1, dtype=dtype, **options)

    x = torch.zeros(k, dtype=torch.bfloat16).expand(rows, k)
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "empty", noting_empty)
    with pytest.raises(AllocationsNotedError):
        project(backend, x, activation_bits=activation_bits)
    output, workspace = sizes
    assert output == rows * k * 2
    one_row = 2 * (k + 15) + 64
    for_threads = threads * (MIB + 6 * one_row)
    assert workspace <= max(16 * MIB, 256 * 2 * k) * (1 + 32 / k) + 6 * one_row + for_threads
    assert workspace <= (rows + 6) * one_row + for_threads


@each_native_backend
def test_entries_take_their_result_and_a_small_workspace(backend, sizes):
    torch.set_num_threads(4)
    backend.entries(definition.seed_tensor(1), 0, 0, 600, 0, 700)
    assert sizes[0] == 600 * 700 * 2
    assert sum(sizes[1:]) <= 4 * 16 * MIB // 1024 + 64


GROWTH = """
import torch
import poc_kernels

def peak():  # of this process alone: ru_maxrss would begin with the parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads({threads})
seed = poc_kernels.seed_tensor(1)
poc_kernels.residual_projection(torch.ones(8, 64, dtype=torch.bfloat16), seed)
x = torch.ones({rows}, 8192, dtype=torch.bfloat16)
before = peak()
y = poc_kernels.residual_projection(x, seed)
print(peak() - before - y.nbytes)
"""


@pytest.mark.parametrize(
    ("name", "rows", "limit"),
    [
        *((backend.name, 4, 8 * MIB) for backend in RUNNABLE),
        *((backend.name, 2048, 32 * MIB) for backend in RUNNABLE[:1]),
        ("reference", 4, 40 * MIB),
    ],
)
def test_a_process_grows_by_far_less_than_p(name, rows, limit, tmp_path):
    """At D = 8192 P would be 128 MiB in bfloat16 and 64 MiB in bytes."""
    # The reference is many small operators, after each of which threads wait for each other: 1.6 s of CPU time with one
    # thread, and on a busy machine 13 s, or a minute, with two.
    threads = 1 if name == "reference" else 2
    assert int(run_python(GROWTH.format(rows=rows, threads=threads), tmp_path, POC_KERNELS_BACKEND=name)) < limit


def test_the_reference_draws_p_in_panels(monkeypatch):
    """So that its memory grows neither with the columns nor with the rows of P."""
    widths, plain_draw = [], reference._draw

    def noting_draw(seed, domain, k_start, k, n_start, n):
        widths.append((n_start, n))
        return plain_draw(seed, domain, k_start, k, n_start, n)

    monkeypatch.setattr(reference, "_draw", noting_draw)
    backend = next(backend for backend in backends.backends() if backend.name == "reference")
    project(backend, torch.ones(1, 4096), columns=150, column_start=5, residual=False)
    assert widths == [(5, 64), (69, 64), (133, 22)]
    widths.clear()
    backend.entries(definition.seed_tensor(1), 0, 3, 16384, 7, 40)
    assert widths == [(7, 16), (23, 16), (39, 8)]


@each_native_backend
def test_the_workspace_is_for_as_many_threads_as_torch_has(backend, sizes):
    workspaces = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        project(backend, torch.ones(1, 64), columns=8)
        workspaces.append(sizes[-1])
    assert workspaces[2] - workspaces[1] == workspaces[1] - workspaces[0] > 0
