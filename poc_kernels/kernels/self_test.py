"""Known answers that a backend must give on a device before it is used there.

``known_answers.json`` holds a part of the definition's vectors: entries, both forms of the product in every dtype and
both activation widths, and rows of signed zeros, subnormals, NaN, infinities, near overflow, outliers and ties.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from .. import definition
from . import Backend

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def _known_answers() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("known_answers.json").read_text()
    answers: dict[str, Any] = json.loads(text)
    return answers


def digest(values: Tensor) -> str:
    """SHA-256, in hexadecimal, of the values of a tensor: row-major, little endian, in its own dtype."""
    local = values.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(local.data_ptr(), local.numel() * local.element_size())).hexdigest()


def activations(case: dict[str, Any]) -> Tensor:
    """x [M, K] of a case of the vectors, from its formula or bit by bit."""
    dtype = _DTYPES[case["dtype"]]
    if "x_hex" in case:
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        wide = torch.tensor([[int(word, 16) for word in row.split()] for row in case["x_hex"]], device="cpu")
        half = 1 << (8 * integer.itemsize - 1)
        signed = torch.where(wide >= half, wide - 2 * half, wide)
        return signed.to(integer).view(dtype)
    index = torch.arange(case["M"] * case["K"], device="cpu").reshape(case["M"], case["K"]) + case["x_salt"]
    unit = (index * 2654435761 % 2**32).double() / 2**32 * 2 - 1
    scaled: Tensor = unit * case["x_amp"]
    return scaled.float().to(dtype)


def _seed(case: dict[str, Any], device: torch.device) -> Tensor:
    return definition.seed_tensor(int(case["seed"], 16), device)


def _wrong_products(backend: Backend, device: torch.device, case: dict[str, Any], residual: bool) -> list[str]:
    x = activations(case).to(device)
    wholes = {"row_mask": None, "column_start": 0, "columns": case.get("N", case["K"])}
    variants = {"sha256": wholes}
    if "mask" in case:
        variants["masked_sha256"] = {
            **wholes,
            "row_mask": torch.tensor(case["mask"], dtype=torch.bool, device=device),
        }
        variants["shard_sha256"] = {
            **wholes,
            "column_start": case["column_start"],
            "columns": case["columns"],
        }
    return [
        f"{'residual' if residual else 'projection'} {key} of {case['dtype']}, K = {case['K']}, {case['bits']} bits"
        for key, variant in variants.items()
        if digest(
            backend.project(
                x,
                _seed(case, device),
                domain=case["domain"],
                coefficient=definition.coefficient(case["std"]),
                activation_bits=case["bits"],
                residual=residual,
                **variant,
            )
        )
        != case[key]
    ]


def wrong_answers(backend: Backend, device: torch.device, answers: dict[str, Any] | None = None) -> list[str]:
    """Which known answers ``backend`` gets wrong on ``device``; empty if it may be used there.

    ``answers`` has the layout of the definition's vectors; the package's own known answers unless given.
    An exception that the backend raises counts as a wrong answer, unless it `is_transient`: that is raised.
    """
    return found_wrong(lambda: _wrong_answers(backend, device, answers or _known_answers()))


def found_wrong(check: Callable[[], list[str]]) -> list[str]:
    """What ``check`` finds wrong with kernels; or the exception that it raises, unless that `is_transient` of them."""
    try:
        return check()
    except Exception as error:  # whatever it is, such kernels are not to be used
        if is_transient(error):
            raise
        return [f"{type(error).__name__}: {error}"]


def is_transient(error: Exception) -> bool:
    """Whether an exception tells of a condition that passes: no memory left, or a CUDA graph that is being captured.

    Triton's are RuntimeErrors with the driver's words; a capture in another thread can make any allocation fail.
    """
    words = str(error).lower()
    passing = "out of memory" in words or "captur" in words
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and passing)


def _wrong_answers(backend: Backend, device: torch.device, answers: dict[str, Any]) -> list[str]:
    wrong = [
        f"entries from k = {case['k0']}, n = {case['n0']} of domain {case['domain']}"
        for case in answers["entries"]
        if digest(backend.entries(_seed(case, device), case["domain"], case["k0"], case["K"], case["n0"], case["N"]))
        != case["sha256_int16_le"]
    ]
    for case in answers["residual"] + answers["edge"]:
        wrong += _wrong_products(backend, device, case, residual=True)
    for case in answers["projection"]:
        wrong += _wrong_products(backend, device, case, residual=False)
    return wrong
