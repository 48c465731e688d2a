"""What first light checks on a GPU, each kernel by itself, in all values: what is wrong, not only that it is.

A check returns nothing if all is right, else a sentence. They need Triton and the package's sources alone. On a CPU
(TRITON_INTERPRET=1) they run small cases. `light_shipped` has those of each code object of the package.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from poc_kernels import backends, definition, reference
from poc_kernels.definition import Request
from poc_kernels.kernels.cuda import product as shipped_product
from poc_kernels.kernels.triton import plan
from poc_kernels.kernels.triton import product as kernels
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.device import NOT_FINITE
from poc_kernels.kernels.triton.tiles import Tile
from poc_kernels.protocol import Row, inputs, triton_inputs
from poc_kernels.protocol.vectors.vector import picks

SEED = 0x123456789ABCDEF
REPEATS = 200


class Form(NamedTuple):
    """A way to compute a product."""

    bits: int
    tile: Tile
    parts: int
    """Of K."""
    arithmetic: str = "int8"
    shipped: bool = False
    """By the package's machine code, not by what this Triton compiles."""

    def __str__(self) -> str:
        columns, rows, warps, stages = self.tile[:4]
        cut = f" in {self.parts}" if self.parts > 1 else ""
        kind = "" if self.arithmetic == "int8" else f" {self.arithmetic}"
        whose = "shipped " if self.shipped else ""
        return (
            f"{whose}{self.bits} bits{kind} {columns}x{rows} warps {warps} stages {stages} turn {self.tile.turn}{cut}"
        )

    def project(self, x: Tensor, seed: Tensor, request: Request) -> Tensor:
        """Compute a product in this way."""
        if self.shipped:
            return shipped_product.project(x, seed, request, self.tile, self.parts)
        return kernels.project(x, seed, request, tile=self.tile, splits=self.parts, arithmetic=self.arithmetic)


def difference(y: Tensor, expected: Tensor) -> str | None:
    """Return which rows and columns of y [rows, columns] have other bits than expected, None if none has."""
    y, expected = y.detach().cpu(), expected.detach().cpu()
    if y.dtype.is_floating_point:
        integer = {2: torch.int16, 4: torch.int32}[y.element_size()]
        y, expected = y.view(integer), expected.view(integer)
    wrong = (y != expected).nonzero()
    if not len(wrong):
        return None
    rows, columns = (wrong[:, axis].unique().tolist() for axis in (0, 1))
    row, column = wrong[0].tolist()
    return (
        f"WRONG: {len(wrong)} of {y.numel()}; rows {ranges(rows)}; columns {ranges(columns)}; first at "
        f"[{row}, {column}]: {y[row, column]:#x} instead of {expected[row, column]:#x}"
    )


def ranges(numbers: list[int], most: int = 8) -> str:
    """Format ascending numbers as ranges: 0-15, 20, 24-31 and so on, at most that many."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    words = ["-".join(map(str, run)) for run in runs[:most]]
    return ", ".join(words) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _request(columns: int, bits: int, **options: object) -> Request:
    whole = Request(
        domain=9,
        coefficient=definition.coefficient(definition.DEFAULT_STD),
        activation_bits=bits,
        columns=columns,
        residual=True,
    )
    return whole._replace(**options)  # type: ignore[arg-type]


def _seeds(device: torch.device) -> tuple[Tensor, Tensor]:
    return definition.seed_tensor(SEED, "cpu"), definition.seed_tensor(SEED, device)


def torch_itself(device: torch.device) -> str | None:
    """Multiply and copy."""
    ones = torch.ones(256, 256, device=device)
    return None if float((ones @ ones).sum()) == 256.0**3 else "WRONG"


def entries(device: torch.device) -> str | None:
    """Draw a window of P: Philox, the tables, the signs."""
    on_cpu, seed = _seeds(device)
    window = (1, 5, 200, 7, 133)
    return difference(kernels.entries(seed, *window), reference.entries(on_cpu, *window))


def random_inputs(device: torch.device, dtype: str, by: ModuleType = triton_inputs) -> str | None:
    """Draw the protocol's hashes (int32) or normal numbers by the kernels of a module."""
    seeds = torch.tensor([[0], [1], [-(2**31)], [-1]], dtype=torch.int32)
    if dtype == "int32":
        return difference(by.hash32(seeds.to(device), 1000, 999), inputs._plain_hash32(seeds, 1000, 999))
    kind = getattr(torch, dtype)
    return difference(by.normal(seeds.to(device), 999, kind), inputs._plain_normal(seeds, 999, kind))


