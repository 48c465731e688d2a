# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803  (constants of a kernel are written in capitals)
"""Measures the rates of a GPU that the model of time assumes (`bench.projection.model.Rates`), in a few seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

WARPS = 8
"""Of each block of the kernels here, on an SM of its own."""
CHAINS = 8
"""Independent chains of instructions in each thread."""
REPEATED = 8
"""Instructions of a chain in one turn of the loop."""
TURNS = 2048


def _chain(instruction: str) -> str:
    """Return REPEATED instructions on $0, which begins as $1; $2 and $3 are other operands."""
    return "mov.b32 $0, $1; " + f"{instruction} " * REPEATED


INSTRUCTIONS = {
    "LOP3": "lop3.b32 $0, $0, $2, $3, 0x96;",
    "PRMT": "prmt.b32 $0, $0, $2, $3;",
    "IMAD": "mad.lo.u32 $0, $0, $2, $3;",
    "IMAD.WIDE": "{ .reg .b64 w; .reg .b32 l, h; mul.wide.u32 w, $0, $2; mov.b64 {l, h}, w; xor.b32 $0, l, h; }",
}
"""Instructions by the name of what they measure. A wide multiply comes with a LOP3, so that both halves are used."""
ASM = {name: _chain(instruction) for name, instruction in INSTRUCTIONS.items()}


@triton.jit
def instructions_kernel(out, a, b, turns, ASM: tl.constexpr, SIZE: tl.constexpr):
    """Run the instructions of ASM on SIZE chains; a block writes its SM's clocks and nanoseconds behind its results."""
    at = tl.arange(0, SIZE)
    value = at + tl.program_id(0)
    began = _clock()
    began_ns = _nanoseconds()
    for _ in range(turns):
        value = tl.inline_asm_elementwise(ASM, "=&r,r,r,r", [value, a, b], dtype=tl.int32, is_pure=False, pack=1)
    out += tl.program_id(0) * (SIZE + 4)
    tl.store(out + at, value)
    tl.debug_barrier()
    tl.store((out + SIZE).to(tl.pointer_type(tl.int64)), _clock() - began)
    tl.store((out + SIZE + 2).to(tl.pointer_type(tl.int64)), _nanoseconds() - began_ns)


@triton.jit
def _clock():
    return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _nanoseconds():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def read_kernel(source, out, words, turns, SIZE: tl.constexpr):
    """Read the same ``words`` of L2 in every block, past L1, SIZE at a time."""
    at = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.int32)
    for turn in range(turns):
        first = tl.multiple_of(turn * SIZE % words, 16)
        total ^= tl.load(source + first + at, cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * SIZE + at, total)


@triton.jit
def add_kernel(out, turns, STRIDE: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """Add ones to words of L2; neighbouring threads take words STRIDE apart."""
    at = tl.arange(0, SIZE)
    spread = at % (SIZE // STRIDE) * STRIDE + at // (SIZE // STRIDE)
    for turn in range(turns):
        first = (tl.program_id(0) * turns + turn) * SIZE % WORDS
        tl.atomic_add(out + first + spread, 1, sem="relaxed")


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call by events, after one that is not counted."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e-3 * start.elapsed_time(end) for start, end in events)


def measure(device: torch.device) -> dict[str, float]:
    """Return the rates by name: fields of `Rates`, and clocks per instruction of a warp and scheduler."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    rates: dict[str, float] = {"sms": sms}
    size = WARPS * 32 * CHAINS
    out = torch.zeros(sms, size + 4, dtype=torch.int32, device=device)
    for name, asm in ASM.items():
        for _ in range(2):
            instructions_kernel[(sms,)](out, 0x5410, 0x3276, TURNS, ASM=asm, SIZE=size, num_warps=WARPS)
        clocks, nanoseconds = out[:, size:].contiguous().view(torch.int64).double().median(dim=0).values.tolist()
        rates[f"clocks per {name}"] = clocks / (TURNS * REPEATED * CHAINS * WARPS / 4)
        rates["clock_hz"] = 1e9 * clocks / nanoseconds
    words, block, turns = 2**20, 4096, 4096
    source = torch.zeros(words, dtype=torch.int32, device=device)
    sink = torch.zeros(2 * sms * block, dtype=torch.int32, device=device)
    read = _seconds(lambda: read_kernel[(2 * sms,)](source, sink, words, turns, SIZE=block, num_warps=WARPS))
    rates["l2_bytes"] = 2 * sms * turns * block * 4 / read
    for stride in (1, 4):
        added = _seconds(
            lambda stride=stride: add_kernel[(4 * sms,)](source, 64, STRIDE=stride, SIZE=1024, WORDS=words, num_warps=4)
        )
        rates[f"sectors per second, stride {stride}"] = 4 * sms * 64 * 1024 / (8 // stride) / added
    rates["l2_sectors"] = rates["sectors per second, stride 1"]
    return rates | _library_rates(device, sms)


def _library_rates(device: torch.device, sms: int) -> dict[str, float]:
    """Return the rates of memory, and of the vendor's products at the size of the largest cases."""
    size, copied = 8192, 2**30
    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    bytes_a, bytes_b = (torch.randint(-128, 128, (size, size), device=device).to(torch.int8) for _ in range(2))
    copy, product = _seconds(lambda: target.copy_(source)), _seconds(lambda: a @ b)
    int8 = _seconds(lambda: torch._int_mm(bytes_a, bytes_b.t()))
    return {
        "memory_bytes": 2 * copied / copy,
        "stored_multiply_adds": size**3 / product,
        "int8 multiply-adds per second of the library": size**3 / int8,
    }
