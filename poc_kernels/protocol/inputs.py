"""Seeded random numbers of a round: hashes, normal numbers and nonces' inputs, batched over nonces on any device.

Everything is drawn from MurmurHash3 of an index under a 32-bit seed. Hashes are exact; the elementary functions of
`normal` are evaluated in float64 and rounded to float32, so that a value depends neither on its place in a batch nor on
the device: of all the values that a hash can give, none is too close to a tie for float64 functions good to 0.6 ulp.

On GPUs one kernel draws a batch, once it has given the bits of the operators of torch there: the package's machine code
(`poc_kernels.protocol.cuda_inputs`), or else what Triton compiles (`triton_inputs`). Without either, those serve.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import trial, trial_process
from ..kernels.cuda import launcher

_C1 = 0xCC9E2D51 - 2**32
_C2 = 0x1B873593
_MIX1 = 0x85EBCA6B - 2**32
_MIX2 = 0xC2B2AE35 - 2**32
_ADD = 0xE6546B64 - 2**32
_SIGN = -(2**31)
# Numbers worked on at once: what fits the caches of a CPU; a GPU wants fewer, larger launches.
_CHUNK_CPU = 2**16
_CHUNK_DEVICE = 2**24
_SEGMENTS = 8
_CHECKED_SEEDS = (0, 1, 2**31, 2**32 - 1)
_CHECKED_COUNT = 10_001

_CUDA_INPUTS = "poc_kernels.protocol.cuda_inputs"
_TRITON_INPUTS = "poc_kernels.protocol.triton_inputs"


def seed32(text: str) -> int:
    """Return the first 8 hexadecimal digits of SHA-256 of ``text`` in UTF-8, as a number."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def inputs_seed(block_hash: str, public_key: str, nonce: int) -> int:
    """Return the seed of a nonce's inputs."""
    return seed32(f"{block_hash}_{public_key}_nonce{nonce}")


def stronger_seeds(block_hash: str, public_key: str, nonce: int) -> tuple[int, ...]:
    """Return the eight seeds of a nonce's inputs in a round with the stronger generator; the first is `inputs_seed`."""
    digest = hashlib.sha256(f"{block_hash}_{public_key}_nonce{nonce}".encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, len(digest), 4))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits).bitwise_or_(_shift_right(x, 32 - bits))


def _seed_column(seeds: Sequence[int], device: torch.device) -> Tensor:
    # From pinned memory, which torch does not give away before the copy is done, nothing waits for the GPU.
    column = torch.tensor(seeds, dtype=torch.uint32, device="cpu", pin_memory=device.type == "cuda")
    return column.view(torch.int32).unsqueeze(1).to(device, non_blocking=True)


def _hash(index: Tensor, seeds: Tensor) -> Tensor:
    # int32 arithmetic wraps, as MurmurHash3 wants; only the right shifts need a mask.
    key = _rotate_left(index * _C1, 15).mul_(_C2)
    h = _rotate_left(seeds ^ key, 13).mul_(5).add_(_ADD)
    h.bitwise_xor_(_shift_right(h, 16)).mul_(_MIX1)
    h.bitwise_xor_(_shift_right(h, 13)).mul_(_MIX2)
    return h.bitwise_xor_(_shift_right(h, 16))


