"""What several test files need: bit comparisons, guarded memory, rows of every kind, calls with defaults."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import poc_kernels
from poc_kernels import backends, definition, reference
from poc_kernels.definition import Request
from poc_kernels.kernels import Backend

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Largest(TorchDispatchMode):
    """Notes the largest memory that an operator of torch gives inside the block, in numbers of the tensor's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.numbers = max([self.numbers, *(each.untyped_storage().nbytes() // each.itemsize for each in tensors)])
        return result


def bits_of(values: Tensor) -> Tensor:
    """The bit patterns of a tensor, as int64 without sign."""
    integer = _INTEGERS[values.element_size()]
    bits = values.detach().cpu().contiguous().view(integer).long()
    return bits if values.element_size() == 8 else bits & ((1 << 8 * values.element_size()) - 1)


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor whose bit patterns are the given int64 numbers."""
    half = 1 << (8 * dtype.itemsize - 1)
    return (bits - 2 * half * (bits >= half)).to(_INTEGERS[dtype.itemsize]).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Fail unless dtype, shape and every bit agree; names the first coordinate that differs, with both values."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    got, want = bits_of(actual), bits_of(expected)
    if torch.equal(got, want):
        return
    differs = got != want
    at = tuple(differs.nonzero()[0].tolist())
    width = 2 * actual.element_size()
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {actual.numel()} elements differ, first at {at}: "
        f"got {actual[at].item()!r} ({got[at].item():0{width}x}), "
        f"expected {expected[at].item()!r} ({want[at].item():0{width}x})"
    )


# ---- calls ---------------------------------------------------------------------------------------------------------

PLAIN = Backend("reference", reference.project, reference.entries, unavailable=lambda device: None)


def requested(x: Tensor, std: float = 0.01, **options: Any) -> Request:
    """The product of ``x`` with the defaults of the public ops."""
    whole = Request(
        domain=0,
        coefficient=definition.coefficient(std),
        activation_bits=16,
        columns=x.shape[1] - options.get("column_start", 0),
        residual=True,
    )
    return whole._replace(**options)


def project(backend: Backend, x: Tensor, seed: int = 7, std: float = 0.01, **options: Any) -> Tensor:
    """A backend's product with the defaults of the public ops."""
    return backend.project(x, definition.seed_tensor(seed, x.device), requested(x, std, **options))


def expected(x: Tensor, **options: Any) -> Tensor:
    """The same product from the reference."""
    return project(PLAIN, x, **options)


def backend_named(name: str) -> Backend:
    return next(backend for backend in backends.backends() if backend.name == name)


# For a process without TRITON_INTERPRET: what Triton would compile for its calls, by its own rule and without a GPU.
WOULD_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

def run(kernel, *arguments, grid, warmup, **options):
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, options = binder(*arguments, **options)
    compiled.add((kernel.fn.__name__, str(specialization), str(options)))

