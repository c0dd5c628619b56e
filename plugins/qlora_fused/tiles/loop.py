"""Products of matrices on the CPU's units for tiles of bfloat16 (AMX), chained in one loop. Imports numba.

A right matrix may be a weight in 4 bits, which is unpacked a few columns at a time, into the cache, where the rows of the left
matrix are multiplied by it; a sum of several products is rounded once. The loop is told what to do by numbers, which `Chain` in
`chains` lists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qlora_fused.jit import I64, INLINE, Loop, elements, floats, numbers, put, real, take
from qlora_fused.tiles.gates import gate, gate_backward
from qlora_fused.tiles.instructions import TILE, clear, configure, load, multiply, release, room, store
from qlora_fused.tiles.lanes import lanes, write
from qlora_fused.tiles.panels import WIDE, make_panel

__all__ = ["run_chain"]

BLOCK = 4 * TILE  # bytes of 32 x 32 float32
SUMS = 4 * BLOCK
PATIENCE = 2**14  # looks, of some 40 ns, that a thread takes before it lets others run
ZERO = np.float32(0)

# Where the loop's numbers are: how many blocks are done, how many threads have begun, room for each, and the first step
DONE, THREADS, SPACE, SIZE, STEP = range(2, 7)
# of a step: its first block, how many it has, where the next step is, what it is, and how many blocks must be done before
FIRST, BLOCKS, NEXT, KIND, BEFORE = range(5)
COPY, PRODUCT = range(2)
# of a copy
SOURCE, TARGET, TIMES, HEIGHT, WIDTH, ALL_ROWS, ALL_COLUMNS, COLUMN = range(5, 13)
# of a product: sizes, and how many rows and panels of columns a block has; where it goes, and the transposed of it
ROWS, SOME, COLUMNS, PANELS, OUT, STRIDE, DOWN, AHEAD, HOW, TURNED, TURNED_STRIDE = range(5, 16)
# what is added, a factor, how many times 32 the summands add up, how many there are
ADDEND, BIAS, FACTOR, STEPS, PARTS = range(16, 21)
# what is gated: which way, two constants, and blocks
GATING, C0, C1, GATE, UP, GATED, D_GATE, D_UP, UP_BIAS, SUMMANDS = range(21, 31)
# of a summand, with the bytes from row to row, and from 32 rows and 32 columns to the next; and the right matrix's numbers
LEFT, LEFT_STRIDE, LEFT_DOWN, LEFT_AHEAD, RIGHT, OWN_STEPS = range(6)
SUMMAND = RIGHT + 16

ROUNDED, SINGLE, SINGLE_T = range(3)
"""How a product is written: as bfloat16, as float32, or the transposed of it as float32."""
FORWARD, BACK = 1, 2
"""Which way is gated."""


def _counter(place: int, doc: str, *, add: bool = True) -> Any:
    @intrinsic
    def count(context: Any, data: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            counter = builder.gep(builder.bitcast(args[0], I64.as_pointer()), [ir.Constant(I64, place)])
            if add:
                return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "acq_rel")
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
            return builder.load_atomic(counter, "acquire", 8)

        return types.int64(data), generate

    count.__doc__ = doc
    return count


_finish = _counter(DONE, "Count one more block as done.")
_done = _counter(DONE, "Return how many blocks are done, after a moment's rest.", add=False)
_own = _counter(THREADS, "Return a number for the calling thread.")


@intrinsic
def _yield(context: Any, data: Any) -> Any:
    """Let other threads run, of which one may be what this one waits for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(data), generate


@njit(error_model="numpy")
def _copy(a: Any, step: Any) -> None:
    """Write float32 times a factor as bfloat16 into a larger matrix that is zero elsewhere."""
    at = numbers(a)
    source, out, factor = floats(at[step + SOURCE]), elements(a, at[step + TARGET]), real(at[step + TIMES])
    rows, columns, first = at[step + HEIGHT], at[step + WIDTH], at[step + COLUMN]
    all_rows, all_columns = at[step + ALL_ROWS], at[step + ALL_COLUMNS]
    for i in range(all_rows * all_columns):
        put(out, i, ZERO)
    for row in range(rows):
        for column in range(columns):
            put(out, row * all_columns + first + column, source[row * columns + column] * factor)


