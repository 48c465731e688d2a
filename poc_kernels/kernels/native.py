"""The native CPU kernels (``csrc/cpu``) behind the backend signature."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tiling(NamedTuple):
    """How a product is cut up; 0 leaves the choice to the kernel. No choice changes a bit: tests vary them."""

    rows: int = 0
    columns: int = 0
    k: int = 0


@functools.cache
def load() -> ModuleType | None:
    """The compiled module, or None, with one warning, where it was not built or does not load."""
    try:
        return importlib.import_module("poc_kernels._native")
    except ImportError as error:
        root = Path(__file__).parents[2]
        where = f"imported from its sources in {root}" if (root / "pyproject.toml").exists() else "installed"
        warnings.warn(
            f"poc_kernels is {where} without its native core ({error}): plain torch serves in its place, with the "
            "same bits and much slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def instruction_sets() -> list[tuple[str, bool]]:
    """Names of the instruction sets in this build, best first, and whether this processor has each."""
    native = load()
    return [] if native is None else list(native.instruction_sets())


def project(
    x: Tensor,
    seed: Tensor,
    *,
    domain: int,
    coefficient: float,
    activation_bits: int,
    row_mask: Tensor | None,
    column_start: int,
    columns: int,
    residual: bool,
    instruction_set: str,
    threads: int | None = None,
    tiling: Tiling = Tiling(),  # noqa: B008 (immutable)
) -> Tensor:
    """x @ P, or x + x @ P, for ``x`` [M, K] on the CPU: [M, columns] in the dtype of x.

    ``threads`` is ``torch.get_num_threads()`` unless given. Workspace: 2 bytes for
    each element of the rows at work, 16 MiB or 256 rows of them, and for each thread a panel of P of at most 512 KiB.
    """
    native = load()
    assert native is not None
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    mask = None if row_mask is None else row_mask.contiguous()
    y = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
    projection = native.Projection(
        x=x.data_ptr(),
        dtype=_DTYPE_CODES[x.dtype],
        rows=x.shape[0],
        k=x.shape[1],
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
        block_rows=tiling.rows,
        panel_columns=tiling.columns,
        panel_k=tiling.k,
    )
    workspace = torch.empty(projection.workspace_bytes(instruction_set), dtype=torch.uint8, device=x.device)
    projection.run(instruction_set, workspace.data_ptr())
    return y


def entries(
    seed: Tensor,
    domain: int,
    k_start: int,
    k: int,
    n_start: int,
    n: int,
    *,
    instruction_set: str,
    threads: int | None = None,
) -> Tensor:
    """The integers e[k_start : k_start + k, n_start : n_start + n] as int16 on the CPU."""
    native = load()
    assert native is not None
    out = torch.empty(k, n, dtype=torch.int16, device=seed.device)
    request = native.Entries(
        seed=seed.data_ptr(),
        domain=domain,
        k_start=k_start,
        k=k,
        n_start=n_start,
        n=n,
        out=out.data_ptr(),
        threads=threads or torch.get_num_threads(),
    )
    workspace = torch.empty(request.workspace_bytes(instruction_set), dtype=torch.uint8, device=seed.device)
    request.run(instruction_set, workspace.data_ptr())
    return out