compiled = set()
JITFunction.run = run
"""

PASSING_ERRORS = (
    torch.OutOfMemoryError("no memory left"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 132048 bytes."),
    RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    RuntimeError("CUDA error: operation failed due to a previous error during capture"),
)
"""What kernels raise where memory is short, or while another thread captures a graph: it says nothing of them."""

# ---- memory --------------------------------------------------------------------------------------------------------

_GUARD_BYTES = 256


@contextlib.contextmanager
def dirty_memory(fill: int) -> Iterator[None]:
    """torch.empty gives memory full of the byte ``fill`` between guards; the guards must still stand at the end."""
    allocated: list[Tensor] = []

    def dirty_empty(*size: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
        count = torch.Size(size).numel()
        whole = torch.full((2 * _GUARD_BYTES + count * dtype.itemsize,), fill, dtype=torch.uint8, **options)
        allocated.append(whole)
        return whole[_GUARD_BYTES : whole.numel() - _GUARD_BYTES].view(dtype).view(size)

    with mock.patch.object(torch, "empty", dirty_empty):
        yield
    assert allocated, "nothing was allocated through torch.empty: these guards guard nothing"
    for whole in allocated:
        assert (whole[:_GUARD_BYTES] == fill).all(), "wrote before the memory that it was given"
        assert (whole[-_GUARD_BYTES:] == fill).all(), "wrote beyond the memory that it was given"


# ---- rows of every kind --------------------------------------------------------------------------------------------

ROW_KINDS = (
    *("normal", "zeros", "huge", "tiny", "subnormal", "least exponent", "ties", "outlier"),
    *("spread", "cancelling", "nan", "infinity", "negative infinity"),
)


def _row(kind: str, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    limits = torch.finfo(dtype)
    normal = torch.randn(k, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1
    at = torch.randint(k, (), generator=generator)
    if kind == "zeros":
        return (signs * 0.0).to(dtype)
    if kind == "huge":
        return (normal.clamp(-1, 1) * limits.max).to(dtype)
    if kind == "tiny":
        return (normal * limits.tiny).to(dtype)
    if kind == "subnormal":
        return (signs * torch.randint(0, 64, (k,), generator=generator) * limits.smallest_normal * limits.eps).to(dtype)
    if kind == "least exponent":  # on both sides of 2^-100, below which the exponent stays
        return (normal * 2.0 ** -int(torch.randint(97, 114, (), generator=generator))).to(dtype)
    if kind == "ties":  # halves of the last place at either width, after a leader that sets the row's exponent
        step = 2.0 ** -int(torch.randint(0, 2, (), generator=generator) * 7 + 6)
        row = (torch.randint(-8, 8, (k,), generator=generator) + 0.5) * step
        row[0] = 1.0
        return row.to(dtype)
    if kind == "outlier":
        normal[at] = 3000.0
    if kind == "spread":
        normal *= torch.exp2(torch.randint(-140, 120, (k,), generator=generator).double())
        normal = normal.clamp(limits.min, limits.max)
    if kind == "cancelling":  # 1, -1, 1, -1: the sum of q is zero or one term
        normal = 1.0 - 2.0 * (torch.arange(k) % 2).double()
    row = normal.to(dtype)
    if kind == "nan":
        payload = torch.randint(1, 1 << 7, (), generator=generator)
        exponent = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
        sign = torch.randint(0, 2, (), generator=generator) << (8 * dtype.itemsize - 1)
        row[at] = from_bits((exponent | payload | sign).reshape(1), dtype)[0]
    if kind == "infinity":
        row[at] = torch.inf
    if kind == "negative infinity":
        row[at] = -torch.inf
    return row


def rows_of_every_kind(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[rows, k] activations: kinds of rows in an order of its own for each seed, half of them ordinary."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(2 * len(ROW_KINDS), (rows,), generator=generator).tolist()
    kinds = [ROW_KINDS[pick] if pick < len(ROW_KINDS) else "normal" for pick in picks]
    return torch.stack([_row(kind, k, dtype, generator) for kind in kinds])


def rows_of_sums(totals: Sequence[int], k: int, seed: int) -> Tensor:
    """[len(totals), k] float32 activations whose exact sums with column 0 are these, at 16 bits.

    A sum is that of q * (2 * e + 1): of q from large weights to small, each takes of what is left as much as it may.
    """
    weights = 2 * reference.entries(definition.seed_tensor(seed), 0, 0, k, 0, 1)[:, 0].long() + 1
    q = torch.zeros(len(totals), k, dtype=torch.int64)
    for row, total in enumerate(totals):
        left = total
        for at in weights.abs().argsort(descending=True).tolist():
            weight = int(weights[at])
            q[row, at] = max(-16000, min(16000, left // weight))  # below 2**14: q is x where the largest is from 2**13
            left -= int(q[row, at]) * weight
        assert left == 0, f"{k} activations cannot have the sum {total}"
    assert (q.abs().amax(1) >= 2**13).all()
    return q.float()


NEAR_ROUNDINGS = [
    sign * (high << 9) + rest
    for high in (2**23 + 1, 2**24 - 1, 2**24, 2**24 + 1)
    for sign in (1, -1)
    for rest in (0, 1, 255, 256, 257, 511)
]
"""Sums of 33 and 34 bits, near those from which they are rounded in other ways, on both sides of ties."""


LAYOUTS = ("contiguous", "padded", "transposed", "every second", "repeated row", "one column wide")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides (and, for a repeated row, other rows); NaN lies wherever x is not."""
    rows, k = x.shape
    if layout == "padded":
        wide = torch.full((rows + 2, k + 5), torch.nan, dtype=x.dtype)
        wide[1:-1, 3:-2] = x
        return wide[1:-1, 3:-2]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every second":
        wide = torch.full((rows, 2 * k), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "repeated row":
        return x[:1].clone().expand(rows, k)
    if layout == "one column wide":  # rows far apart
        wide = torch.full((rows, 3, k), torch.nan, dtype=x.dtype)
        wide[:, 1] = x
        return wide[:, 1]
    return x.contiguous()


# ---- other processes -----------------------------------------------------------------------------------------------


HANGS_SECONDS = 480
"""Only against hangs, before the tests' own limit of 600 s (Makefile): on 2 cores with 20 jobs, 10 s take minutes."""


def run_python(
    code: str, directory: Path, package_root: Path | None = None, launcher: Sequence[str] = (), **environment: str
) -> str:
    """What ``code`` prints in a fresh interpreter that has the package; fails with its errors if it fails.

    ``launcher`` is a command that starts the interpreter, which follows as its arguments.
    """
    root = package_root or Path(poc_kernels.__file__).parent.parent
    inherited = {name: value for name, value in os.environ.items() if name != "POC_KERNELS_BACKEND"}
    done = subprocess.run(
        [*launcher, sys.executable, "-c", code],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=HANGS_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
