"""Right matrices of products by tiles: panels of 32 columns, made from rows of bfloat16 or straight from weights in 4 bits.

A panel lists for every 32 rows of the matrix the two tiles of 16 columns. Weights in 4 bits come out with the bits that
bitsandbytes gives them (but denormals, which are zeros), and are never written as a matrix. Imports numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qlora_fused.fourbit import scale_of
from qlora_fused.jit import I64, INLINE, floats, numbers
from qlora_fused.tiles.instructions import (
    SHORTS,
    SINGLES,
    TILE,
    WORDS,
    at_address,
    interleave,
    rounded,
    shuffled,
    transpose,
    transposed,
)

__all__ = ["FOURBIT", "FOURBIT_T", "PLAIN", "PLAIN_T", "WIDE", "make_panel"]

WIDE = 32  # of a panel
PLAIN, PLAIN_T, FOURBIT, FOURBIT_T = range(4)
"""What a right matrix is made of: rows of bfloat16, or packed weights; T: it is the transposed of these."""

OCTETS = ir.VectorType(ir.IntType(8), 16)


def _all(number: int) -> Any:
    return ir.Constant(WORDS, [number] * 16)


def _values(builder: Any, table: Any, levels: Any, scales: Any) -> Any:
    """Return the products of the values of *table* at *levels*, of which the lower 4 bits count, and *scales*."""
    kind = ir.FunctionType(SINGLES, [SINGLES, WORDS])
    look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.fmul(builder.call(look_up, [table, levels]), scales)


def _store_pairs(builder: Any, upper: Any, lower: Any, address: Any) -> None:
    """Store two rows of 16 float32 as a row of a tile: rounded to bfloat16 and interleaved."""
    both = rounded(builder, upper, lower)
    builder.store(shuffled(builder, both, both, [i for n in range(16) for i in (n, 16 + n)]), address, align=64)


@intrinsic
def _unpack_t(context: Any, tiles: Any, packed: Any, stride: Any, code: Any, scales: Any) -> Any:
    """Write 16 rows of 64 weights at *packed*, transposed, to a tile at *tiles* and one two tiles on; *scales*: 16 float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tiles, packed, stride, code, scales = args
        table, scale = (builder.load(at_address(builder, SINGLES, part), align=4) for part in (code, scales))
        half, rows = ir.VectorType(ir.IntType(32), 8), []
        for n in range(16):
            words = builder.load(at_address(builder, half, packed, builder.mul(stride, ir.Constant(I64, n))), align=1)
            rows.append(shuffled(builder, words, words, [*range(8)] * 2))
        for n, word in enumerate(transposed(builder, rows)[:8]):  # of 16 rows the same eight weights
            for octet in range(4):
                first, second = (builder.lshr(word, _all(8 * octet + shift)) for shift in (4, 0))
                pair = [_values(builder, table, levels, scale) for levels in (first, second)]
                row = 4 * n + octet
                _store_pairs(builder, *pair, at_address(builder, SHORTS, tiles, 2 * TILE * (row // 16) + 64 * (row % 16)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _unpack(context: Any, tiles: Any, packed: Any, stride: Any, code: Any, scales: Any) -> Any:
    """Write 2 rows of 32 weights at *packed* to a row of the tile at *tiles* and of the next; *scales*: 2 float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tiles, packed, stride, code, scales = args
        table = builder.load(at_address(builder, SINGLES, code), align=4)
        rows = []
        for n in range(2):
            octets = builder.load(at_address(builder, OCTETS, packed, builder.mul(stride, ir.Constant(I64, n))), align=1)
            scale = builder.load(at_address(builder, ir.FloatType(), scales, 4 * n))
            one = builder.insert_element(ir.Constant(SINGLES, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
            rows.append((octets, shuffled(builder, one, one, [0] * 16)))
        shifts = ir.Constant(WORDS, [4, 0] * 8)
        for half in range(2):
            values = []
            for octets, scale in rows:
                twice = shuffled(builder, octets, octets, [8 * half + n // 2 for n in range(16)])
                values.append(_values(builder, table, builder.lshr(builder.zext(twice, WORDS), shifts), scale))
            _store_pairs(builder, *values, at_address(builder, SHORTS, tiles, TILE * half))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit(error_model="numpy")
def make_panel(a: Any, part: Any, column: Any, panel: Any, scales: Any) -> None:
    """Write the columns from *column* on to the address *panel*; *part* is where the right matrix's numbers begin.

    These are its kind, how many times 32 of its rows are meant and from which on, an address, of what lies there the bytes from
    a row to the next and from 32 rows and 32 columns to the next, and those of a Packed. *scales* is room for float32.
    """
    at = numbers(a)
    kind, steps, first, source = at[part], at[part + 1], at[part + 2], at[part + 3]
    stride, down, ahead = at[part + 4], at[part + 5], at[part + 6]
    if kind == PLAIN:
        for k in range(steps):
            here = source + (first + k) * down + column // WIDE * ahead
            interleave(panel + 2 * TILE * k, here, stride)
            interleave(panel + 2 * TILE * k + TILE, here + 32, stride)
    elif kind == PLAIN_T:
        for k in range(steps):
            here = source + column // WIDE * down + (first + k) * ahead
            transpose(panel + 2 * TILE * k, here, stride)
            transpose(panel + 2 * TILE * k + TILE, here + 16 * stride, stride)
    elif kind == FOURBIT:
        _fourbit(a, part + 7, steps, first, column, stride, panel, scales)
    else:
        _fourbit_t(a, part + 7, steps, first, column, stride, panel, scales)


@njit(**INLINE)
def _fourbit(a: Any, weight: Any, steps: Any, first: Any, column: Any, stride: Any, panel: Any, scales: Any) -> None:
    at = numbers(a)
    blocksize, own = at[weight + 2], floats(scales)
    per_row = 2 * stride // blocksize
    for n in range(32 * steps):
        own[n] = scale_of(at, weight, (32 * first + n) * per_row + column // blocksize)
    for n in range(0, 32 * steps, 2):
        here = panel + n // 32 * 2 * TILE + n % 32 * 32
        _unpack(here, at[weight] + (32 * first + n) * stride + column // 2, stride, at[weight + 1], scales + 4 * n)


@njit(**INLINE)
def _fourbit_t(a: Any, weight: Any, steps: Any, first: Any, column: Any, stride: Any, panel: Any, scales: Any) -> None:
    at = numbers(a)
    blocksize, own = at[weight + 2], floats(scales)
    per_row = 2 * stride // blocksize
    for n in range(WIDE):
        for i in range(32 * first // blocksize, -(-32 * (first + steps) // blocksize)):
            own[(i - 32 * first // blocksize) * WIDE + n] = scale_of(at, weight, (column + n) * per_row + i)
    for k in range(0, steps, 2):
        for n in range(0, WIDE, 16):
            here = at[weight] + (column + n) * stride + 16 * (first + k)
            scale = scales + 4 * ((32 * (first + k) // blocksize - 32 * first // blocksize) * WIDE + n)
            _unpack_t(panel + 2 * TILE * k + TILE * n // 16, here, stride, at[weight + 1], scale)
