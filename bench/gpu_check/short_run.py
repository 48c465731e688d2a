"""``python -m bench.gpu_check.short_run DEVICE`` calls every op once in small shapes, as compute-sanitizer can bear."""

from __future__ import annotations

import sys

import torch

import poc_kernels
from poc_kernels import backends
from poc_kernels.protocol import nonce_inputs, permutations


def main(name: str) -> None:
    """Run the ops on the device of that name."""
    device = torch.empty(0, device=name).device
    for backend in ("cuda", "triton"):  # "verify" has tried them, which takes too long under compute-sanitizer
        backends.trust(backend, device)
    seed = poc_kernels.seed_tensor(7, device)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((1, 1000), (33, 1000), (300, 512)):
            x = torch.randn(rows, columns, device=device).to(dtype)
            mask = torch.arange(rows, device=device) % 3 != 0
            for bits in (16, 8):
                poc_kernels.residual_projection(
                    x, seed, activation_bits=bits, row_mask=mask, column_start=5, columns=99
                )
                poc_kernels.random_projection(x, seed, 130, activation_bits=bits)
        poc_kernels.projection_matrix(seed, 1, 3, 100, 5, 77, dtype=dtype)
    nonce_inputs("block", "key", [1, 2, 3], 7, 33, device, torch.bfloat16)
    permutations("block", "key", [1, 2, 3], 1000, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("short run done")


if __name__ == "__main__":
    main(sys.argv[1])