@njit(error_model="numpy")
def _begin(a: Any, step: Any, row: Any, column: Any) -> None:
    """Set tiles 0 to 3 to what a product of 32 rows and columns is added to."""
    at = numbers(a)
    if at[step + ADDEND] == 0:
        clear(0)
        clear(1)
        clear(2)
        clear(3)
        return
    stride = 4 * at[step + COLUMNS]
    addend = at[step + ADDEND] + row * stride + 4 * column
    load(0, addend, stride)
    load(1, addend + 64, stride)
    if row + 16 < at[step + ROWS]:
        load(2, addend + 16 * stride, stride)
        load(3, addend + 16 * stride + 64, stride)


@njit(error_model="numpy")
def _gate(a: Any, step: Any, line: Any, there: Any, sums: Any) -> None:
    """Gate a line of the block *there*, or two going back; *sums* are what products gave for it."""
    at = numbers(a)
    c0, c1 = real(at[step + C0]), real(at[step + C1])
    if at[step + GATING] == FORWARD:
        gate(sums + 128 * line, sums + BLOCK + 128 * line, at[step + GATED] + there + 64 * line, c0, c1)
        return
    for row in range(2 * line, 2 * line + 2):
        here, out = there + 64 * row, at[step + GATED] + there + 64 * row
        gates, ups = at[step + GATE] + here, at[step + UP] + here
        gate_backward(sums + 128 * row, gates, ups, out, at[step + D_GATE] + here, at[step + D_UP] + here, c0, c1)


@njit(error_model="numpy")
def _square(a: Any, step: Any, part: Any, row: Any, panel: Any, done: Any, end: Any, there: Any, before: Any) -> Any:
    """Add 32 rows of a summand from *row* on, times *panel*, to tiles 0 to 3.

    While these are busy, lines *done* to *end* of the block before are gated, as `_gate` has it; return which are done.
    """
    at = numbers(a)
    stride, ahead, steps = at[part + LEFT_STRIDE], at[part + LEFT_AHEAD], at[part + OWN_STEPS]
    upper = at[part + LEFT] + row // 32 * at[part + LEFT_DOWN]
    lower = upper + 16 * stride
    if row + 16 < at[step + ROWS]:
        for k in range(steps):
            load(4, upper + ahead * k, stride)
            load(6, panel + 2 * TILE * k, 64)
            load(5, lower + ahead * k, stride)
            load(7, panel + 2 * TILE * k + TILE, 64)
            multiply(0, 4, 6)
            multiply(1, 4, 7)
            multiply(2, 5, 6)
            multiply(3, 5, 7)
            if done < end:
                _gate(a, step, done, there, before)
                done += 1
    else:
        for k in range(steps):
            load(4, upper + ahead * k, stride)
            load(6, panel + 2 * TILE * k, 64)
            load(7, panel + 2 * TILE * k + TILE, 64)
            multiply(0, 4, 6)
            multiply(1, 4, 7)
    return done


@njit(**INLINE)
def _keep_square(sums: Any) -> None:
    store(0, sums, 128)
    store(1, sums + 64, 128)
    store(2, sums + 16 * 128, 128)
    store(3, sums + 16 * 128 + 64, 128)


@njit(error_model="numpy")
def _add_bias(address: Any, column: Any, sums: Any) -> None:
    if address == 0:
        return
    own, bias = floats(sums), floats(address)
    for i in range(32):
        for j in range(32):
            own[32 * i + j] += bias[column + j]


@njit(error_model="numpy")
def _put_square(a: Any, step: Any, row: Any, column: Any, sums: Any) -> None:
    """Write tiles 0 to 3 to where they belong; *sums* is room for them."""
    at = numbers(a)
    stride, down, ahead, how = at[step + STRIDE], at[step + DOWN], at[step + AHEAD], at[step + HOW]
    rows = min(32, at[step + ROWS] - row)
    out = at[step + OUT] + row // 32 * down + column // WIDE * ahead
    if how == SINGLE:
        store(0, out, stride)
        store(1, out + 64, stride)
        if rows > 16:
            store(2, out + 16 * stride, stride)
            store(3, out + 16 * stride + 64, stride)
        return
    _keep_square(sums)
    own = floats(sums)
    if how == SINGLE_T:
        single, factor = floats(at[step + OUT]), real(at[step + FACTOR])
        for j in range(32):
            for i in range(rows):
                single[(column + j) * stride + row + i] = own[32 * i + j] * factor
        return
    _add_bias(at[step + BIAS], column, sums)
    for i in range(rows):
        write(out + i * stride, lanes(sums + 128 * i), lanes(sums + 128 * i + 64))
    if at[step + TURNED] != 0:
        turned, per_row = elements(a, at[step + TURNED]), at[step + TURNED_STRIDE]
        for j in range(32):
            for i in range(rows):
                put(turned, (column + j) * per_row + row + i, own[32 * i + j])


