"""What first light checks of the package's machine code: each code object by itself, by the name of its form.

Nothing of it needs Triton's compiler. Where the native core has no launcher, `driver` launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.gpu_check import light_checks
from bench.gpu_check.light_checks import Form, Workspace, difference
from poc_kernels import reference
from poc_kernels.kernels.cuda import forms, launcher, package, product
from poc_kernels.kernels.triton import plan
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.protocol import cuda_inputs


def names(capability: tuple[int, int]) -> list[str]:
    """Return the code objects that the package has for a compute capability, and those that it lacks.

    Raises:
        PackageError: it has no file for it, or one that cannot be used.
    """
    there = package.read(package.path_of(capability)).objects
    wanted = [form.name for form in (*forms.projection_forms(capability), *cuda_inputs.forms())]
    return [*wanted, *(name for name in there if name not in wanted)]


def groups(of: list[str]) -> dict[str, list[str]]:
    """Return names by what they have in common, the most telling first.

    A group is checked in one process: beginning to use a GPU takes longer than a check.
    """
    found: dict[str, list[str]] = {}
    for name in of:
        kind, *rest = name.split("-")
        key = f"{kind} {rest[0]} {rest[1]} bits" if kind in ("product", "quantise") else "entries and inputs"
        found.setdefault(key, []).append(name)
    return dict(sorted(found.items(), key=lambda item: _urgency(item[0])))


def _urgency(group: str) -> tuple[int, bool, str]:
    dtype = next((i for i, name in enumerate(("bfloat16", "entries", "float32")) if name in group), 3)
    return dtype, "16 bits" not in group, group


def check(device: torch.device, name: str) -> str | None:
    """Launch a code object, and compare all that it writes with the reference."""
    capability, _ = plan.hardware(device)
    try:
        entry = launcher._package(capability).manifest["kernels"][name]
    except KeyError:
        return f"no code of that name in {package.path_of(capability).name}"
    constants, dtype = entry["constants"], name.split("-")[1:2]
    if entry["kernel"] == "product_kernel":
        bits, aligned = constants["BITS"], "columns" in entry["aligned_to_16"]
        shape = constants["COLUMNS"], constants["ROWS"]
        tile = next(tile for tile in forms.tiles(capability, bits, aligned) if tile[:2] == shape)
        form = Form(bits, tile, 3 if constants["SPLIT"] else 1, tile_table.arithmetic(capability), shipped=True)
        return light_checks.product(device, form, dtype[0], aligned)
    if entry["kernel"] == "quantise_kernel":
        return _quantised(device, name, dtype[0], constants)
    if entry["kernel"] == "entries_kernel":
        on_cpu, seed = light_checks._seeds(device)
        window = (1, 5, 200, 7, 133)
        return difference(product.entries(seed, *window), reference.entries(on_cpu, *window))
    return light_checks.random_inputs(device, "int32" if name == "hash" else dtype[0], cuda_inputs)


def _quantised(device: torch.device, name: str, dtype: str, constants: Mapping[str, Any]) -> str | None:
    """Quantise rows as long as the form takes them, which are aligned or else lie at odd places."""
    aligned, bits = constants["ALIGNED_ROWS"], constants["BITS"]
    k = constants["BLOCK"] - 16 if constants["ONE_BLOCK"] else constants["BLOCK"] + 112
    if device.type == "cpu" and k < forms.SHORTEST_BLOCK:
        k = 304
    first, gap = (0, 16) if aligned else (1, 3)
    x = light_checks.rows_to_quantise(dtype, k if aligned else k - 3)
    rows, k = x.shape
    memory = torch.zeros(first + rows * (k + gap), dtype=x.dtype, device=device)
    placed = memory[first:].view(rows, k + gap)[:, :k]
    placed.copy_(x)
    work = Workspace(rows, k, bits, torch.float16 if constants["FP16"] else torch.int8, device)
    _launch(name, (work.programs, 1), work.numbers(row_stride=k + gap), placed, *work.tensors)
    return work.wrong(x, constants["RUN"])


def _launch(name: str, grid: tuple[int, int], numbers: tuple[int, ...], *tensors: Tensor) -> None:
    device = tensors[0].device
    launch = launcher.launch_of(device, name)
    launch(*launcher.current_stream(device), *grid, *(tensor.data_ptr() for tensor in tensors), *numbers)


def check_group(device: torch.device, of: list[str]) -> dict[str, str | None]:
    """Check code objects one after another; returns what is wrong by name.

    Raises:
        Exception: that of a check; the others of the group then say nothing.
    """
    return {name: check(device, name) for name in of}
