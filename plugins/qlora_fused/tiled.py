"""Chains of matrix products on the CPU's units for tiles of bfloat16 (AMX), the threads of torch together, in one call.

A right matrix may be a weight in 4 bits, which is unpacked a few columns at a time, into the cache, where the rows of the left
matrix are multiplied by it; a sum of several products is rounded once. That is what LoRA on a packed weight needs,
x Q(W)^T + h B^T; `tiled_lora` says what is multiplied by what. Imports numba.

Matrices are (rows, columns), or in blocks, (rows / 32, columns / 32, 32, 32): these are written and read in the order of
memory, where rows that are far apart take a quarter longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from qlora_fused.fourbit import Packed
from qlora_fused.gates import CONSTANTS, gate, gate_backward
from qlora_fused.jit import I64, INLINE, Loop, elements, floats, numbers, put, real, take
from qlora_fused.panels import COLUMNS, FOURBIT, FOURBIT_T, PLAIN, PLAIN_T, make_panel
from qlora_fused.tiles import TILE, clear, configure, load, multiply, release, room, round_to, store

__all__ = ["Chain", "Right", "in_blocks"]

COPY, PRODUCT = range(2)
GATED, GATED_BACK = 1, 2
ROUNDED, SINGLE, SINGLE_T = range(3)
"""How a product is written: as bfloat16, as float32, or the transposed of it as float32."""
SUMMANDS, SUMMAND = 30, 20  # where a product's summands begin, and how many numbers each has
PANELS = 2**20  # bytes of panels that are worked on at a time: they stay in L2
STEPS = 128  # times 32 of the sum that are made at a time: more would leave no room for panels
SHARES = 3  # parts, at least, that a thread gets of a product
ZERO = np.float32(0)
UNGATED = (0,) * 9
UNPACKED = (0,) * 9  # where a packed weight has the numbers of a Packed


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


_finish = _counter(2, "Count one more block as done.")
_done = _counter(2, "Return how many blocks are done, after a moment's rest.", add=False)
_own = _counter(3, "Return a number for the calling thread.")


@njit(error_model="numpy")
def _copy(a: Any, step: Any) -> None:
    """Write float32 times a factor as bfloat16 into a larger matrix that is zero elsewhere."""
    at = numbers(a)
    source, out, factor = floats(at[step + 5]), elements(a, at[step + 6]), real(at[step + 7])
    rows, columns, all_rows, all_columns, first = at[step + 8], at[step + 9], at[step + 10], at[step + 11], at[step + 12]
    for i in range(all_rows * all_columns):
        put(out, i, ZERO)
    for row in range(rows):
        for column in range(columns):
            put(out, row * all_columns + first + column, source[row * columns + column] * factor)


@njit(error_model="numpy")
def _begin(a: Any, step: Any, row: Any, column: Any) -> None:
    """Set tiles 0 to 3 to what a product of 32 rows and columns is added to."""
    at = numbers(a)
    if at[step + 16] == 0:
        clear(0)
        clear(1)
        clear(2)
        clear(3)
        return
    stride = 4 * at[step + 7]
    addend = at[step + 16] + row * stride + 4 * column
    load(0, addend, stride)
    load(1, addend + 64, stride)
    if row + 16 < at[step + 5]:
        load(2, addend + 16 * stride, stride)
        load(3, addend + 16 * stride + 64, stride)


@njit(error_model="numpy")
def _gate(a: Any, step: Any, line: Any, there: Any, sums: Any) -> None:
    """Gate a line of the block *there*, or two going back; *sums* are what products gave for it."""
    at = numbers(a)
    c0, c1 = real(at[step + 22]), real(at[step + 23])
    if at[step + 21] == GATED:
        gate(sums + 128 * line, sums + 4096 + 128 * line, at[step + 26] + there + 64 * line, c0, c1)
        return
    for row in range(2 * line, 2 * line + 2):
        here, out = there + 64 * row, at[step + 26] + there + 64 * row
        gates, ups = at[step + 24] + here, at[step + 25] + here
        gate_backward(sums + 128 * row, gates, ups, out, at[step + 27] + here, at[step + 28] + here, c0, c1)


@njit(error_model="numpy")
def _square(a: Any, step: Any, part: Any, row: Any, panel: Any, done: Any, end: Any, there: Any, before: Any) -> Any:
    """Add 32 rows of a summand from *row* on, times *panel*, to tiles 0 to 3.

    While these are busy, lines *done* to *end* of the block before are gated, as `_gate` has it; return which are done.
    """
    at = numbers(a)
    stride, ahead, steps = at[part + 1], at[part + 3], at[part + 5]
    upper = at[part] + row // 32 * at[part + 2]
    lower = upper + 16 * stride
    if row + 16 < at[step + 5]:
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
    store(2, sums + 2048, 128)
    store(3, sums + 2048 + 64, 128)


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
    stride, down, ahead, how = at[step + 10], at[step + 11], at[step + 12], at[step + 13]
    rows = min(32, at[step + 5] - row)
    out = at[step + 9] + row // 32 * down + column // COLUMNS * ahead
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
        single, factor = floats(at[step + 9]), real(at[step + 18])
        for j in range(32):
            for i in range(rows):
                single[(column + j) * stride + row + i] = own[32 * i + j] * factor
        return
    _add_bias(at[step + 17], column, sums)
    for i in range(rows):
        round_to(out + i * stride, sums + 128 * i)
    if at[step + 14] != 0:
        turned, per_row = elements(a, at[step + 14]), at[step + 15]
        for j in range(32):
            for i in range(rows):
                put(turned, (column + j) * per_row + row + i, own[32 * i + j])


@njit(error_model="numpy")
def _gated(a: Any, step: Any, row: Any, column: Any, panel: Any, old: Any, there: Any, sums: Any) -> Any:
    """Compute a block of gate and up, or of the gradient of their product, and gate that before; return where this one is.

    *old* are the sums of the block before, at *there*, 0 for none; *sums* is where those of this block are kept.
    """
    at = numbers(a)
    forward, parts = at[step + 21] == GATED, at[step + 20]
    sides = 2 if forward else 1
    lines = 16 * sides if old != 0 else 0
    done, each = 0, parts // sides
    this = (row // 32 * (at[step + 7] // COLUMNS) + column // COLUMNS) * 2 * TILE
    for side in range(sides):
        _begin(a, step, row, column)
        for n in range(side * each, (side + 1) * each):
            part = step + SUMMANDS + n * SUMMAND
            done = _square(a, step, part, row, panel, done, lines * (side + 1) // sides, there, old)
            panel += 2 * TILE * at[part + 5]
        own = sums + 4096 * side
        _keep_square(own)
        if forward:
            _add_bias(at[step + 17 + 12 * side], column, own)
            for i in range(32):
                round_to(at[step + 24 + side] + this + 64 * i, own + 128 * i)
    for line in range(done, lines):
        _gate(a, step, line, there, old)
    return this


@njit(error_model="numpy")
def _product(a: Any, step: Any, item: Any, space: Any, sums: Any) -> None:
    """Compute one part of a product: some rows for some columns."""
    at = numbers(a)
    rows, some, columns, panels = at[step + 5], at[step + 6], at[step + 7], at[step + 8]
    size = 2 * TILE * at[step + 19]
    parts = -(-rows // some)
    first, column = item % parts * some, item // parts * panels * COLUMNS
    panels = min(panels, (columns - column) // COLUMNS)
    scales = space + panels * size
    for panel in range(panels):
        here = space + panel * size
        for n in range(at[step + 20]):
            part = step + SUMMANDS + n * SUMMAND
            make_panel(a, part + 4, column + panel * COLUMNS, here, scales)
            here += 2 * TILE * at[part + 5]
    old, there = 0, 0
    for row in range(first, min(rows, first + some), 32):  # of the left matrix, from afar, each once for all panels
        for panel in range(panels):
            here, own = space + panel * size, column + panel * COLUMNS
            if at[step + 21] != 0:
                new = sums if old != sums else sums + 8192
                there = _gated(a, step, row, own, here, old, there, new)
                old = new
                continue
            _begin(a, step, row, own)
            for n in range(at[step + 20]):
                part = step + SUMMANDS + n * SUMMAND
                _square(a, step, part, row, here, 0, 0, 0, 0)
                here += 2 * TILE * at[part + 5]
            _put_square(a, step, row, own, sums)
    if old != 0:
        for line in range(32 if at[step + 21] == GATED else 16):
            _gate(a, step, line, there, old)


@Loop
def _chain(a: Any) -> None:
    at = numbers(a)
    space, sums, step = at[4] + _own(a) * at[5], room(16384), 6
    configure()
    block = take(a)
    while block < at[1]:
        while block >= at[step] + at[step + 1]:
            step = at[step + 2]
        while _done(a) < at[step + 4]:
            pass
        if at[step + 3] == COPY:
            _copy(a, step)
        else:
            _product(a, step, block - at[step], space, sums)
        _finish(a)
        block = take(a)
    release()


def in_blocks(rows: int, columns: int) -> Tensor:
    """Return room for a matrix of bfloat16 in blocks."""
    return torch.empty(rows // 32, columns // COLUMNS, 32, COLUMNS, dtype=torch.bfloat16)


def _strides(matrix: Tensor) -> tuple[int, int, int]:
    """Return the bytes from a row to the next, and from 32 rows and 32 columns to the next."""
    size, row = matrix.element_size(), matrix.stride(-2)
    down, ahead = (matrix.stride(0), matrix.stride(1)) if matrix.dim() == 4 else (32 * row, COLUMNS)
    return row * size, down * size, ahead * size


def _shape(matrix: Tensor) -> tuple[int, int]:
    size = 32 if matrix.dim() == 4 else 1
    return matrix.shape[0] * size, matrix.shape[1] * size


class Right(NamedTuple):
    """A right matrix (rows, columns): bfloat16 or a layer's weight in 4 bits, as it is or the *transposed* of it."""

    kind: int
    rows: int
    columns: int
    numbers: tuple[int, ...]
    source: Any
    """What has to live until the chain has run."""

    @classmethod
    def plain(cls, matrix: Tensor, *, transposed: bool = False) -> Right:
        """Return that of a matrix of bfloat16, whose rows are contiguous."""
        rows, columns = _shape(matrix)[::-1] if transposed else _shape(matrix)
        told = (matrix.data_ptr(), *_strides(matrix), *UNPACKED)
        return cls(PLAIN_T if transposed else PLAIN, rows, columns, told, matrix)

    @classmethod
    def packed(cls, weight: Packed, shape: Sequence[int], *, transposed: bool = False) -> Right:
        """Return Q(W) of *shape*, (out, in)."""
        rows, columns = reversed(shape) if transposed else shape
        told = (0, shape[1] // 2, 0, 0, *weight.numbers)
        return cls(FOURBIT_T if transposed else FOURBIT, rows, columns, told, weight)


Summand = tuple[Tensor, Right, int, int]
"""A left and a right matrix, and the first of the rows / 32 of the right one that are meant, and how many."""


def _cut(summands: Sequence[Summand]) -> tuple[list[Summand], list[Summand]]:
    """Return the first STEPS of a sum, and the others."""
    some: list[Summand] = []
    others: list[Summand] = []
    room = STEPS
    for left, right, first, steps in summands:
        now = min(room, steps)
        room -= now
        if now:
            some.append((left, right, first, now))
        if steps > now:
            others.append((left, right, first + now, steps - now))
    return some, others


class Chain:
    """Products that are computed one after the other, or side by side where no `then` lies between them."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.blocks = self.before = self.space = 0
        self.alive: list[Any] = []

    def then(self) -> Chain:
        """Let what follows wait for what is there."""
        self.before = self.blocks
        return self

    def copy(self, out: Tensor, matrix: Tensor, factor: float = 1.0, *, column: int = 0) -> None:
        """Write *factor* times *matrix*, float32, to the first rows of *out*, bfloat16, from *column* on; elsewhere zeros."""
        if matrix.dtype != torch.float32 or not matrix.is_contiguous():
            matrix = matrix.detach().float().contiguous()
        self.alive.append(matrix)
        self._step(1, COPY, matrix, out, float(factor), *matrix.shape, *out.shape, column)

    def product(
        self,
        out: Tensor,
        *summands: tuple[Tensor, Right],
        addend: Tensor | None = None,
        bias: Tensor | None = None,
        turned: Tensor | None = None,
    ) -> Tensor:
        """Write the sum of all left (rows, k) @ right (k, columns), to *out*, and the transposed of it to *turned*.

        *addend* (rows, columns) and *bias* (columns), float32, are added before it is rounded. left and *turned* are bfloat16,
        out bfloat16 or float32, which takes no bias. Columns and k are multiples of 32, rows of 16.
        """
        parts = [(left, right, 0, right.rows // 32) for left, right in summands]
        size = _shape(out)
        while sum(steps for *_, steps in parts) > STEPS:
            some, parts = _cut(parts)
            sums = torch.empty(size) if addend is None else addend
            self._product(*size, some, sums, *_strides(sums), SINGLE, 0, 0, 0 if addend is None else addend, 0, 1.0)
            self.then()
            addend = sums
        told = [*_strides(out), SINGLE if out.dtype == torch.float32 else ROUNDED]
        told += [0, 0] if turned is None else [turned, turned.stride(0)]
        told += [0 if part is None else part for part in (addend, bias)]
        self._product(*size, parts, out, *told, 1.0)
        self.alive += [addend, bias]
        return out

    def product_t(self, out: Tensor, left: Tensor, right: Right, factor: float) -> Tensor:
        """Write *factor* times the transposed of left @ right to *out* (columns, rows), float32.

        left: (at least *rows*, k), right: (k, columns).
        """
        columns, rows = out.shape
        self._product(
            rows, columns, [(left, right, 0, right.rows // 32)], out, out.stride(0), 0, 0, SINGLE_T, 0, 0, 0, 0, float(factor)
        )
        return out

    def gated(
        self, x: Tensor, h: Tensor, rights: Sequence[tuple[Right, Right]], biases: Sequence[Tensor | None], activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x @ right + h @ other + bias of both sides, gate and up, and act(gate) * up, in blocks.

        The last is made of gate and up as they are before they are rounded.
        """
        columns = rights[0][0].columns
        gate, up, out = (in_blocks(len(x), columns) for _ in range(3))
        parts = [(left, own, 0, own.rows // 32) for pair in rights for left, own in zip((x, h), pair, strict=True)]
        first, second = (0 if bias is None else bias for bias in biases)
        gating = (GATED, *CONSTANTS[activation], gate, up, out, 0, 0, second)
        self._product(len(x), columns, parts, *[0] * 8, first, 1.0, gating=gating)
        self.alive.append(biases)
        return gate, up, out

    def gated_backward(
        self, gate: Tensor, up: Tensor, *summands: tuple[Tensor, Right], activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return act(gate) * up, and the gradients of gate and up for that of their product, which *summands* add up to.

        All in blocks; what is summed up is not rounded.
        """
        out, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
        parts = [(left, right, 0, right.rows // 32) for left, right in summands]
        gating = (GATED_BACK, *CONSTANTS[activation], gate, up, out, d_gate, d_up, 0)
        self._product(*_shape(gate), parts, *[0] * 9, 1.0, gating=gating)
        return out, d_gate, d_up

    def _product(
        self, rows: int, columns: int, summands: Sequence[Summand], *numbers: Any, gating: Sequence[Any] = UNGATED
    ) -> None:
        steps = sum(own for *_, own in summands)
        wanted = SHARES * torch.get_num_threads()
        panels = max(1, min(PANELS // (2 * TILE * steps), -(-columns // (COLUMNS * wanted))))
        shares = -(-columns // (COLUMNS * panels))
        cuts = -(-wanted // shares) if shares < torch.get_num_threads() else 1
        some = -(-rows // (32 * cuts)) * 32
        told = [rows, some, columns, panels, *numbers, steps, len(summands), *gating]
        for left, right, first, own in summands:
            row, down, ahead = _strides(left)
            told += [left.data_ptr() + first * ahead, row, down, ahead, right.kind, own, first, *right.numbers]
        self._step(shares * -(-rows // some), PRODUCT, *told)
        self.space = max(self.space, panels * 2 * TILE * steps + 128 * steps)
        self.alive.append(summands)

    def _step(self, blocks: int, kind: int, *numbers: Any) -> None:
        self.steps.append([self.blocks, blocks, 0, kind, self.before, *numbers])
        self.blocks += blocks

    def run(self) -> None:
        """Compute all."""
        told, begin = [], 6
        for step in self.steps:
            begin += len(step)
            step[2] = begin
            told += step
        own = -(-self.space // 4096) * 4096
        space = torch.empty(torch.get_num_threads() * own + 64, dtype=torch.uint8)
        _chain(torch.bfloat16, self.blocks, 0, 0, space.data_ptr() + -space.data_ptr() % 64, own, *told)
