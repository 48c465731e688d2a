"""What is run on the emulator: the project's own launchers, on inputs of every kind, with what they have to give.

A case is a tuple of plain values: it names itself, and travels to the process that runs it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from poc_kernels import definition, reference
from poc_kernels.definition import Request
from poc_kernels.kernels import Backend, self_test
from poc_kernels.kernels.triton import check, plan
from poc_kernels.kernels.triton import product as kernels
from poc_kernels.kernels.triton import tiles as tile_table
from poc_kernels.kernels.triton.tiles import Tile
from poc_kernels.protocol import inputs, triton_inputs

from .launches import EmulatedTorch, Emulator, Mutate

Pair = tuple[Tensor, Tensor]
"""What a launcher gave, and what it had to give."""

# Rows beyond M, and rows that are masked off, hold what nobody wrote; nothing of it reaches a result.
PADDING = {"product_kernel": frozenset(("limbs", "exponents", "sums_of_q"))}


@contextlib.contextmanager
def launchers_on(emulator: Emulator) -> Iterator[None]:
    """Have the project's launchers run their kernels on an emulator, as a GPU of its capability with 4 SMs."""
    with contextlib.ExitStack() as stack:
        for module in (kernels, triton_inputs):
            stack.enter_context(mock.patch.object(module, "torch", EmulatedTorch(emulator)))
            for name, function in vars(module).copy().items():
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, emulator.kernel(function)))
        stack.enter_context(mock.patch.object(kernels, "_BYTE_PERM", True))
        hardware = divmod(emulator.capability, 10), 4
        stack.enter_context(mock.patch.object(kernels, "hardware", return_value=hardware))
        yield


def emulator(capability: int, seed: int, mutate: Mutate) -> Emulator:
    """Make an emulator that knows what the project's kernels leave unwritten by design."""
    return Emulator(capability, seed, mutate, PADDING)


