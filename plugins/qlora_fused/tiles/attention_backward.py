"""The backward pass of causal attention in tiles, from queries, keys and a number for each query alone. Imports numba."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    ROWS,
    SCALE,
    SHARED,
    SIDE,
    SUMS,
    TOGETHER,
    WIDTH,
    ZERO,
    Room,
    Tiles,
    edge_of,
    interleave_rows,
    products,
    room_of,
    rows_of,
    scores,
    transpose_rows,
    turn,
    turn_back,
    write_pair,
)
from qlora_fused.tiles.instructions import TILE, configure, release
from qlora_fused.tiles.lanes import difference, fused, keep, lanes, power, product, spread, total, write

__all__ = ["backward_loop", "sum_loop"]

ONE = np.float32(1)


@njit(error_model="numpy")
def _means(at: Any, k: Any, v: Any, lse: Any, row: Any, room: Any) -> Any:
    """Write probabilities p and their gradients dp, of queries from *row* on; return the sums of p dp of the two halves."""
    width, factor, zero = at[WIDTH], spread(real(at[FACTOR])), spread(ZERO)
    shift, shift_too, mean, mean_too = difference(zero, lanes(lse)), difference(zero, lanes(lse + 64)), zero, zero
    queries, gradients = Tiles(room.right, TILE, 64, 2 * TILE), Tiles(room.right + 64 * width, TILE, 64, 2 * TILE)
    for key in range(0, row + SIDE, SIDE):
        p = room.scores + key * LINE
        dp = p + at[LENGTH] * LINE
        scores(k, key, queries, width, p, row, -INF)
        scores(v, key, gradients, width, dp, row, ZERO)
        for n in range(0, BLOCK, LINE):
            x, y = power(fused(lanes(p + n), factor, shift)), power(fused(lanes(p + n + 64), factor, shift_too))
            keep(p + n, x)
            keep(p + n + 64, y)
            mean, mean_too = fused(x, lanes(dp + n), mean), fused(y, lanes(dp + n + 64), mean_too)
    return mean, mean_too


@njit(**INLINE)
def _round_chunk(p: Any, dp: Any, keys: Any, mean: Any, mean_too: Any, to: Any, dto: Any, ds: Any) -> None:
    """Write p and p (dp - mean) to *to* and *dto*, tiles of a left matrix, and the latter to *ds*, of a right one."""
    for n in range(0, keys * 64, 128):
        here, there = p + 2 * n, dp + 2 * n
        x, x_too, y, y_too = lanes(here), lanes(here + 64), lanes(here + 128), lanes(here + 192)
        dx, dx_too = product(x, difference(lanes(there), mean)), product(x_too, difference(lanes(there + 64), mean_too))
        dy = product(y, difference(lanes(there + 128), mean))
        dy_too = product(y_too, difference(lanes(there + 192), mean_too))
        write(to + n, x, x_too)
        write(to + n + 64, y, y_too)
        write(dto + n, dx, dx_too)
        write(dto + n + 64, dy, dy_too)
        write_pair(ds + n, dx, dx_too, dy, dy_too)


@njit(error_model="numpy")
def _backward_panel(at: Any, q: Any, do: Any, dq: Any, k: Any, v: Any, lse: Any, row: Any, panel: Any, room: Any) -> None:
    """Write 32 rows of the gradient of q, from *row* on, and to *panel* what those of k and v need."""
    length, width = at[LENGTH], at[WIDTH]
    transpose_rows(q, row, width, room.right)
    transpose_rows(do, row, width, room.right + 64 * width)
    mean, mean_too = _means(at, k, v, lse, row, room)
    for start in range(0, row + SIDE, CHUNK):
        keys, p = min(CHUNK, row + SIDE - start), room.scores + start * LINE
        to = panel + start * 64
        _round_chunk(p, p + length * LINE, keys, mean, mean_too, to, to + length * 64, room.ds)
        for column in range(0, width, SIDE):
            turned = Tiles(room.turned + (column * 2 * length) + start * SIDE, length * SIDE, 64, TILE)
            block = room.outputs + column * LINE
            products(turned, Tiles(room.ds, 64, LINE, 2 * TILE), keys // SIDE, block, start == 0)
    keep(room.spare, spread(real(at[SCALE])))
    keep(room.spare + 64, spread(real(at[SCALE])))
    turn_back(room.outputs, width, dq, row, room.spare)


@njit(error_model="numpy")
def _add(panel: Any, step: Any, panels: Any, beside: Any, width: Any, sums: Any, fresh: Any) -> None:
    """Add what 32 keys get from some panels to the sums (d / 32, 32, 32) of their gradients."""
    for column in range(0, width, SIDE):
        right = Tiles(beside + column * 64, TILE, 64, 64 * width)
        products(Tiles(panel, TILE, 64, step), right, panels, sums + column * LINE, fresh)


@njit(error_model="numpy")
def _backward_rows(at: Any, batch: Any, head: Any, group: Any, start: Any, end: Any, first: Any, room: Any) -> None:
    """Do all gradients that queries from *start* to *end* have to do with, of some heads from *head* on, which share keys."""
    heads, length, width, together, step = at[HEADS], at[LENGTH], at[WIDTH], at[TOGETHER], LINE * at[LENGTH]
    k, v, panels = rows_of(at, 1, batch, group), rows_of(at, 2, batch, group), (end - start) // SIDE * together
    gradients = room.beside + panels * 64 * width
    for i in range(panels):
        n, row = head + i % together, start + i // together * SIDE
        q, do, dq = rows_of(at, 0, batch, n), rows_of(at, 3, batch, n), rows_of(at, 4, batch, n)
        lse = at[LSE] + 4 * ((batch * heads + n) * length + row)
        _backward_panel(at, q, do, dq, k, v, lse, row, room.panels + i * step, room)
        interleave_rows(q, row, width, room.beside + i * 64 * width)
        interleave_rows(do, row, width, gradients + i * 64 * width)
    initial = head == group * (heads // at[SHARED])
    for values in range(2):  # one after the other: what they have beside them is to stay near
        beside = gradients if values else room.beside
        for key in range(0, end, SIDE):
            skip = max(0, (key - start) // SIDE) * together  # panels of queries before the keys
            panel = room.panels + skip * step + (key if values else length + key) * 64
            sums = room.sums + (values * length + key) * width * 4
            fresh = initial and (first or key >= start)
            _add(panel, step, panels - skip, beside + skip * 64 * width, width, sums, fresh)


@njit(error_model="numpy")
def _round(at: Any, pair: Any, key: Any, sums: Any, parts: Any) -> None:
    """Write 32 rows of the gradients of k and v, from *key* on, of which the sums of *parts* follow upon each other."""
    length, width, batch, group = at[LENGTH], at[WIDTH], pair // at[SHARED], pair % at[SHARED]
    half, scale = 4 * length * width, real(at[SCALE])
    for values in range(2):
        x, factor = rows_of(at, 5 + values, batch, group), spread(ONE if values else scale)
        for n in range(width):  # halves of rows
            here = sums + values * half + key * width * 4 + n * LINE
            low, high = lanes(here), lanes(here + 64)
            for part in range(1, parts):
                low, high = total(low, lanes(here + part * 2 * half)), total(high, lanes(here + part * 2 * half + 64))
            write(x.first + (key + n % SIDE) * x.stride + n // SIDE * 64, product(low, factor), product(high, factor))


@Loop
def backward_loop(a: Any) -> None:
    """Compute all gradients, or sums for those of k and v, for a part of the queries of a pair of batch and head of keys."""
    at = numbers(a)
    shared, length, width, rows = at[SHARED], at[LENGTH], at[WIDTH], at[ROWS]
    share, own = at[HEADS] // shared, room_of(at, take(elements(a, at[COUNTER])))
    configure()
    item = take(a)
    while item < at[1]:
        pair, part = item // at[PART], item % at[PART]
        batch, group, begin, end = pair // shared, pair % shared, edge_of(at, part), edge_of(at, part + 1)
        sums = own.sums if at[PART] == 1 else at[SUMS] + item * 8 * length * width
        room = Room(own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], sums)
        turn(rows_of(at, 1, batch, group), end, length, width, room.turned, room.spare)
        for head in range(group * share, (group + 1) * share, at[TOGETHER]):
            for start in range(begin, end, rows):
                _backward_rows(at, batch, head, group, start, min(start + rows, end), start == begin, room)
        if at[PART] == 1:
            for key in range(0, length, SIDE):
                _round(at, pair, key, sums, 1)
        item = take(a)
    release()


@Loop
def sum_loop(a: Any) -> None:
    """Add up what the parts of a pair gave for k and v, of 32 keys."""
    at = numbers(a)
    blocks, size = at[LENGTH] // SIDE, 8 * at[LENGTH] * at[WIDTH]
    block = take(a)
    while block < at[1]:
        pair, key, part = block // blocks, block % blocks * SIDE, 0
        while edge_of(at, part + 1) <= key:  # has none of these keys
            part += 1
        _round(at, pair, key, at[SUMS] + (pair * at[PART] + part) * size, at[PART] - part)
        block = take(a)