def picked(device: torch.device) -> str | None:
    """Pick a vector's coordinates, in the order in which torch selects them on a GPU, as the network's nodes do."""
    rows = [Row("public key", nonce) for nonce in range(16)]
    for k, dim in itertools.product((2, 12, 64, 256), (256, 576, 1000, 4096, 8192)):
        seeds = [inputs.seed32(f"block_{row.public_key}_nonce_{row.nonce}_pick_{k}") for row in rows]
        scores = inputs.hash32(seeds, 0, dim).long() & 0xFFFFFFFF  # of the CPU
        selected = _selected(-scores.to(device), k)
        if wrong := difference(picks("block", rows, dim, k, device), selected):
            return f"{k} of {dim} in another order than torch's: {wrong}"
    return None


def _selected(scores: Tensor, k: int) -> Tensor:
    """Return where the k largest are, as torch has them on a GPU; on a CPU, as the source of torch's kernel reads."""
    if scores.device.type != "cpu":
        return torch.topk(scores, k, largest=True, sorted=False).indices
    last = scores.topk(k).values[:, -1:]
    better = [row.nonzero().flatten() for row in scores > last]
    return torch.stack(
        [torch.cat([of, (row == end).nonzero()[0]]) for of, row, end in zip(better, scores, last, strict=True)]
    )


