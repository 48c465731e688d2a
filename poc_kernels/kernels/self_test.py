"""Known answers that a backend must give on a device before it is used there.

``known_answers.json`` holds a part of the definition's vectors: entries, both forms of the product in every dtype and
with both activation_bits, and rows with signed zeros, subnormals, NaN, infinities, outliers, ties and near overflow.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from .. import definition
from .backend import Backend


@functools.cache
def _known_answers() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("known_answers.json").read_text()
    answers: dict[str, Any] = json.loads(text)
    return answers


def digest(values: Tensor) -> str:
    """Return SHA-256, in hexadecimal, of the values of a tensor: row-major, little endian, in its own dtype."""
    local = values.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(local.data_ptr(), local.numel() * local.element_size())).hexdigest()


def activations(case: dict[str, Any]) -> Tensor:
    """Make x [M, K] of a case of the vectors, from its formula or bit by bit."""
    dtype = getattr(torch, case["dtype"])
    if "x_hex" in case:
        bits = torch.uint32 if dtype == torch.float32 else torch.uint16
        words = [[int(word, 16) for word in row.split()] for row in case["x_hex"]]
        return torch.tensor(words, dtype=bits, device="cpu").view(dtype)
    index = torch.arange(case["M"] * case["K"], device="cpu").reshape(case["M"], case["K"]) + case["x_salt"]
    unit = (index * 2654435761 % 2**32).double() / 2**32 * 2 - 1
    scaled: Tensor = unit * case["x_amp"]
    return scaled.float().to(dtype)


def _seed(case: dict[str, Any], device: torch.device) -> Tensor:
    return definition.seed_tensor(int(case["seed"], 16), device)


def _wrong_products(backend: Backend, device: torch.device, case: dict[str, Any], residual: bool) -> list[str]:
    x = activations(case).to(device)
    whole = definition.Request(
        domain=case["domain"],
        coefficient=definition.coefficient(case["std"]),
        activation_bits=case["bits"],
        columns=case.get("N", case["K"]),
        residual=residual,
    )
    requests = {"sha256": whole}
    if "mask" in case:
        row_mask = torch.tensor(case["mask"], dtype=torch.bool, device=device)
        requests["masked_sha256"] = whole._replace(row_mask=row_mask)
        requests["shard_sha256"] = whole._replace(column_start=case["column_start"], columns=case["columns"])
    return [
        f"{'residual' if residual else 'projection'} {key} of {case['dtype']}, K = {case['K']}, {case['bits']} bits"
        for key, request in requests.items()
        if digest(backend.project(x, _seed(case, device), request)) != case[key]
    ]


def wrong_answers(backend: Backend, device: torch.device, answers: dict[str, Any] | None = None) -> list[str]:
    """Return which known answers ``backend`` gets wrong on ``device``; none if it may be used there.

    ``answers`` has the layout of the definition's vectors; the package's own known answers unless given.
    """
    answers = answers or _known_answers()
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
