"""One wrong instruction at a time in the PTX of product_kernel: what the emulator must notice, and what it need not."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIRST, _ALL = 0, None


@dataclass(frozen=True)
class Mutation:
    """Replaces matches of ``pattern`` in the PTX of product_kernel. Called as `Emulator.mutate`."""

    what: str
    pattern: str
    replacement: str
    occurrence: int | None = _FIRST
    """Which match, counted from the back if negative; None: all."""
    variant: str = "masked"
    """That of `cases.Product` whose data meet it."""

    def __call__(self, kernel: str, ptx: str) -> str:
        """Return the PTX to run: unchanged where nothing matches."""
        if kernel != "product_kernel":
            return ptx
        matches = list(re.finditer(self.pattern, ptx))
        for match in reversed(matches if self.occurrence is None else matches[self.occurrence :][:1]):
            ptx = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        return ptx


def _dropped(what: str, pattern: str, occurrence: int | None = _FIRST) -> Mutation:
    return Mutation(f"{what} dropped", pattern, "", occurrence)


HALVES_UP = Mutation(
    "rounding to bfloat16: halves up", r"(add\.s32 \s*%r\d+, %r\d+, )32767;", r"\g<1>32768;", _ALL, "ties"
)
_EVERYWHERE = (
    Mutation("prmt: selector of the signs", r"0x9D8C", "0x9D8D"),
    Mutation("prmt: one byte of a table", r"0x33271C17", "0x33271C16", 3),
    Mutation("Philox: one multiplier", r"-766435501", "-766435503", 2),
    Mutation("cp.async: landed a group too late", r"cp\.async\.wait_group(\s+)[12];", r"cp.async.wait_group\g<1>4;"),
    Mutation(
        "cp.async: source 16 bytes on",
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+) \+ 0",
        r"\1 + 16",
    ),
    Mutation("residual: x of the next column", r"(ld\.global\.b16 \{ %rs\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 2"),
    Mutation("store of y: guard dropped", r"@%p\d+ (st\.global)", r"\1", -1),
    HALVES_UP,
    Mutation("rounding to bfloat16: towards zero", r"(add\.s32 \s*%r\d+, %r\d+, )32767;", r"\g<1>0;", _ALL),
    Mutation("large sums: threshold of the sticky bit", r"16777217", "1677", _ALL, "shard"),
    Mutation("an instruction that does not exist", r"prmt\.b32", "prmt.f4e.b32"),
)
_MMA = (
    Mutation(
        "mma: two registers of A swapped",
        r"(mma\.sync[^;]*?\{ %r\d+, %r\d+, %r\d+, %r\d+ \}, )\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}",
        r"\1{ \2, \4, \3, \5 }",
    ),
    Mutation("mma: halves of B swapped", r"(mma\.sync[^;]*?\}, \{[^}]*\}, )\{ (%r\d+), (%r\d+) \}", r"\1{ \3, \2 }", 5),
    Mutation("ldmatrix: another row", r"(ldmatrix[^;]*\[%r\d+)\+(\d+)", r"\1+16", 1),
)
_WGMMA = (
    _dropped("fence.proxy.async", r"fence\.proxy\.async\.shared::cta;"),
    _dropped("wgmma.fence", r"wgmma\.fence\.sync\.aligned;"),
    _dropped("wgmma.wait_group, last,", r"wgmma\.wait_group\.sync\.aligned \d;", -1),
    Mutation("wgmma: two registers of A swapped", r"(wgmma\.mma_async[^;]*\}, \{)(%r\d+),(%r\d+)", r"\1\3,\2", 2),
    Mutation("wgmma: descriptor 32 bytes on", r"(add\.s32 \s*%r\d+, %r\d+, )2;", r"\g<1>4;"),
    Mutation("wgmma: swizzle of 64 bytes", r"4611686293305294848", "9223372053735014400"),
)
_PARTS = (
    Mutation(
        "atom: the first part to arrive finishes",
        r"(%nctaid\.y;[\s\S]*?setp\.ne\.b32 \s*%p\d+, %r\d+, )%r\d+;",
        r"\g<1>0;",
    ),
    Mutation(
        "both barriers before the atom dropped", r"bar\.sync\s+0;([^@]*?)bar\.sync\s+0;([^@]*@%p\d+ atom\.)", r"\1\2"
    ),
    _dropped("red: one", r"@%p\d+ red\.global[^;]*;", 3),
    Mutation("red: four bytes on", r"(red\.global\.gpu\.relaxed\.add\.u32 \[ %rd\d+ \+) 0", r"\1 4", 1),
    Mutation("red: guard dropped", r"@%p\d+ (red\.global)", r"\1", -1),
)


def mutations(capability: int, parts: int, ptx: str = "") -> tuple[Mutation, ...]:
    """Return the mutations of a product of int8, bfloat16 and 16 bits; of each barrier, too, that its ``ptx`` has."""
    barriers = range(len(re.findall(r"bar\.sync", ptx)))
    return (
        *_EVERYWHERE,
        *(_WGMMA if capability == 90 else _MMA),
        *(_PARTS if parts > 1 else ()),
        *(_dropped(f"bar.sync {i}", r"bar\.sync\s+0;", i) for i in barriers),
    )
