"""The table of the tiles that products take on GPUs. No choice changes a bit; choices only change the time."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Tile(NamedTuple):
    """The part of a product that one block of threads computes."""

    columns: int
    """Columns of P, which are those of y: a multiple of 16 * warps."""
    rows: int
    """Rows of x."""
    warps: int
    stages: int
    """Panels of x in flight."""
    run: int = 4
    """Order of k: how many consecutive k a thread of the matrix unit holds, 4 or 8."""
    turn: int = 1
    """Panels in one turn of the loop: with 2, a panel is drawn while the one before it is multiplied (int8 only)."""
    joined: bool = False
    """Both limbs of the rows are factors of one product: for matrix units that take their factors from memory."""
    blocks: int = 1
    """Blocks that an SM has room for, or 4 if for more: four warps for each scheduler are enough."""


@functools.cache
def release() -> tuple[int, ...]:
    """Return the release of the installed Triton, such as (3, 7, 1)."""
    import triton

    return release_of(triton.__version__)


def release_of(version: str) -> tuple[int, ...]:
    """Return the numbers of a version of Triton."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _tiles(largest: dict[int, Tile]) -> dict[int, tuple[Tile, ...]]:
    """Make tiles by activation bits, fewest rows first: three for few rows, otherwise as the ``largest``, and that."""
    return {
        bits: (
            *(many._replace(columns=64, rows=rows, warps=4, blocks=n) for rows, n in ((16, 4), (32, 4), (64, 2))),
            many,
        )
        for bits, many in largest.items()
    }


def _hopper() -> dict[int, tuple[Tile, ...]]:
    """Make the tiles for wgmma. With 128 columns, a block reads the limbs of its rows half as often from L2."""
    few = [Tile(64, rows, 4, 3, joined=True, blocks=blocks) for rows, blocks in ((16, 4), (32, 4), (64, 3))]
    return {
        bits: (*few[:number], *(Tile(128, rows, 8, 2, turn=2, joined=True) for rows in many))
        for bits, number, many in ((16, 2, (64, 128)), (8, 3, (256,)))
    }


HIP = (0, 0)
"""Stands for the compute capability of AMD's GPUs, whose own numbers mean other things: gfx942 gives (9, 4)."""


@functools.cache
def _table(triton: tuple[int, ...]) -> dict[tuple[int, int], dict[int, tuple[Tile, ...]]]:
    """Return the tiles of what a release of Triton compiles, by compute capability.

    A device takes the entry of the largest that is not above its own.
    """
    # mma.sync: Triton hands a thread of int8 operands runs of 8 consecutive k, since 3.7 runs of 4.
    sync_run = 8 if triton < (3, 7) else 4
    joined = triton >= (3, 7)  # before, products on 10.x are mma.sync too
    return {
        HIP: _tiles({16: Tile(64, 128, 4, 2), 8: Tile(64, 256, 4, 2)}),  # 64 KiB of shared memory
        (8, 0): _tiles({16: Tile(128, 64, 8, 3, sync_run), 8: Tile(128, 128, 8, 3, sync_run)}),
        (8, 6): _tiles({16: Tile(128, 64, 8, 2, sync_run), 8: Tile(128, 128, 8, 2, sync_run)}),  # less shared memory
        (9, 0): _hopper(),
        (10, 0): _tiles({bits: Tile(128, rows, 8, 2, sync_run, joined=joined) for bits, rows in ((16, 128), (8, 256))}),
        (12, 0): _tiles({16: Tile(128, 64, 8, 2, sync_run), 8: Tile(128, 128, 8, 2, sync_run)}),
    }


# Products of float16 hold half as many k in the same registers and shared memory.
_FP16_TILES = (Tile(64, 16, 4, 2, blocks=3), Tile(64, 32, 4, 2, blocks=2), Tile(128, 64, 8, 2))

# Cards whose int8 rate is far below their float16 rate.
_FP16 = {(10, 3)}

_FENCES_SINCE = (3, 7, 1)


def unsafe(capability: tuple[int, int]) -> str | None:
    """Return why what this Triton compiles for a compute capability is not to be used, or None if it may be.

    Before 3.7.1 (triton-lang/triton#10537) it puts no fence.proxy.async between the copies that fill shared memory and
    the products (wgmma) that read it; a product may then read what was there before.
    """
    if (9, 0) <= capability < (10, 0) and release() < _FENCES_SINCE:
        version = ".".join(map(str, release()))
        return (
            f"Triton {version} leaves out a memory fence that products on compute capability 9.x need: install Triton "
            "3.7.1 or later"
        )
    return None


def tiles(
    capability: tuple[int, int], activation_bits: int, arithmetic: str, triton: tuple[int, ...] | None = None
) -> tuple[Tile, ...]:
    """Return the tiles for a device, fewest rows first, of code that a release of Triton (the installed) compiles."""
    if arithmetic == "fp16":
        joined = (10, 0) <= capability < (12, 0) and (triton or release()) >= (3, 7)
        return tuple(tile._replace(joined=joined) for tile in _FP16_TILES)
    table = _table(triton or release())
    return table[max(key for key in table if key <= capability)][activation_bits]


def choose(capability: tuple[int, int], rows: int, activation_bits: int, arithmetic: str) -> Tile:
    """Return the smallest tile that holds all rows, or else the largest tile."""
    return choose_from(tiles(capability, activation_bits, arithmetic), rows)


def choose_from(candidates: tuple[Tile, ...], rows: int) -> Tile:
    """Return the first of the candidates, fewest rows first, that holds all rows, or else the last."""
    return next((tile for tile in candidates if tile.rows >= rows), candidates[-1])


def arithmetic(capability: tuple[int, int]) -> str:
    """Return ``int8``, or ``fp16`` where float16 products give the same sums faster."""
    return "fp16" if capability in _FP16 else "int8"


def forms_of_k(capability: tuple[int, int]) -> tuple[int, ...]:
    """Return the numbers of parts of K for which a tile has kernels of its own: 1 for K whole, 2 for any more.

    Parts are added up in memory. Not on AMD's GPUs, where nobody has verified it: a wave there may count as arrived
    before its own atomics are done.
    """
    return (1,) if capability == HIP else (1, 2)


def splits(capability: tuple[int, int], tile: Tile, tiles: int, panels: int, sms: int) -> int:
    """Return the number of parts of K to cut each of ``tiles`` tiles into: as many as all SMs have room for at once."""
    if forms_of_k(capability) == (1,):
        return 1
    return max(1, min(panels, tile.blocks * sms // tiles))