def rows_at_the_ends_of_the_ranges(m: int, k: int, dtype: torch.dtype, salt: int) -> Tensor:
    """Make ordinary rows, and from row 3 on others: zeros, NaN, an infinity, tiny ones, an outlier, ties of q."""
    generator = torch.Generator().manual_seed(salt)
    x = torch.randn(m, k, generator=generator) * torch.randn(m, 1, generator=generator).mul(4).exp2()
    x[3] = 0
    x[4, k // 2] = torch.nan
    x[5, 0] = -torch.inf
    x[6] *= 1e-30  # E near -100; zero in float16
    x[7] *= 2.0**-130
    x[8, 1] = 3e4
    x[9] = 2.0 ** torch.randint(-14, 2, (k,), generator=generator) * (torch.arange(k) % 2 * 2 - 1)
    return x.to(dtype)


class Product(NamedTuple):
    """``project`` by one tile of the table: ``variant`` is one of `_VARIANTS`."""

    capability: int
    arithmetic: str
    bits: int
    columns: int
    """Of the tile, as its rows."""
    rows: int
    parts: int
    """Of K."""
    variant: str
    order: int = 0
    """Seed of the order in which blocks, warps and additions go on."""

    @property
    def tile(self) -> Tile:
        """The tile of the table that has these columns and rows."""
        candidates = tile_table.tiles(divmod(self.capability, 10), self.bits, self.arithmetic)
        return next(tile for tile in candidates if (tile.columns, tile.rows) == (self.columns, self.rows))

    def run(self) -> list[Pair]:
        """Launch it."""
        seed = definition.seed_tensor(-1234567 * self.rows, "cpu")
        x, request = _VARIANTS[self.variant](self.tile, seed)
        request = request._replace(activation_bits=self.bits)
        before = x.clone(), seed.clone()
        y = kernels.project(x, seed, request, tile=self.tile, splits=self.parts, arithmetic=self.arithmetic)
        return [(x, before[0]), (seed, before[1]), (y, reference.project(x, seed, request))]


def _request(**options) -> Request:
    whole = Request(
        domain=2**32 - 1,
        coefficient=definition.coefficient(definition.DEFAULT_STD),
        activation_bits=16,
        columns=0,
        residual=True,
    )
    return whole._replace(**options)


def _largest_sums(x: Tensor, seed: Tensor, request: Request) -> None:
    """Give two rows the largest sums with the first column: all products have one sign."""
    column = reference.entries(seed, request.domain, 0, x.shape[1], request.column_start, 1)[:, 0]
    x[0], x[1] = column.sign().to(x.dtype) * 1.75, column.sign().to(x.dtype) * -2.0


def _masked(tile: Tile, seed: Tensor) -> tuple[Tensor, Request]:
    """Sizes that are multiples of 16, masked rows, the largest sums."""
    m, k = tile.rows + 11, 1152
    x = rows_at_the_ends_of_the_ranges(m, k, torch.bfloat16, m)
    request = _request(columns=2 * tile.columns, row_mask=torch.arange(m) % 7 != 2)
    _largest_sums(x, seed, request)
    return x, request


def _shard(tile: Tile, seed: Tensor) -> tuple[Tensor, Request]:
    """Nothing is a multiple of anything, nor aligned; a shard of the columns."""
    m, k = tile.rows + 11, 1000
    memory = torch.full((1 + m * (k + 3),), torch.nan)
    x = memory[1:].view(m, k + 3)[:, :k]
    x.copy_(rows_at_the_ends_of_the_ranges(m, k, torch.float32, m))
    return x, _request(columns=tile.columns + 37, column_start=130)


def _projection(tile: Tile, seed: Tensor) -> tuple[Tensor, Request]:
    """x @ P without x, at the last columns there are."""
    m, k, columns = tile.rows + 11, 272, 2 * tile.columns - 16
    x = rows_at_the_ends_of_the_ranges(m, k, torch.float16, m)
    return x, _request(columns=columns, column_start=2**32 - columns, domain=5, residual=False)


def _whole_tiles(tile: Tile, seed: Tensor) -> tuple[Tensor, Request]:
    """Whole tiles of finite rows, the largest sums among them: no padding is read."""
    m, k = 2 * tile.rows, 1280
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(torch.bfloat16)
    request = _request(columns=tile.columns)
    _largest_sums(x, seed, request)
    return x, request


def _ties(tile: Tile, seed: Tensor) -> tuple[Tensor, Request]:
    """Half of all results lie between two bfloat16: 2**-8 times an odd number of 9 bits."""
    k = 19
    x = torch.randint(0, 2, (tile.rows, k), generator=torch.Generator().manual_seed(k)) * 2.0 - 1
    return x.to(torch.bfloat16), _request(columns=k, coefficient=2.0**-8)


_VARIANTS = {
    "masked": _masked,
    "shard": _shard,
    "projection": _projection,
    "whole tiles": _whole_tiles,
    "ties": _ties,
}


class Sizes(NamedTuple):
    """``project`` of few rows, columns and k by the smallest tile: one of each, and every alignment."""

    capability: int
    bits: int
    parts: int
    m: int
    k: int
    columns: int
    dtype: str
    offset: int
    """Of x in its storage, in elements."""
    gap: int
    """Elements between two rows."""

    def run(self) -> list[Pair]:
        """Launch it."""
        memory = torch.full((self.offset + self.m * (self.k + self.gap),), torch.nan, dtype=getattr(torch, self.dtype))
        x = memory[self.offset :].view(self.m, self.k + self.gap)[:, : self.k]
        x.copy_(torch.randn(self.m, self.k, generator=torch.Generator().manual_seed(self.k)))
        seed = definition.seed_tensor(-(2**63), "cpu")
        start = self.k - self.columns
        coefficient = definition.coefficient(3e-38)
        request = _request(domain=1, coefficient=coefficient, columns=self.columns, column_start=start)
        request = request._replace(activation_bits=self.bits)
        tile = tile_table.tiles(divmod(self.capability, 10), self.bits, "int8")[0]
        y = kernels.project(x, seed, request, tile=tile, splits=self.parts, arithmetic="int8")
        return [(y, reference.project(x, seed, request))]


class LongRows(NamedTuple):
    """``project`` of rows that quantise_kernel reads twice."""

    capability: int
    dtype: str
    bits: int
    parts: int
    aligned: bool = True
    """To 16 bytes, each row and its length."""

    def run(self) -> list[Pair]:
        """Launch it."""
        k = plan.LONGEST_BLOCK + 128 - (not self.aligned)
        x = rows_at_the_ends_of_the_ranges(10, k, getattr(torch, self.dtype), 8)
        if not self.aligned:
            x = torch.nn.functional.pad(x, (1, 1), value=torch.nan)[:, 1:-1]
        seed = definition.seed_tensor(2**62 + 1, "cpu")
        request = _request(domain=0, columns=16, column_start=64, activation_bits=self.bits)
        tile = tile_table.tiles(divmod(self.capability, 10), self.bits, "int8")[0]
        y = kernels.project(x, seed, request, tile=tile, splits=self.parts, arithmetic="int8")
        return [(y, reference.project(x, seed, request))]


class Entries(NamedTuple):
    """``entries`` of a window."""

    capability: int
    k_start: int
    k: int
    n_start: int
    n: int

    def run(self) -> list[Pair]:
        """Launch it."""
        window = (definition.seed_tensor(-3, "cpu"), 2**32 - 2, self.k_start, self.k, self.n_start, self.n)
        return [(kernels.entries(*window), reference.entries(*window))]


class Inputs(NamedTuple):
    """The protocol's hashes (``dtype`` int32) or normal numbers of four seeds."""

    capability: int
    dtype: str
    count: int

    def run(self) -> list[Pair]:
        """Launch it."""
        seeds = torch.tensor([[0], [1], [-(2**31)], [-1]], dtype=torch.int32)
        if self.dtype == "int32":
            return [(triton_inputs.hash32(seeds, 1000, self.count), inputs._plain_hash32(seeds, 1000, self.count))]
        dtype = getattr(torch, self.dtype)
        return [(triton_inputs.normal(seeds, self.count, dtype), inputs._plain_normal(seeds, self.count, dtype))]


class KnownAnswers(NamedTuple):
    """The known answers that the project asks for before it serves on a device: all of them, or the edges alone."""

    capability: int
    which: str
    """all or edges."""

    def run(self) -> list[Pair]:
        """Launch them; raises AssertionError with what the project found wrong."""
        answers = self_test._known_answers()
        if self.which == "edges":
            answers = {kind: cases if kind == "edge" else [] for kind, cases in answers.items() if kind != "definition"}
        backend = Backend("triton", kernels.project, kernels.entries, unavailable=lambda device: None)
        wrong = self_test.wrong_answers(backend, torch.device("cpu"), answers)
        assert not wrong, "; ".join(wrong)
        return []


class LargestTile(NamedTuple):
    """The forms of the largest tile, as the project tries them on a device before it serves there."""

    capability: int
    bits: int

    def run(self) -> list[Pair]:
        """Launch them; raises AssertionError with what the project found wrong."""
        capability = divmod(self.capability, 10)
        largest = tile_table.tiles(capability, self.bits, "int8")[-1]
        forms = [(largest, parts) for parts in tile_table.forms_of_k(capability)]

        def by_tile(x: Tensor, seed: Tensor, request: Request, tile: Tile, parts: int) -> Tensor:
            return kernels.project(x, seed, request, tile=tile, splits=parts, arithmetic="int8")

        sizes = (300, 384, 128)
        wrong = check.wrong_forms(torch.device("cpu"), by_tile, "bfloat16", sizes, self.bits, "int8", forms)
        assert not wrong, "; ".join(wrong)
        return []


Case = Product | Sizes | LongRows | Entries | Inputs | KnownAnswers | LargestTile

_ARITHMETIC = {80: ("int8", "fp16"), 89: ("int8",), 90: ("int8", "fp16"), 120: ("int8",)}
CAPABILITIES = tuple(_ARITHMETIC)
"""Those whose matrix instructions the emulator knows. Triton multiplies by others on sm_100 and sm_103."""


_VARIANTS_OF = {"int8": ("masked", "shard", "projection"), "fp16": ("whole tiles", "masked", "shard")}
"""Of `Product`, by arithmetic. Float16 sums are shown to be exact where no padding takes part."""


def _products(capability: int) -> Iterator[Product]:
    for arithmetic, bits in itertools.product(_ARITHMETIC[capability], (16, 8)):
        for tile in tile_table.tiles(divmod(capability, 10), bits, arithmetic):
            for parts, variant in (*itertools.product((1, 3), _VARIANTS_OF[arithmetic]), (1, "ties")):
                yield Product(capability, arithmetic, bits, tile.columns, tile.rows, parts, variant)


def _other_orders(capability: int) -> Iterator[Product]:
    """Yield products in many parts in orders of their own: of the smallest tile and of the largest."""
    for bits, place in ((16, 0), (8, -1)):
        tile = tile_table.tiles(divmod(capability, 10), bits, "int8")[place]
        for order in range(1, 9):
            yield Product(capability, "int8", bits, tile.columns, tile.rows, 5, "masked", order)


_SIZES = (
    (1, 1, 1, "float32", 0, 0),
    (1, 17, 1, "bfloat16", 1, 0),
    (2, 160, 16, "float16", 1, 0),
    (3, 160, 17, "bfloat16", 0, 16),
    (17, 160, 160, "bfloat16", 0, 3),
    (2, 2064, 33, "float32", 16, 0),
    (5, 129, 64, "float16", 0, 15),
    (33, 48, 48, "bfloat16", 8, 0),
)
_WINDOWS = ((0, 64, 0, 128), (7, 150, 5, 131), (65520, 16, 2**32 - 130, 130), (3, 1, 2**31 - 64, 129), (16, 33, 0, 1))
_INPUTS = (("int32", 1000), ("float32", 2001), ("bfloat16", 2000), ("float16", 1001))


def all_cases(capability: int) -> list[Case]:
    """Return every case of a capability: minutes of work."""
    return [
        *_products(capability),
        *_other_orders(capability),
        *(Sizes(capability, bits, parts, *size) for size in _SIZES for bits, parts in ((16, 1), (8, 2))),
        *(
            LongRows(capability, dtype, bits, parts, aligned)
            for dtype in ("bfloat16", "float32", "float16")
            for bits, parts in ((16, 1), (8, 5))
            for aligned in (True, False)
        ),
        *(Entries(capability, *window) for window in _WINDOWS),
        *(Inputs(capability, *numbers) for numbers in _INPUTS),
        KnownAnswers(capability, "all"),
        *(LargestTile(capability, bits) for bits in (16, 8)),
    ]


def _every_tile(capability: int, parts: tuple[int, ...] = (1, 3)) -> list[Product]:
    """Return a product for each tile of a capability's table and each number of parts of K; variants take turns."""
    chosen: list[Product] = []
    for arithmetic, bits in itertools.product(_ARITHMETIC[capability], (16, 8)):
        for tile, number in itertools.product(tile_table.tiles(divmod(capability, 10), bits, arithmetic), parts):
            variant = _VARIANTS_OF[arithmetic][len(chosen) % 3]
            chosen.append(Product(capability, arithmetic, bits, tile.columns, tile.rows, number, variant))
    return chosen


_USUAL: dict[int, Callable[[], list[Case]]] = {
    80: lambda: [
        *_every_tile(80),
        *(Entries(80, *window) for window in _WINDOWS[:2]),
        LongRows(80, "float16", 16, 1),
        LongRows(80, "bfloat16", 8, 5),
        KnownAnswers(80, "edges"),
    ],
    89: lambda: [*_every_tile(89, parts=(1,))],
    90: lambda: [
        *_every_tile(90),
        *(case for case in all_cases(90) if isinstance(case, Sizes | Entries | Inputs)),
        LongRows(90, "bfloat16", 16, 1),
        LongRows(90, "float32", 8, 5),
        LongRows(90, "float16", 16, 1, False),
        KnownAnswers(90, "all"),
    ],
    120: lambda: [*_every_tile(120, parts=(3,)), Product(120, "int8", 16, 64, 16, 1, "projection")],
}


def usual_cases(capability: int) -> list[Case]:
    """Return the cases that `make test` runs: every kernel, and every tile at least once."""
    return _USUAL[capability]()