def quantised(device: torch.device, dtype: str, bits: int, k: int) -> str | None:
    """Round rows of every kind and clear words."""
    run, x = 4, rows_to_quantise(dtype, k)
    work = Workspace(len(x), k, bits, torch.int8, device)
    _, warps = plan.block_of(k)
    kernels.quantise_kernel[(work.programs,)](
        x.to(device).view(kernels._BITS_DTYPES[x.dtype]),
        *work.tensors,
        *work.numbers(row_stride=k),
        **plan.quantise_constants(plan.DTYPE_CODES[x.dtype], bits, run, False, k, k % 16 == 0),
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return work.wrong(x, run)


def rows_to_quantise(dtype: str, k: int) -> Tensor:
    """Return rows [20, k] of every kind."""
    x = torch.randn(20, k, generator=torch.Generator().manual_seed(k))
    x[1] *= 1e-30
    x[2, 3], x[3], x[4, 0] = torch.nan, 0, 3e4
    return x.to(getattr(torch, dtype))


class Workspace:
    """What quantise_kernel writes for rows of k numbers, all of them in one tile."""

    def __init__(self, rows: int, k: int, bits: int, kind: torch.dtype, device: torch.device) -> None:
        self.rows, self.k, self.bits = rows, k, bits
        self.limbs = torch.zeros(-(-k // plan.PANEL), bits // 8, rows, plan.PANEL, dtype=kind, device=device)
        self.exponents, self.sums = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.cleared = torch.ones(5000, dtype=torch.int32, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernel is given after x; without a mask any memory is one."""
        return self.limbs, self.exponents, self.sums, self.cleared, self.limbs.view(torch.int8)

    @property
    def programs(self) -> int:
        return self.rows + -(-len(self.cleared) // plan.CLEAR)

    def numbers(self, row_stride: int) -> tuple[int, ...]:
        """Return the numbers that the kernel is given."""
        return self.rows, self.k, self.rows, self.rows, len(self.cleared), row_stride, 0

    def wrong(self, x: Tensor, run: int) -> str | None:
        """Return what is wrong: in the limbs, which lie in runs of ``run``, the exponents, the sums, or the words."""
        quad, byte = torch.arange(self.k) // 4, torch.arange(self.k) % 4
        call, word = quad // 4 % 4, quad % 4
        in_calls = word * 4 + call if run == 4 else word // 2 * 8 + call * 2 + word % 2
        place = (quad // 16 * 16 + in_calls) * 4 + byte
        by_row = self.limbs.cpu().long().permute(2, 1, 0, 3).reshape(self.rows, self.bits // 8, -1)[:, :, place]
        expected = reference.quantise(x, self.bits)
        q = expected.q.long()
        exponents = torch.where(expected.finite, expected.exponent, NOT_FINITE.value)
        got = {
            "limbs": (256 * by_row[:, 0] + by_row[:, 1] if self.bits == 16 else by_row[:, 0], q),
            "exponents": (self.exponents[:, None], exponents),
            "sums": (self.sums[:, None].long(), q.sum(dim=1, keepdim=True)),
        }
        for what, (found, right) in got.items():
            if wrong := difference(found, right):
                return f"{what} {wrong}"
        return "WRONG: words that are not cleared" if self.cleared.any() else None


def product(device: torch.device, form: Form, dtype: str = "bfloat16", aligned: bool = False) -> str | None:
    """Multiply by one tile: rows beyond a tile, the largest sums, a mask, a shard of ``aligned`` columns or not."""
    small = device.type == "cpu"
    m, k, columns = (9, 300, 64) if small else (form.tile.rows + 3, 2304, 2 * form.tile.columns + 32)
    columns += 16 if aligned else 12
    x, request, expected = _known_product(dtype, form.bits, m, k, columns)
    assert request.row_mask is not None
    on_device = request._replace(row_mask=request.row_mask.to(device))
    return difference(form.project(x.to(device), _seeds(device)[1], on_device), expected)


@functools.lru_cache(maxsize=4)
def _known_product(dtype: str, bits: int, m: int, k: int, columns: int) -> tuple[Tensor, Request, Tensor]:
    """Return activations, a request and the result that the definition gives."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(getattr(torch, dtype))
    start, seed = 130, definition.seed_tensor(SEED, "cpu")
    signs = reference.entries(seed, 9, 0, k, start, 1)[:, 0].sign().to(x.dtype)
    x[0], x[1] = signs * 1.75, signs * -2.0
    request = _request(columns, bits, column_start=start, row_mask=torch.arange(m) % 7 != 3)
    return x, request, reference.project(x, seed, request)


def backend(device: torch.device, name: str) -> str | None:
    """Ask a backend for all known answers, and for what it checks beyond them."""
    chosen = next(each for each in backends.backends() if each.name == name)
    reason = chosen.unavailable(device)
    return f"refused: {reason}" if reason else "; ".join(backends._wrong(chosen, device)) or None


def _project(shipped: bool) -> Callable[[Tensor, Tensor, Request], Tensor]:
    """Return what computes a product by the tile of the table."""
    return shipped_product.project if shipped else kernels.project


def repeated(device: torch.device, bits: int, shipped: bool = False) -> str | None:
    """Make the same call many times, K in parts: a race shows as a difference."""
    project = _project(shipped)
    rows, size, repeats = (3, 256, 2) if device.type == "cpu" else (40, 8192, REPEATS)
    _, seed = _seeds(device)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)
    request = _request(size, bits)
    first = project(x, seed, request)
    for number in range(repeats):
        wrong = difference(project(x, seed, request), first)
        if wrong:
            return f"call {number} of {repeats}: {wrong}"
    return None


def graph(device: torch.device, shipped: bool = False) -> str | None:
    """Replay a captured call with new rows and seeds."""
    rows, size = 3, 256 if device.type == "cpu" else 1024
    on_cpu, seed = _seeds(device)
    x = torch.zeros(rows, size, dtype=torch.bfloat16, device=device)
    request = _request(size, 16)
    y, replay = _captured(functools.partial(_project(shipped), x, seed, request), device)
    for number in range(2 if device.type == "cpu" else 10):
        fresh = torch.randn(rows, size, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
        x.copy_(fresh)
        seed.fill_(number)
        replay()
        wrong = difference(y, reference.project(fresh, on_cpu.fill_(number), request))
        if wrong:
            return f"replay {number}: {wrong}"
    return None


def _captured(call: Callable[[], Tensor], device: torch.device):  # type: ignore[no-untyped-def]
    """Return the result of a call and what computes it again."""
    y = call()
    if device.type == "cpu":
        return y, lambda: y.copy_(call())
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = call()
    return y, captured.replay


def table_forms(capability: tuple[int, int]) -> Iterator[Form]:
    """Yield every tile of the table, with K whole and in parts; then float16 arithmetic."""
    for arithmetic, bits in itertools.product(("int8", "fp16"), (16, 8)):
        for tile in tile_table.tiles(capability, bits, arithmetic):
            for parts in tile_table.forms_of_k(capability):
                yield Form(bits, tile, parts if parts == 1 else 3, arithmetic)
