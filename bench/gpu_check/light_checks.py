"""What first light checks on a GPU, each kernel by itself, in all values: what is wrong, not only that it is.

A check returns nothing if all is right, else a sentence. They need Triton and the package's sources alone. On a CPU
(TRITON_INTERPRET=1) they run small cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from poc_kernels import backends, definition, reference
from poc_kernels.definition import Request
from poc_kernels.kernels.triton import plan
from poc_kernels.kernels.triton import product as kernels
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile
from poc_kernels.protocol import inputs, triton_inputs

SEED = 0x123456789ABCDEF
REPEATS = 200


class Form(NamedTuple):
    """A way to compute a product."""

    bits: int
    tile: Tile
    parts: int
    """Of K."""
    arithmetic: str = "int8"

    def __str__(self) -> str:
        columns, rows, warps, stages = self.tile[:4]
        cut = f" in {self.parts}" if self.parts > 1 else ""
        kind = "" if self.arithmetic == "int8" else f" {self.arithmetic}"
        return f"{self.bits} bits{kind} {columns}x{rows} warps {warps} stages {stages} turn {self.tile.turn}{cut}"


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


def random_inputs(device: torch.device, dtype: str) -> str | None:
    """Draw the protocol's hashes (int32) or normal numbers."""
    seeds = torch.tensor([[0], [1], [-(2**31)], [-1]], dtype=torch.int32)
    if dtype == "int32":
        return difference(triton_inputs.hash32(seeds.to(device), 1000, 999), inputs._plain_hash32(seeds, 1000, 999))
    kind = getattr(torch, dtype)
    return difference(triton_inputs.normal(seeds.to(device), 999, kind), inputs._plain_normal(seeds, 999, kind))


def quantised(device: torch.device, dtype: str, bits: int, k: int) -> str | None:
    """Round rows of every kind and clear words: what is in the limbs, the sums of q, and the words."""
    rows, run, limb_count = 20, 4, bits // 8
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k))
    x[1] *= 1e-30
    x[2, 3], x[3], x[4, 0] = torch.nan, 0, 3e4
    x = x.to(getattr(torch, dtype))
    panels, (_, warps) = -(-k // plan.PANEL), plan.block_of(k)
    limbs = torch.zeros(panels, limb_count, rows, plan.PANEL, dtype=torch.int8, device=device)
    exponents, sums = torch.zeros(2, rows, dtype=torch.int32, device=device)
    cleared = torch.ones(5000, dtype=torch.int32, device=device)
    kernels.quantise_kernel[(rows + -(-len(cleared) // plan.CLEAR),)](
        *(x.to(device).view(kernels._BITS_DTYPES[x.dtype]), limbs, exponents, sums, cleared, limbs),
        *(rows, k, rows, rows, len(cleared), k, 0),
        **plan.quantise_constants(plan.DTYPE_CODES[x.dtype], bits, run, False, k, k % 16 == 0),
        num_warps=warps,
        enable_fp_fusion=False,
    )
    quad, byte = torch.arange(k) // 4, torch.arange(k) % 4
    place = (quad // 16 * 16 + quad % 4 * 4 + quad // 4 % 4) * 4 + byte  # in runs of 4
    by_row = limbs.cpu().long().permute(2, 1, 0, 3).reshape(rows, limb_count, -1)[:, :, place]
    q = reference.quantise(x, bits).q.long()
    got = 256 * by_row[:, 0] + by_row[:, 1] if bits == 16 else by_row[:, 0]
    if wrong := difference(got, q):
        return f"limbs {wrong}"
    if wrong := difference(sums[:, None].long(), q.sum(dim=1, keepdim=True)):
        return f"sums {wrong}"
    return "WRONG: words that are not cleared" if cleared.any() else None


def product(device: torch.device, form: Form) -> str | None:
    """Multiply by one tile: rows beyond a tile, the largest sums, a mask, a shard."""
    small = device.type == "cpu"
    m, k, columns = (9, 300, 70) if small else (form.tile.rows + 3, 2304, 2 * form.tile.columns + 44)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
    start = 130
    signs = reference.entries(_seeds(device)[0], 9, 0, k, start, 1)[:, 0].sign().to(x.dtype)
    x[0], x[1] = signs * 1.75, signs * -2.0
    mask = torch.arange(m) % 7 != 3
    on_cpu, seed = _seeds(device)
    request = _request(columns, form.bits, column_start=start, row_mask=mask)
    expected = reference.project(x, on_cpu, request)
    choices = {"tile": form.tile, "splits": form.parts, "arithmetic": form.arithmetic}
    y = kernels.project(x.to(device), seed, request._replace(row_mask=mask.to(device)), **choices)
    return difference(y, expected)


def backend(device: torch.device, name: str) -> str | None:
    """Ask a backend for all known answers, and for what it checks beyond them."""
    chosen = next(each for each in backends.backends() if each.name == name)
    reason = chosen.unavailable(device)
    return f"refused: {reason}" if reason else "; ".join(backends._wrong(chosen, device)) or None


def repeated(device: torch.device, bits: int) -> str | None:
    """Make the same call many times, K in parts: a race shows as a difference."""
    rows, size, repeats = (3, 256, 2) if device.type == "cpu" else (40, 8192, REPEATS)
    _, seed = _seeds(device)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)
    request = _request(size, bits)
    first = kernels.project(x, seed, request)
    for number in range(repeats):
        wrong = difference(kernels.project(x, seed, request), first)
        if wrong:
            return f"call {number} of {repeats}: {wrong}"
    return None


def graph(device: torch.device) -> str | None:
    """Replay a captured call with new rows and seeds."""
    rows, size = 3, 256 if device.type == "cpu" else 1024
    on_cpu, seed = _seeds(device)
    x = torch.zeros(rows, size, dtype=torch.bfloat16, device=device)
    request = _request(size, 16)
    y, replay = _captured(x, seed, request)
    for number in range(2 if device.type == "cpu" else 10):
        fresh = torch.randn(rows, size, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
        x.copy_(fresh)
        seed.fill_(number)
        replay()
        wrong = difference(y, reference.project(fresh, on_cpu.fill_(number), request))
        if wrong:
            return f"replay {number}: {wrong}"
    return None


def _captured(x: Tensor, seed: Tensor, request: Request):  # type: ignore[no-untyped-def]
    """Return the result of a call and what computes it again."""
    y = kernels.project(x, seed, request)
    if x.device.type == "cpu":
        return y, lambda: y.copy_(kernels.project(x, seed, request))
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = kernels.project(x, seed, request)
    return y, captured.replay


def table_forms(capability: tuple[int, int]) -> Iterator[Form]:
    """Yield every tile of the table, with K whole and in parts; then float16 arithmetic."""
    for arithmetic, bits in itertools.product(("int8", "fp16"), (16, 8)):
        for tile in tile_table.tiles(capability, bits, arithmetic):
            for parts in tile_table.forms_of_k(capability):
                yield Form(bits, tile, parts if parts == 1 else 3, arithmetic)
