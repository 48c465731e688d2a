"""The time of the op on a GPU on paper, from counts of its machine code and rates of the device: to measure against.

A block draws P (bound by the instructions that an SM issues), multiplies it (bound by the tensor cores) and reads the
rows' limbs from L2; sums of parts of K are added in L2; before it, x is rounded. Times are in seconds.

``python -m bench.projection.model`` prints the table for an H200 at D = 8192.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile

PANEL = 128
"""k of one turn of the product."""
CAPABILITY = (9, 0)
"""Whose machine code is counted."""


@dataclass(frozen=True)
class Rates:
    """What a device does per second, clock or SM. The defaults are assumed of an H200; first light measures them."""

    sms: int = 132
    clock_hz: float = 1.95e9
    busy_clock_hz: float = 1.70e9
    """Of products of more than `BUSY_ROWS` rows, whose power bounds the clock."""
    multiply_adds: float = 4096.0
    """int8, per clock and SM."""
    issued: float = 0.9
    """Instructions per clock and scheduler, with two warps or more for each."""
    issued_alone: float = 0.6
    """The same with one warp."""
    l2_bytes: float = 6.0e12
    """Per second, from L2 to all SMs."""
    l2_sectors: float = 115e9
    """Per second, that L2 adds to: 32 bytes each."""
    memory_bytes: float = 4.3e12
    quantise_bytes: float = 2.2e12
    """Per second, read and written by the kernel that rounds x."""
    quantise_seconds: float = 3e-6
    """The least that it takes."""
    ends_seconds: float = 4e-6
    """First loads, last stores, and the launch of the second kernel."""
    stored_multiply_adds: float = 385e12
    """Per second, of bfloat16 products by the vendor's library."""
    stored_seconds: float = 4e-6
    """The ends of such a product."""


H200 = Rates()
BUSY_ROWS = 64
SCHEDULERS = 4
"""Of an SM."""
SECTOR_WORDS = 8


class Counts(NamedTuple):
    """What the machine code of a product does per panel: `tests/kernels/test_triton_compiled.py` holds it to these."""

    instructions: float
    """Of one warp, in the loop."""
    hidden: float
    """Of these, between the start of a product and the wait for it."""


class Times(NamedTuple):
    """Seconds of the parts of a call, each by itself, and of all."""

    draw: float
    multiply: float
    limbs: float
    """Reading limbs from L2."""
    additions: float
    """Of sums of parts of K, in L2."""
    quantise: float
    total: float


def call(rows: int, size: int, bits: int, rates: Rates = H200) -> Times:
    """Predict x + x @ P for x [rows, size], by the tile and the parts of K that the table takes on Hopper."""
    tile = tile_table.choose(CAPABILITY, rows, bits, "int8")
    tiles = math.ceil(rows / tile.rows) * math.ceil(size / tile.columns)
    parts = tile_table.splits(CAPABILITY, tile, tiles, math.ceil(size / PANEL), rates.sms)
    return product(rows, size, bits, tile, parts, COUNTS[bits, tile.columns, tile.rows], rates)


def product(rows: int, size: int, bits: int, tile: Tile, parts: int, counts: Counts, rates: Rates = H200) -> Times:
    """Predict x + x @ P for x [rows, size] by one tile with K in ``parts``, from the counts of its machine code."""
    limbs = 2 if bits == 16 else 1
    clock = rates.clock_hz if rows <= BUSY_ROWS else rates.busy_clock_hz
    row_tiles, column_tiles = math.ceil(rows / tile.rows), math.ceil(size / tile.columns)
    panels = math.ceil(math.ceil(size / PANEL) / parts)
    blocks = row_tiles * column_tiles * parts

    draw_clocks = counts.instructions * tile.warps / SCHEDULERS
    multiply_clocks = tile.columns * tile.rows * limbs * PANEL / rates.multiply_adds
    hidden = counts.hidden / counts.instructions
    draw = multiply = both = 0.0
    for resident in _waves(blocks, tile.blocks, rates.sms):
        one_warp = resident * tile.warps <= SCHEDULERS
        drawn = panels * resident * draw_clocks / (rates.issued_alone if one_warp else rates.issued) / clock
        multiplied = panels * resident * multiply_clocks / clock
        # What one block does not hide, others on its SM hide in part.
        apart = (1 - hidden) / resident
        draw, multiply = draw + drawn, multiply + multiplied
        both += max(drawn, multiplied) + apart * min(drawn, multiplied)
    read = blocks * panels * tile.rows * limbs * PANEL / rates.l2_bytes
    added = parts * column_tiles * tile.columns * rows * limbs if parts > 1 else 0
    additions = added / SECTOR_WORDS / rates.l2_sectors
    moved = rows * size * (2 + limbs)
    quantise = rates.quantise_seconds + moved / rates.quantise_bytes
    total = max(both, read) + additions + quantise + rates.ends_seconds
    return Times(draw, multiply, read, additions, quantise, total)


def _waves(blocks: int, per_sm: int, sms: int) -> list[int]:
    """Return how many blocks the fullest SM has at a time, one wave after another."""
    whole, rest = divmod(blocks, per_sm * sms)
    return [per_sm] * whole + ([math.ceil(rest / sms)] if rest else [])


def stored(rows: int, size: int, rates: Rates = H200) -> float:
    """Predict x + x @ P with P [size, size] stored in bfloat16, from a cold L2."""
    bytes_moved = 2 * size**2 + 4 * rows * size
    return rates.stored_seconds + max(bytes_moved / rates.memory_bytes, rows * size**2 / rates.stored_multiply_adds)


COUNTS = {
    (16, 64, 16): Counts(326, 11),
    (16, 64, 32): Counts(330, 12),
    (16, 128, 64): Counts(341, 252),
    (16, 128, 128): Counts(371, 209),
    (8, 64, 16): Counts(325, 11),
    (8, 64, 32): Counts(326, 11),
    (8, 64, 64): Counts(336, 17),
    (8, 128, 256): Counts(371.5, 208),
}
"""By activation bits, columns and rows of the tiles of Hopper's table, compiled by Triton 3.9.0."""


def main() -> None:
    """Print the table for an H200."""
    size = 8192
    print(f"| M | stored, us | {' | '.join(f'op {bits}, us | of stored' for bits in (16, 8))} | bound by |")
    print("| --: | --: | --: | --: | --: | --: | -- |")
    for rows in (1, 8, 16, 32, 64, 128, 256, 1024, 2048, 8192, 16384):
        peer = stored(rows, size)
        both = {bits: call(rows, size, bits) for bits in (16, 8)}
        parts = both[16]._asdict()
        del parts["total"]
        bound = max(parts, key=lambda name: parts[name])
        cells = [f"{1e6 * times.total:.1f} | {times.total / peer:.2f}" for times in both.values()]
        print(f"| {rows} | {1e6 * peer:.1f} | {' | '.join(cells)} | {bound} |")


if __name__ == "__main__":
    main()
