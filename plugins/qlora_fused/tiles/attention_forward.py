"""The forward pass of causal attention in tiles: 32 queries at a time, a panel, and of the keys up to them. Imports numba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from qlora_fused.jit import INLINE, Loop, elements, numbers, real, take
from qlora_fused.tiles.attention_products import (
    BLOCK,
    CHUNK,
    COUNTER,
    FACTOR,
    HEADS,
    INF,
    LENGTH,
    LINE,
    LSE,
    PART,
    SHARED,
    SIDE,
    WIDTH,
    ZERO,
    Tiles,
    edge_of,
    ordered_first,
    ordered_second,
    products,
    room_of,
    rows_of,
    scores,
    transpose_rows,
    turn,
    turn_back,
    write_pair,
)
from qlora_fused.tiles.instructions import SINGLES, TILE, WORDS, configure, release
from qlora_fused.tiles.lanes import (
    LANES,
    difference,
    fused,
    keep,
    lanes,
    larger,
    operation,
    power,
    product,
    quotient,
    spread,
    total,
)

__all__ = ["attend_loop"]

ONE = np.float32(1)
LOG2_E = math.log2(math.e)
ROOT_BITS = 0x3F3504F3  # of sqrt(1/2)


@operation(LANES, LANES)
def logarithm(builder: Any, x: Any) -> Any:
    """Return log2(x) of normal numbers, by the series of atanh((m - 1) / (m + 1)) for a mantissa m about 1."""
    bits, root, shift = builder.bitcast(x, WORDS), *(ir.Constant(WORDS, [n] * 16) for n in (ROOT_BITS, 23))
    exponent = builder.ashr(builder.sub(bits, root), shift)
    m = builder.bitcast(builder.sub(bits, builder.shl(exponent, shift)), SINGLES)
    one, *series = (ir.Constant(SINGLES, [number] * 16) for number in (1.0, *(2 * LOG2_E / n for n in (9, 7, 5, 3, 1))))
    z = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
    square, y = builder.fmul(z, z), series[0]
    for factor in series[1:]:
        y = builder.fadd(builder.fmul(y, square), factor)
    return builder.fadd(builder.fmul(y, z), builder.sitofp(exponent, SINGLES))


@njit(**INLINE)
def _to_probabilities(scores: Any, keys: Any, factor: Any, shift: Any, shift_too: Any) -> Any:
    """Write 2^(score * factor + shift) as tiles of a right matrix over the scores; return the sums of the two halves."""
    zero = spread(ZERO)
    some, some_too, more, more_too = zero, zero, zero, zero
    for n in range(0, keys * LINE, 2 * LINE):
        here = scores + n
        p, p_too = power(fused(lanes(here), factor, shift)), power(fused(lanes(here + 64), factor, shift_too))
        r, r_too = power(fused(lanes(here + 128), factor, shift)), power(fused(lanes(here + 192), factor, shift_too))
        some, some_too, more, more_too = total(some, p), total(some_too, p_too), total(more, r), total(more_too, r_too)
        write_pair(scores + n // 2, p, p_too, r, r_too)  # not beyond what has been read
    return total(some, more), total(some_too, more_too)


@njit(error_model="numpy")
def _lessen(block: Any, less: Any, less_too: Any) -> None:
    for here in range(block, block + BLOCK, LINE):
        keep(here, product(lanes(here), less))
        keep(here + 64, product(lanes(here + 64), less_too))


@njit(error_model="numpy")
def _attend_panel(at: Any, q: Any, k: Any, out: Any, lse: Any, row: Any, room: Any) -> None:
    """Write 32 rows of the output, from *row* on."""
    length, width, factor, zero = at[LENGTH], at[WIDTH], spread(real(at[FACTOR])), spread(ZERO)
    queries = transpose_rows(q, row, width, room.right)
    most, most_too, some, some_too = spread(-INF), spread(-INF), zero, zero
    for start in range(0, row + SIDE, CHUNK):
        keys, before, before_too = min(CHUNK, row + SIDE - start), most, most_too
        for key in range(0, keys, SIDE):
            block = room.scores + key * LINE
            scores(k, start + key, queries, width, block, row, -INF)
            for here in range(block, block + BLOCK, LINE):
                most, most_too = larger(lanes(here), most), larger(lanes(here + 64), most_too)
        shift, shift_too = difference(zero, product(most, factor)), difference(zero, product(most_too, factor))
        less, less_too = power(fused(before, factor, shift)), power(fused(before_too, factor, shift_too))
        more, more_too = _to_probabilities(room.scores, keys, factor, shift, shift_too)
        some, some_too = fused(some, less, more), fused(some_too, less_too, more_too)
        less, less_too = ordered_first(less, less_too), ordered_second(less, less_too)
        for column in range(0, width, SIDE):
            block = room.outputs + column * LINE
            if start:
                _lessen(block, less, less_too)
            values = Tiles(room.turned + (column * 2 * length) + start * SIDE, length * SIDE, 64, TILE)
            products(values, Tiles(room.scores, 64, LINE, 2 * TILE), keys // SIDE, block, start == 0)
    keep(lse, fused(most, factor, logarithm(some)))
    keep(lse + 64, fused(most_too, factor, logarithm(some_too)))
    keep(room.spare, quotient(spread(ONE), some))
    keep(room.spare + 64, quotient(spread(ONE), some_too))
    turn_back(room.outputs, width, out, row, room.spare)


@Loop
def attend_loop(a: Any) -> None:
    """Compute a part of the queries of a pair of batch and head of keys."""
    at = numbers(a)
    heads, shared, length, width = at[HEADS], at[SHARED], at[LENGTH], at[WIDTH]
    share = heads // shared
    room = room_of(at, take(elements(a, at[COUNTER])))
    configure()
    item = take(a)
    while item < at[1]:
        pair, part = item // at[PART], item % at[PART]
        batch, group = pair // shared, pair % shared
        start, end, k = edge_of(at, part), edge_of(at, part + 1), rows_of(at, 1, batch, group)
        turn(rows_of(at, 2, batch, group), end, length, width, room.turned, room.spare)
        for head in range(group * share, (group + 1) * share):
            q, out = rows_of(at, 0, batch, head), rows_of(at, 3, batch, head)
            for row in range(start, end, SIDE):
                _attend_panel(at, q, k, out, at[LSE] + 4 * ((batch * heads + head) * length + row), row, room)
        item = take(a)
    release()
