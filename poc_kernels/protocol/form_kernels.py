"""Which functions of vectors and fingerprints serve on a device: Triton's kernels, once tried there, or torch's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import trial, trial_process
from . import plain_forms

_TRITON_FORMS = "poc_kernels.protocol.triton_forms"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PAIRS, _WIDTH = 5, 200


@functools.cache
def on(device: torch.device) -> ModuleType:
    """Return the functions that serve on ``device``: `plain_forms`, or its twin in Triton; tried once per device.

    Raises:
        RuntimeError: they were not tried yet and a CUDA graph is being captured, in which they cannot be.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return plain_forms

    def find_wrong() -> list[str]:
        return trial_process.on_gpu_apart(
            f"{__name__}:_wrong_results_of", _TRITON_FORMS, device, lambda: _wrong_results_of(_TRITON_FORMS, device)
        )

    wrong = trial.verdict("vectors and fingerprints by Triton", device, find_wrong)
    return plain_forms if wrong else importlib.import_module(_TRITON_FORMS)


def _wrong_results_of(kernels: str, device: torch.device) -> list[str]:
    return _wrong_results(importlib.import_module(kernels), device)


def _wrong_results(kernels: ModuleType, device: torch.device) -> list[str]:
    """List what the kernels compute otherwise than torch's operators on a CPU, from numbers whose sums are exact."""
    results, expected = _results(kernels, device), _results(plain_forms, torch.device("cpu"))
    return [name for name, wanted in expected.items() if not torch.equal(results[name].cpu(), wanted)]


def _results(functions: ModuleType, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    results = {}
    seeds = torch.tensor([0, 1, -1, 2**63 - 1], device=device)
    for dtype in (torch.int16, torch.int32):
        masks = torch.zeros(3, len(seeds), _WIDTH, dtype=dtype, device=device)
        functions.sign_masks(seeds, masks)
        results[f"signs as {dtype}"] = masks
    for dtype in _DTYPES:
        x = torch.randint(-15, 16, (len(seeds), 2 * _PAIRS, _WIDTH), generator=generator, device="cpu")
        axis = torch.randint(-127, 128, (_WIDTH,), generator=generator, device="cpu") / 512
        states = x.to(device, dtype)
        results[f"mixes of {dtype}"] = functions.mixed(
            states, results["signs as torch.int32"][0, :, :_PAIRS].contiguous()
        )
        functions.reflect(states, axis.to(device, dtype))
        results[f"reflections of {dtype}"] = states
    return results
