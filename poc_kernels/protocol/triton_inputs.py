# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803  (constants of a kernel are written in capitals)
"""Random numbers of the protocol in Triton, a batch of nonces per launch: hashes, and normal numbers from them.

ln, cos and sin are evaluated in float64 by additions, multiplications and fused multiply-adds only, the same on every
GPU, and rounded to float32. A hash rounds to one of 83886081 numbers u; for each of them this gives the float32 that
the float64 functions of a CPU give. The closest to a tie, ln u at u = 0x1.827a74p-7, tolerates an error of 0.69 ulp.

Estimated, not measured: 22 float64 instructions per number. That is nothing on data centre GPUs (64 per clock and SM);
with 2 per clock and SM, 32 nonces of 256 x 4096 take 1 to 2 ms, little compared with a forward of a model that wide.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
_WARPS = 4

# float32 constants of the protocol
_LEAST_UNIFORM = tl.constexpr(1e-10)
_TWO_PI = tl.constexpr(2.0 * math.pi)
_HALF_TURNS = tl.constexpr(2.0 / math.pi)
_SQRT_TWO = tl.constexpr(1.4142135)

# fdlibm's: ln 2 and pi / 2 in two parts, the first with zeros at its end so that small multiples are exact
_LN2_HIGH, _LN2_LOW = tl.constexpr(6.93147180369123816490e-01), tl.constexpr(1.90821492927058770002e-10)
_PIO2_HIGH, _PIO2_LOW = tl.constexpr(1.57079632673412561417e00), tl.constexpr(6.07710050650619224932e-11)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _hash(index, seed):
    """Compute MurmurHash3_x86_32 of one 4-byte key without the final xor of the length, all uint32."""
    key = index * 0xCC9E2D51
    key = ((key << 15) | (key >> 17)) * 0x1B873593
    h = seed ^ key
    h = ((h << 13) | (h >> 19)) * 5 + 0xE6546B64
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _uniform(index, seed):
    return _hash(index, seed).to(tl.float32) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def _step(p, z, C: tl.constexpr):
    """Return p * z + C in float64: one step of a polynomial."""
    return tl.fma(p, z, tl.full(z.shape, C, tl.float64))


@triton.jit
def _log(u):
    """Return ln u as float32 for float32 u in [1e-10, 1]: fdlibm's, except that Newton's method divides."""
    bits = u.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    over = mantissa > _SQRT_TWO
    mantissa = tl.where(over, mantissa * 0.5, mantissa)  # sqrt(1/2) .. sqrt(2)
    k = ((bits >> 23) - 127 + over.to(tl.int32)).to(tl.float64)
    f = (mantissa - 1.0).to(tl.float64)  # exact
    divisor = f + 2.0
    inverse = (1.0 / (mantissa + 1.0)).to(tl.float64)
    inverse = tl.fma(inverse, tl.fma(-divisor, inverse, tl.full(f.shape, 1.0, tl.float64)), inverse)
    inverse = tl.fma(inverse, tl.fma(-divisor, inverse, tl.full(f.shape, 1.0, tl.float64)), inverse)
    s = f * inverse
    z = s * s
    r = tl.full(z.shape, 1.479819860511658591e-01, tl.float64)
    r = _step(r, z, 1.531383769920937332e-01)
    r = _step(r, z, 1.818357216161805012e-01)
    r = _step(r, z, 2.222219843214978396e-01)
    r = _step(r, z, 2.857142874366239149e-01)
    r = _step(r, z, 3.999999999940941908e-01)
    r = _step(r, z, 6.666666666666735130e-01)
    square = f * 0.5 * f
    low = square - tl.fma(s, tl.fma(z, r, square), k * _LN2_LOW)
    return tl.fma(k, tl.full(k.shape, _LN2_HIGH, tl.float64), f - low).to(tl.float32)


@triton.jit
def _cos_sin(angle):
    """Return cos and sin as float32 of a float32 angle in [0, 2 pi]: fdlibm's, on the eighth of a turn around 0."""
    quarter = (angle * _HALF_TURNS + 0.5).to(tl.int32)  # 0 .. 4; which of two neighbours does not matter
    k = quarter.to(tl.float64)
    r = tl.fma(k, tl.full(k.shape, -_PIO2_HIGH, tl.float64), angle.to(tl.float64))
    r = tl.fma(k, tl.full(k.shape, -_PIO2_LOW, tl.float64), r)
    z = r * r
    s = tl.full(z.shape, 1.58969099521155010221e-10, tl.float64)
    s = _step(s, z, -2.50507602534068634195e-08)
    s = _step(s, z, 2.75573137070700676789e-06)
    s = _step(s, z, -1.98412698298579493134e-04)
    s = _step(s, z, 8.33333333332248946124e-03)
    s = _step(s, z, -1.66666666666666324348e-01)
    s = tl.fma(s * z, r, r).to(tl.float32)
    c = tl.full(z.shape, -1.13596475577881948265e-11, tl.float64)
    c = _step(c, z, 2.08757232129817482790e-09)
    c = _step(c, z, -2.75573143513906633035e-07)
    c = _step(c, z, 2.48015872894767294178e-05)
    c = _step(c, z, -1.38888888888741095749e-03)
    c = _step(c, z, 4.16666666666666019037e-02)
    half = z * 0.5
    near = 1.0 - half
    c = (near + tl.fma(z * z, c, (1.0 - near) - half)).to(tl.float32)
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 0, cosine, -cosine)
    sine = tl.where((quarter & 2) == 0, sine, -sine)
    return cosine, sine


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    """Round float32 values, none of them NaN, to nearest even in ``dtype``."""
    if dtype == tl.bfloat16:  # in integers: the interpreter's own conversion truncates
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded


