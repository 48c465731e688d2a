"""What first light times: for each number of rows the table's form of the product, others, and P stored in bfloat16.

First those of the package's machine code, then what Triton compiles here.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_check.light_checks import SEED, Form, difference
from bench.projection.checks import Call, some_rows
from bench.projection.gpu_clock import Clock, captured
from poc_kernels import definition, reference
from poc_kernels.definition import Request
from poc_kernels.kernels.cuda import forms as shipped_forms
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile

SIZE = 8192
"""D."""
GROUPS = (
    (16, 8192),
    (8, 8192),
    (16, 64),
    (8, 64),
    (16, 8),
    (16, 2048),
    (8, 8),
    (16, 256),
    (8, 2048),
    (16, 1),
    (16, 32),
)
"""(activation bits, rows), the ones that say most first."""
COLD_ROWS = 64
CHECKED_COLUMNS = 96
"""The first and the last of this number are compared with the reference."""


class Timed(NamedTuple):
    """The time of a form, or why it has none."""

    name: str
    seconds: float | None
    error: str | None = None


def table_form(capability: tuple[int, int], bits: int, rows: int, size: int, sms: int, shipped: bool = False) -> Form:
    """Return the form that a call takes, by the machine code that is shipped or by Triton."""
    arithmetic = tile_table.arithmetic(capability)
    if shipped:
        tile = shipped_forms.choose(capability, rows, bits, size % 16 == 0)
    else:
        tile = tile_table.choose(capability, rows, bits, arithmetic)
    tiles = -(-rows // tile.rows) * -(-size // tile.columns)
    return Form(bits, tile, tile_table.splits(capability, tile, tiles, -(-size // 128), sms), arithmetic, shipped)


def shipped_variants(capability: tuple[int, int], bits: int, rows: int, size: int, sms: int) -> list[Form]:
    """Return the shipped forms to time, the table's first: other parts of K of few rows, other tiles of many."""
    chosen = table_form(capability, bits, rows, size, sms, shipped=True)
    if rows <= COLD_ROWS:
        return [chosen] + [chosen._replace(parts=parts) for parts in (1, 2, 4, 8) if parts != chosen.parts]
    others = [tile for tile in shipped_forms.tiles(capability, bits, size % 16 == 0) if tile != chosen.tile]
    return [chosen] + [chosen._replace(tile=tile, parts=1) for tile in others if tile.rows >= COLD_ROWS]


def variants(capability: tuple[int, int], bits: int, rows: int, size: int, sms: int) -> list[Form]:
    """Return the forms to time, the table's first: other parts of K, columns, stages, the loop without overlap."""
    chosen = table_form(capability, bits, rows, size, sms)
    tile, forms = chosen.tile, [chosen]
    if chosen.arithmetic != "int8":
        return forms
    if rows <= COLD_ROWS:
        forms += [chosen._replace(parts=parts) for parts in (1, 2, 3, 4, 6, 8) if parts != chosen.parts]
        other = (
            Tile(64, tile.rows, 4, tile.stages, tile.run) if tile.columns != 64 else tile._replace(columns=128, warps=8)
        )
        forms += [Form(bits, other, parts) for parts in (2, 3, 4)]
    if capability >= (9, 0):
        forms.append(chosen._replace(tile=tile._replace(turn=3 - tile.turn)))
        if rows > COLD_ROWS:
            forms += [
                chosen._replace(tile=tile._replace(stages=stages)) for stages in (2, 3, 4) if stages != tile.stages
            ]
            forms.append(Form(bits, Tile(64, tile.rows, 4, 3, tile.run), 1))
    return forms


def forms_to_check(capability: tuple[int, int], size: int, sms: int) -> Iterator[Form]:
    """Yield the forms of all groups, each compiled kernel once."""
    seen = set()
    for bits, rows in GROUPS:
        for form in variants(capability, bits, rows, size, sms):
            key = form._replace(parts=min(form.parts, 2))
            if key not in seen:
                seen.add(key)
                yield form._replace(parts=1 if form.parts == 1 else 3)


def time_group(device: torch.device, bits: int, rows: int, forms: list[Form], size: int, seconds: float) -> list[Timed]:
    """Time forms in turn with the stored product, as graphs; a form with wrong bits, or that raises, is not timed."""
    on_cpu, seed = definition.seed_tensor(SEED, "cpu"), definition.seed_tensor(SEED, device)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)
    request = Request(
        domain=0,
        coefficient=definition.coefficient(definition.DEFAULT_STD),
        activation_bits=bits,
        columns=size,
        residual=True,
    )
    expected = _expected(x, on_cpu, request)
    calls: dict[str, Call] = {}
    failed = []
    for form in forms:
        call = functools.partial(form.project, x, seed, request)
        try:
            wrong = difference(_sample(call()), expected)
        except Exception as error:  # of one form
            if "CUDA" in str(error) and "memory" not in str(error):
                raise  # the context is lost
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        if wrong:
            failed.append(Timed(str(form), None, wrong))
        else:
            calls[str(form)] = call
    p = torch.randn(size, size, device=device).to(torch.bfloat16) * 0.01
    calls["stored"] = lambda: torch.addmm(x, x, p)
    with captured(calls, device) as graphs:
        times = Clock(device).interleaved(graphs, seconds, min_rounds=3, max_rounds=30, cold=rows <= COLD_ROWS)
    return [Timed(name, statistics.median(samples)) for name, samples in times.items()] + failed


def _sample(y: Tensor) -> Tensor:
    """Return the columns that are compared, of a few rows."""
    rows = some_rows(y)
    return torch.cat([y[rows, :CHECKED_COLUMNS], y[rows, -CHECKED_COLUMNS:]], dim=1)


def _expected(x: Tensor, seed: Tensor, request: Request) -> Tensor:
    few, columns = x[some_rows(x)].cpu(), min(CHECKED_COLUMNS, x.shape[1])
    parts: list[Any] = [
        reference.project(few, seed, request._replace(column_start=start, columns=columns))
        for start in (0, x.shape[1] - columns)
    ]
    return torch.cat(parts, dim=1)
