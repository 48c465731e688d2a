"""Random numbers of the protocol by the package's machine code: the kernels of `triton_inputs`, without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cuda import launcher
from ..kernels.cuda.forms import Form
from ..kernels.triton import plan

BLOCK, WARPS = 512, 4
"""Of `triton_inputs`."""

_DTYPES = {
    torch.float32: ("float32", "*fp32"),
    torch.bfloat16: ("bfloat16", "*bf16"),
    torch.float16: ("float16", "*fp16"),
}


def forms() -> list[Form]:
    """Return the forms in which the kernels are compiled."""
    pairs = f"rows * ceil(ceil(count / 2) / {BLOCK})"
    drawn = [_form(f"normal-{name}", "normal_kernel", kind, "half", pairs) for name, kind in _DTYPES.values()]
    return [*drawn, _form("hash", "hash_kernel", "*i32", "start", f"rows * ceil(count / {BLOCK})")]


def _form(name: str, kernel: str, kind: str, number: str, grid: str) -> Form:
    numbers = ("count", number) if number == "half" else (number, "count")
    parameters = {"seeds": "*i32", "out": kind, **dict.fromkeys((*numbers, "blocks"), "i32")}
    module = "poc_kernels.protocol.triton_inputs"
    return Form(name, module, kernel, parameters, {"BLOCK": BLOCK}, unaligned=(), divisible=(), grid=grid, warps=WARPS)


def normal(seeds: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Draw standard normal numbers [rows, count] in ``dtype`` for seeds int32 [rows, 1] on a GPU, count < 2**31."""
    out = torch.empty(len(seeds), count, dtype=dtype, device=seeds.device)
    half = (count + 1) // 2
    blocks = -(-half // BLOCK)
    _launch(f"normal-{_DTYPES[dtype][0]}", seeds, out, count, half, blocks)
    return out


def hash32(seeds: Tensor, start: int, count: int) -> Tensor:
    """Compute the hashes of start .. start + count - 1 as int32 [rows, count], for seeds int32 [rows, 1] on a GPU."""
    out = torch.empty(len(seeds), count, dtype=torch.int32, device=seeds.device)
    _launch("hash", seeds, out, plan.signed_word(start % 2**32), count, -(-count // BLOCK))
    return out


def _launch(name: str, seeds: Tensor, out: Tensor, first: int, second: int, blocks: int) -> None:
    if out.numel() == 0:
        return
    if seeds.data_ptr() % 16:
        seeds = seeds.clone()
    launch = launcher.launch_of(out.device, name)
    grid = len(seeds) * blocks, 1
    launch(*launcher.current_stream(out.device), *grid, seeds.data_ptr(), out.data_ptr(), first, second, blocks)
