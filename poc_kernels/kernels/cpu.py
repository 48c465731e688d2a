"""The native CPU kernels (``csrc/cpu``) behind the backend signature."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..definition import Request
from . import native, self_test
from .backend import Backend

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tiling(NamedTuple):
    """How a product is cut up; 0 leaves the choice to the kernel. No choice changes a bit: tests vary them."""

    block_rows: int = 0
    """Rows of x that are quantised at a time."""
    panel_columns: int = 0
    """Columns of P that are drawn at a time."""
    panel_k: int = 0
    """Rows of P that are drawn at a time."""
    form: int = 0
    """Which of the `forms` of the instruction set, counted from 1."""


_CHOSEN = Tiling()

_TRIED = ((1, 0), (9, 0), (9, 256))
"""How a trial repeats the rows of known answers, and ``panel_k``: none of these has a K of more than one panel."""


def instruction_sets() -> list[tuple[str, bool]]:
    """Return the names of the instruction sets in this build, best first, each with whether this CPU has it."""
    core = native.load()
    return [] if core is None else list(core.instruction_sets())


def forms(instruction_set: str) -> list[str]:
    """Return the names of the ways to multiply that an instruction set has, each meant for another number of rows."""
    core = native.load()
    assert core is not None
    return list(core.forms(instruction_set))


def backends() -> list[Backend]:
    """Return a backend for each instruction set in this build, best first."""
    return [
        Backend(
            name=f"native-{name}",
            project=functools.partial(project, instruction_set=name),
            entries=functools.partial(entries, instruction_set=name),
            unavailable=functools.partial(_unavailable, supported),
            wrong=functools.partial(_wrong_forms, name),
        )
        for name, supported in instruction_sets()
    ]


def _unavailable(supported: bool, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on the CPU only"
    return None if supported else "this CPU lacks the instructions"


def _wrong_forms(instruction_set: str, device: torch.device) -> list[str]:
    """Return which known answers a form gets wrong: for their few rows alone, and as the last of many rows.

    The many rows also with a K of several panels, whose sums are kept in memory from one to the next.
    """
    wrong = []
    for (number, form), (repeats, panel_k) in itertools.product(enumerate(forms(instruction_set), 1), _TRIED):
        backend = Backend(
            name=f"native-{instruction_set}",
            project=functools.partial(
                _last_of_many,
                instruction_set=instruction_set,
                tiling=Tiling(panel_k=panel_k, form=number),
                repeats=repeats,
            ),
            entries=functools.partial(entries, instruction_set=instruction_set),
            unavailable=functools.partial(_unavailable, True),
        )
        cut = f"{repeats} times, {f'{panel_k} of K at a time, ' * (panel_k > 0)}by {form}"
        wrong += [f"{answer}, {cut}" for answer in self_test.wrong_answers(backend, device)]
    return wrong


def _last_of_many(
    x: Tensor, seed: Tensor, request: Request, *, instruction_set: str, tiling: Tiling, repeats: int
) -> Tensor:
    """Compute the product of the rows of ``x``, over and over as rows of one product, and return those of the last."""
    mask = None if request.row_mask is None else request.row_mask.repeat(repeats)
    many = request._replace(row_mask=mask)
    return project(x.repeat(repeats, 1), seed, many, instruction_set=instruction_set, tiling=tiling)[-len(x) :]


def project(
    x: Tensor, seed: Tensor, request: Request, *, instruction_set: str, threads: int = 0, tiling: Tiling = _CHOSEN
) -> Tensor:
    """Compute x @ P, or x + x @ P, for ``x`` [M, K] on the CPU: [M, columns] in the dtype of x.

    ``threads`` is ``torch.get_num_threads()`` if 0. Workspace: 2 bytes per element of the rows that are
    quantised at a time (16 MiB, or 256 rows if these take more), and per thread a panel of P of at most 512 KiB.
    """
    core = native.load()
    assert core is not None
    domain, coefficient, activation_bits, columns, residual, column_start, row_mask = request
    rows, k = x.shape
    if x.stride(1) != 1 and k > 1:
        x = x.contiguous()
    mask = None if row_mask is None else row_mask.contiguous()
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    projection = core.Projection(
        x=x.data_ptr(),
        dtype=_DTYPE_CODES[x.dtype],
        rows=rows,
        k=k,
        row_stride=x.stride(0),
        row_mask=0 if mask is None else mask.data_ptr(),
        y=y.data_ptr(),
        columns=columns,
        column_start=column_start,
        residual=residual,
        seed=seed.data_ptr(),
        domain=domain,
        coefficient=coefficient,
        activation_bits=activation_bits,
        threads=threads or torch.get_num_threads(),
        block_rows=tiling.block_rows,
        panel_columns=tiling.panel_columns,
        panel_k=tiling.panel_k,
        form=tiling.form,
    )
    workspace = torch.empty(projection.workspace_bytes(instruction_set), dtype=torch.uint8, device=x.device)
    projection.run(instruction_set, workspace.data_ptr())
    return y


def entries(
    seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int, *, instruction_set: str, threads: int = 0
) -> Tensor:
    """Draw the integers e[k_start : k_start + k, n_start : n_start + n] as int16 on the CPU."""
    core = native.load()
    assert core is not None
    out = torch.empty(k, n, dtype=torch.int16, device=seed.device)
    window = core.Entries(
        seed=seed.data_ptr(),
        domain=domain,
        k_start=k_start,
        k=k,
        n_start=n_start,
        n=n,
        out=out.data_ptr(),
        threads=threads or torch.get_num_threads(),
    )
    workspace = torch.empty(window.workspace_bytes(instruction_set), dtype=torch.uint8, device=seed.device)
    window.run(instruction_set, workspace.data_ptr())
    return out
