"""What attention in tiles is made of: products of 32 x 32, what is turned for them, and where a thread keeps it. Imports numba.

Scores stand with the queries beside each other and the keys below, so that what is done for each query is done in vectors, and
rounded probabilities come to lie as the next products need them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types

from qlora_fused.jit import floats
from qlora_fused.tiles.instructions import (
    SHORTS,
    TILE,
    WORDS,
    at_address,
    clear,
    interleave,
    load,
    multiply,
    rounded,
    shuffled,
    store,
    transpose,
)
from qlora_fused.tiles.lanes import LANES, keep, lanes, operation, product, spread, write

__all__ = [
    "BLOCK",
    "CHUNK",
    "COUNTER",
    "FACTOR",
    "HEADS",
    "INF",
    "LENGTH",
    "LINE",
    "LSE",
    "PART",
    "ROWS",
    "SCALE",
    "SHARED",
    "SIDE",
    "SUMS",
    "TOGETHER",
    "WIDTH",
    "ZERO",
    "Room",
    "Rows",
    "Tiles",
    "edge_of",
    "interleave_rows",
    "ordered_first",
    "ordered_second",
    "products",
    "room_of",
    "rows_of",
    "scores",
    "transpose_rows",
    "turn",
    "turn_back",
    "write_pair",
]

SIDE = 32  # rows and columns of the products in tiles 0 to 3
LINE = 4 * SIDE  # bytes of a row of these, float32
BLOCK = SIDE * LINE
CHUNK = 128  # keys that are done with before others: what belongs to them fits into the nearest memory
ZERO, INF = np.float32(0), np.float32(np.inf)


@operation(LANES, types.int64, LANES, LANES)
def since(builder: Any, lane: Any, x: Any, before: Any) -> Any:
    """Return x in the lanes from *lane* on, and *before* in those before it."""
    one = builder.insert_element(
        ir.Constant(WORDS, ir.Undefined), builder.trunc(lane, WORDS.element), ir.Constant(WORDS.element, 0)
    )
    first = shuffled(builder, one, one, [0] * 16)
    return builder.select(builder.icmp_signed(">=", ir.Constant(WORDS, list(range(16))), first), x, before)


ORDER = [[8 * part + first + n for part in range(4) for n in range(4)] for first in (0, 4)]
"""Of 32 columns in two tiles that `write_pair` writes; others would take it more instructions."""


@operation(types.void, types.int64, LANES, LANES, LANES, LANES)
def write_pair(builder: Any, address: Any, low: Any, high: Any, next_low: Any, next_high: Any) -> None:
    """Write two rows of 32 float32 as bfloat16, interleaved, to 64 bytes of each of two tiles of a right matrix."""
    upper, lower = rounded(builder, low, high), rounded(builder, next_low, next_high)
    for tile, columns in enumerate(ORDER):
        words = shuffled(builder, upper, lower, [column + row for column in columns for row in (0, 32)])
        builder.store(words, at_address(builder, SHORTS, address, 64 * tile), align=2)


def _ordered(tile: int) -> Any:
    @operation(LANES, LANES, LANES)
    def ordered(builder: Any, low: Any, high: Any) -> Any:
        return shuffled(builder, low, high, ORDER[tile])

    return ordered


ordered_first, ordered_second = _ordered(0), _ordered(1)


class Rows(NamedTuple):
    """A matrix in memory: the address of its first row and the bytes from one to the next."""

    first: int
    stride: int


class Tiles(NamedTuple):
    """One side of products: the address of a tile, the bytes to the one beside or below it, to a row, and to the next two."""

    first: int
    twin: int
    stride: int
    step: int


@njit(error_model="numpy")
def products(left: Any, right: Any, steps: Any, block: Any, fresh: Any) -> None:
    """Write 32 x 32 products to *block*, or add them to it unless *fresh*."""
    if fresh:
        clear(0)
        clear(1)
        clear(2)
        clear(3)
    else:
        load(0, block, LINE)
        load(1, block + 64, LINE)
        load(2, block + 16 * LINE, LINE)
        load(3, block + 16 * LINE + 64, LINE)
    a, b = left.first, right.first
    for _ in range(steps):
        load(4, a, left.stride)
        load(6, b, right.stride)
        multiply(0, 4, 6)
        load(7, b + right.twin, right.stride)
        multiply(1, 4, 7)
        load(5, a + left.twin, left.stride)
        multiply(2, 5, 6)
        multiply(3, 5, 7)
        a += left.step
        b += right.step
    store(0, block, LINE)
    store(1, block + 64, LINE)
    store(2, block + 16 * LINE, LINE)
    store(3, block + 16 * LINE + 64, LINE)


@njit(error_model="numpy")
def turn(x: Any, keys: Any, length: Any, width: Any, target: Any, spare: Any) -> None:
    """Write *keys* rows of x (T, d), transposed, as tiles of a left matrix: (d / 16, T / 32)."""
    for column in range(width // 16):
        for key in range(0, keys, SIDE):
            interleave(spare, x.first + key * x.stride + 32 * column, x.stride)
            transpose(target + (column * length + key) * SIDE, spare, 64)


@njit(error_model="numpy")
def transpose_rows(x: Any, row: Any, width: Any, target: Any) -> Any:
    """Return 32 rows of x, transposed, as tiles of a right matrix, written to *target*."""
    for column in range(width // SIDE):
        for half in range(2):
            source = x.first + (row + 16 * half) * x.stride + 64 * column
            transpose(target + (2 * column + half) * TILE, source, x.stride)
    return Tiles(target, TILE, 64, 2 * TILE)


@njit(error_model="numpy")
def interleave_rows(x: Any, row: Any, width: Any, target: Any) -> None:
    """Write 32 rows of x to *target* as tiles of a right matrix."""
    for column in range(width // 16):
        interleave(target + column * TILE, x.first + row * x.stride + 32 * column, x.stride)


@njit(error_model="numpy")
def turn_back(blocks: Any, width: Any, x: Any, row: Any, spare: Any) -> None:
    """Write products (d, 32), of which columns are in ORDER, transposed to rows of x, times the 32 factors at *spare*."""
    tile = spare + LINE
    for n in range(2 * width // SIDE):
        block, second = blocks + n // 2 * BLOCK + n % 2 * 64, n % 2
        transpose(tile, block, LINE)
        transpose(tile + TILE, block + 16 * LINE, LINE)
        for i in range(16):
            there = i // 4 * 8 + i % 4 + 4 * second
            factor = spread(floats(spare)[there])
            low, high = product(lanes(tile + 64 * i), factor), product(lanes(tile + TILE + 64 * i), factor)
            write(x.first + (row + there) * x.stride + n // 2 * 64, low, high)


@njit(error_model="numpy")
def scores(keys: Any, key: Any, queries: Any, width: Any, block: Any, row: Any, hidden: Any) -> None:
    """Write products of 32 keys with 32 queries from *row* on to *block*; *hidden* for keys after the query."""
    products(Tiles(keys.first + key * keys.stride, 16 * keys.stride, keys.stride, 64), queries, width // SIDE, block, True)
    if key == row:
        other = spread(hidden)
        for n in range(SIDE):
            here = block + n * LINE
            keep(here, since(n, lanes(here), other))
            keep(here + 64, since(n - 16, lanes(here + 64), other))


# What a loop is told: sizes, by their place in its array, then tensors
HEADS, SHARED, LENGTH, WIDTH, PART, FACTOR, LSE, SCALE, ROWS, TOGETHER, SUMS, COUNTER, ROOM, SIZE, REGIONS = range(2, 17)
TENSORS = REGIONS + 9


class Room(NamedTuple):
    """What a thread has at hand, by address: regions of memory of its own."""

    turned: int
    """Values or keys, transposed: tiles of a left matrix (d / 16, T / 32)."""
    scores: int
    """(T, 32) float32 of a panel, and for the backward pass as many gradients of probabilities; or of a chunk."""
    right: int
    """Queries of a panel, transposed: tiles of a right matrix, and after them gradients of the output."""
    outputs: int
    """Of a panel, transposed: (d / 32, 32, 32) float32; or gradients of queries."""
    spare: int
    """32 factors, and two tiles."""
    ds: int
    """Gradients of a chunk's scores: tiles of a right matrix, two for 32 keys."""
    beside: int
    """For each panel queries, and after these for each gradients of the output: tiles of a right matrix (d / 16)."""
    panels: int
    """For each probabilities (T, 32) and then gradients of scores, bfloat16: tiles of a left matrix."""
    sums: int
    """Gradients of keys (T / 32, d / 32, 32, 32), and then those of values, float32."""


@njit(error_model="numpy")
def room_of(at: Any, number: Any) -> Any:
    """Return the Room of a thread."""
    first, n = at[ROOM] + number * at[SIZE], REGIONS
    return Room(
        first + at[n],
        first + at[n + 1],
        first + at[n + 2],
        first + at[n + 3],
        first + at[n + 4],
        first + at[n + 5],
        first + at[n + 6],
        first + at[n + 7],
        first + at[n + 8],
    )


@njit(error_model="numpy")
def rows_of(at: Any, tensor: Any, batch: Any, head: Any) -> Any:
    """Return the Rows of a head of a tensor, by its place."""
    n = TENSORS + 4 * tensor
    return Rows(at[n] + batch * at[n + 1] + head * at[n + 2], at[n + 3])


@njit(error_model="numpy")
def edge_of(at: Any, part: Any) -> Any:
    """Return where a part of the queries begins; all have about as many scores."""
    return SIDE * int(at[LENGTH] // SIDE * np.sqrt(part / at[PART]) + 0.5)