@njit(error_model="numpy")
def _gated(a: Any, step: Any, row: Any, column: Any, panel: Any, old: Any, there: Any, sums: Any) -> Any:
    """Compute a block of gate and up, or of the gradient of their product, and gate that before; return where this one is.

    *old* are the sums of the block before, at *there*, 0 for none; *sums* is where those of this block are kept.
    """
    at = numbers(a)
    forward, parts = at[step + GATING] == FORWARD, at[step + PARTS]
    sides = 2 if forward else 1
    lines = 16 * sides if old != 0 else 0
    done, each = 0, parts // sides
    this = (row // 32 * (at[step + COLUMNS] // WIDE) + column // WIDE) * 2 * TILE
    for side in range(sides):
        _begin(a, step, row, column)
        for n in range(side * each, (side + 1) * each):
            part = step + SUMMANDS + n * SUMMAND
            done = _square(a, step, part, row, panel, done, lines * (side + 1) // sides, there, old)
            panel += 2 * TILE * at[part + OWN_STEPS]
        own = sums + BLOCK * side
        _keep_square(own)
        if forward:
            _add_bias(at[step + (UP_BIAS if side else BIAS)], column, own)
            for i in range(32):
                write(at[step + (UP if side else GATE)] + this + 64 * i, lanes(own + 128 * i), lanes(own + 128 * i + 64))
    for line in range(done, lines):
        _gate(a, step, line, there, old)
    return this


@njit(error_model="numpy")
def _product(a: Any, step: Any, item: Any, space: Any, sums: Any) -> None:
    """Compute one part of a product: some rows for some columns."""
    at = numbers(a)
    rows, some, columns, panels = at[step + ROWS], at[step + SOME], at[step + COLUMNS], at[step + PANELS]
    size = 2 * TILE * at[step + STEPS]
    parts = -(-rows // some)
    first, column = item % parts * some, item // parts * panels * WIDE
    panels = min(panels, (columns - column) // WIDE)
    scales = space + panels * size
    for panel in range(panels):
        here = space + panel * size
        for n in range(at[step + PARTS]):
            part = step + SUMMANDS + n * SUMMAND
            make_panel(a, part + RIGHT, column + panel * WIDE, here, scales)
            here += 2 * TILE * at[part + OWN_STEPS]
    old, there = 0, 0
    for row in range(first, min(rows, first + some), 32):  # of the left matrix, from afar, each once for all panels
        for panel in range(panels):
            here, own = space + panel * size, column + panel * WIDE
            if at[step + GATING] != 0:
                new = sums if old != sums else sums + 2 * BLOCK
                there = _gated(a, step, row, own, here, old, there, new)
                old = new
                continue
            _begin(a, step, row, own)
            for n in range(at[step + PARTS]):
                part = step + SUMMANDS + n * SUMMAND
                _square(a, step, part, row, here, 0, 0, 0, 0)
                here += 2 * TILE * at[part + OWN_STEPS]
            _put_square(a, step, row, own, sums)
    if old != 0:
        for line in range(32 if at[step + GATING] == FORWARD else 16):
            _gate(a, step, line, there, old)


@Loop
def run_chain(a: Any) -> None:
    """Do the steps, blocks of one side by side."""
    at = numbers(a)
    space, sums, step = at[SPACE] + _own(a) * at[SIZE], room(SUMS), STEP
    configure()
    block = take(a)
    while block < at[1]:
        while block >= at[step + FIRST] + at[step + BLOCKS]:
            step = at[step + NEXT]
        waited = 0
        while _done(a) < at[step + BEFORE]:
            waited += 1
            if waited > PATIENCE:
                _yield(a)
        if at[step + KIND] == COPY:
            _copy(a, step)
        else:
            _product(a, step, block - at[step + FIRST], space, sums)
        _finish(a)
        block = take(a)
    release()