@triton.jit(do_not_specialize=["count", "half", "blocks"])
def normal_kernel(seeds, out, count, half, blocks, BLOCK: tl.constexpr):
    """Write out [rows, count]: each program draws BLOCK pairs of a row, i and half + i."""
    program = tl.program_id(0)
    row = program // blocks
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row).to(tl.uint32, bitcast=True)
    u1 = _uniform(index.to(tl.uint32), seed)
    u2 = _uniform((index + half).to(tl.uint32), seed)
    radius = tl.sqrt_rn(_log(tl.maximum(u1, _LEAST_UNIFORM)) * -2.0)
    cosine, sine = _cos_sin(u2 * _TWO_PI)
    at = out + row.to(tl.int64) * count + index
    tl.store(at, _round_to(cosine * radius, out.dtype.element_ty), mask=index < half)
    tl.store(at + half, _round_to(sine * radius, out.dtype.element_ty), mask=index < count - half)


@triton.jit(do_not_specialize=["start", "count", "blocks"])
def hash_kernel(seeds, out, start, count, blocks, BLOCK: tl.constexpr):
    """Write out [rows, count] int32: the hashes of start .. start + count - 1 under the seed of each row."""
    program = tl.program_id(0)
    row = program // blocks
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row).to(tl.uint32, bitcast=True)
    hashes = _hash((index + start).to(tl.uint32), seed).to(tl.int32, bitcast=True)
    tl.store(out + row.to(tl.int64) * count + index, hashes, mask=index < count)


# ---- launchers -----------------------------------------------------------------------------------------------------


def normal(seeds: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Draw standard normal numbers [rows, count] in ``dtype`` for seeds int32 [rows, 1] on a GPU, count < 2**31.

    The bits are those of `poc_kernels.protocol.inputs.normal` on any device.
    """
    out = torch.empty(len(seeds), count, dtype=dtype, device=seeds.device)
    if out.numel() > 0:
        half = (count + 1) // 2
        blocks = triton.cdiv(half, _BLOCK)
        with torch.cuda.device_of(seeds):
            normal_kernel[(len(seeds) * blocks,)](
                seeds, out, count, half, blocks, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False
            )
    return out


def hash32(seeds: Tensor, start: int, count: int) -> Tensor:
    """Compute the hashes of start .. start + count - 1 as int32 [rows, count], for seeds int32 [rows, 1] on a GPU."""
    out = torch.empty(len(seeds), count, dtype=torch.int32, device=seeds.device)
    if out.numel() > 0:
        blocks = triton.cdiv(count, _BLOCK)
        with torch.cuda.device_of(seeds):
            hash_kernel[(len(seeds) * blocks,)](seeds, out, start, count, blocks, BLOCK=_BLOCK, num_warps=_WARPS)
    return out