def hash32(seeds: Sequence[int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Compute MurmurHash3_x86_32 of the 4-byte keys start .. start + count - 1, without the final xor of the length.

    Returns:
        int32 [len(seeds), count] with the 32 bits of each hash.
    """
    device = torch.device(device)
    column = _seed_column(seeds, device)
    kernels = _kernels(device)
    return _plain_hash32(column, start, count) if kernels is None else kernels.hash32(column, start, count)


def permutations_of(seeds: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Sort 0 .. count - 1 by their hashes as unsigned numbers, equal ones as they are: int64 [len(seeds), count]."""
    # With the sign bit flipped, signed order is unsigned order.
    return torch.argsort(hash32(seeds, 0, count, device).bitwise_xor_(_SIGN), dim=1, stable=True)


def _plain_hash32(seeds: Tensor, start: int, count: int) -> Tensor:
    index = torch.arange(start, start + count, dtype=torch.int64, device=seeds.device).to(torch.int32)
    return _hash(index, seeds)


def _uniform(index: Tensor, seeds: Tensor) -> Tensor:
    # float32 of the unsigned number, rounded once; 2**-32 is exact.
    unsigned = _hash(index, seeds).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    return unsigned.to(torch.float32).mul_(2.0**-32)


def normal(
    seeds: Sequence[int], count: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw standard normal numbers by Box and Muller, [len(seeds), count], in float32, and cast them to ``dtype``."""
    device = torch.device(device)
    column = _seed_column(seeds, device)
    kernels = _kernels(device)
    return _plain_normal(column, count, dtype) if kernels is None else kernels.normal(column, count, dtype)


def stronger_normal(
    seeds: Sequence[Sequence[int]], count: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw as `normal`, [len(seeds), count], each row in eight segments of one length under the row's eight seeds.

    The last segments are shorter, or missing, where eight does not divide ``count``.
    """
    segment = (count + _SEGMENTS - 1) // _SEGMENTS
    x = torch.empty(len(seeds), count, dtype=dtype, device=device)
    for place, start in enumerate(range(0, count, segment)):
        part = x[:, start : start + segment]
        part.copy_(normal([row[place] for row in seeds], part.shape[1], device, dtype))
    return x


def _plain_normal(seeds: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    device = seeds.device
    half = (count + 1) // 2
    result = torch.empty(len(seeds), count, dtype=dtype, device=device)
    if result.numel() == 0:
        return result
    chunk = max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE) // len(seeds))
    for start in range(0, half, chunk):
        end = min(start + chunk, half)
        index = torch.arange(start, end, dtype=torch.int64, device=device)
        radius = _uniform(index.to(torch.int32), seeds).clamp_(min=1e-10)
        radius = radius.double().log_().float().mul_(-2.0)
        radius = radius.double().sqrt_().float()  # the float32 root of some CPU libraries is not the nearest
        angle = _uniform((index + half).to(torch.int32), seeds).mul_(2.0 * math.pi).double()
        result[:, start:end] = torch.cos(angle).float().mul_(radius)
        sines = min(end, count - half) - start
        if sines > 0:
            result[:, half + start : half + start + sines] = angle.sin_().float().mul_(radius)[:, :sines]
    return result


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels that draw on ``device``, or None where torch's operators do; tried once per device.

    Raises:
        RuntimeError: they were not tried yet and a CUDA graph is being captured, in which they cannot be.
    """
    if device.type != "cuda":
        return None
    kernels = None
    if launcher.unavailable(device) is None:
        kernels = _right_kernels(_CUDA_INPUTS, "machine code", device)
    if kernels is None and importlib.util.find_spec("triton") is not None:
        kernels = _right_kernels(_TRITON_INPUTS, "Triton", device)
    return kernels


def _right_kernels(module: str, by: str, device: torch.device) -> ModuleType | None:
    def find_wrong() -> list[str]:
        return trial_process.on_gpu_apart(
            f"{__name__}:_wrong_draws_of", module, device, lambda: _wrong_draws_of(module, device)
        )

    wrong = trial.verdict(f"draw of inputs by {by}", device, find_wrong)
    return None if wrong else importlib.import_module(module)


def _wrong_draws_of(kernels: str, device: torch.device) -> list[str]:
    return _wrong_draws(importlib.import_module(kernels), device)


def _wrong_draws(kernels: ModuleType, device: torch.device) -> list[str]:
    """List what the kernels draw otherwise than torch's operators on a CPU."""
    column, local = (_seed_column(_CHECKED_SEEDS, torch.device(place)) for place in (device, "cpu"))
    expected = _plain_normal(local, _CHECKED_COUNT, torch.float32)
    wrong = [
        f"normal numbers in {dtype}"
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not torch.equal(kernels.normal(column, _CHECKED_COUNT, dtype).cpu(), expected.to(dtype))
    ]
    start = 2**31 - 5000
    hashes = _plain_hash32(local, start, _CHECKED_COUNT)
    right = torch.equal(kernels.hash32(column, start, _CHECKED_COUNT).cpu(), hashes)
    return wrong if right else [*wrong, "hashes"]


def nonce_inputs(
    block_hash: str,
    public_key: str,
    nonces: Sequence[int],
    seq_len: int,
    dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the input embeddings of nonces: [len(nonces), seq_len, dim] in the model's ``dtype``."""
    seeds = [inputs_seed(block_hash, public_key, nonce) for nonce in nonces]
    return normal(seeds, seq_len * dim, device, dtype).view(len(nonces), seq_len, dim)
