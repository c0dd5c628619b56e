"""The CPU's units for tiles of bfloat16 (AMX) for compiled loops: eight tiles of 16 rows of 64 bytes. Imports numba.

A tile of a left matrix holds 16 rows of 32 bfloat16, one of a right matrix 32 rows of 16 columns, of which each two rows are
interleaved, and one of products 16 x 16 float32. Tiles 0 to 7 are named by constants; addresses and strides are in bytes. The
instructions are those of chapter 3 of Intel's "Architecture Instruction Set Extensions Programming Reference".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "BFLOATS",
    "SHORTS",
    "SINGLES",
    "TILE",
    "WORDS",
    "at_address",
    "clear",
    "configure",
    "interleave",
    "load",
    "multiply",
    "release",
    "room",
    "rounded",
    "shuffled",
    "store",
    "transpose",
    "transposed",
]

TILE = 1024  # bytes
I8, I64 = ir.IntType(8), ir.IntType(64)
CONFIGURATION = bytearray([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])  # palette 1, bytes in a row, rows


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _tile(number: Any) -> Any:
    return ir.Constant(I8, number.literal_value)


@intrinsic
def configure(context: Any) -> Any:
    """Take the tiles into use, for the calling thread, until `release`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = cgutils.global_constant(builder.module, "configuration_of_tiles", cgutils.make_bytearray(CONFIGURATION))
        _call(builder, "ldtilecfg", builder.bitcast(address, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(context: Any) -> Any:
    """Give the tiles back."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def clear(context: Any, tile: Any) -> Any:
    """Set a tile to zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilezero", _tile(tile))
        return context.get_dummy_value()

    return types.void(tile), generate


def _moved(name: str, doc: str) -> Any:
    @intrinsic(prefer_literal=True)
    def move(context: Any, tile: Any, address: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            stride = context.cast(builder, args[2], signature.args[2], types.int64)
            _call(builder, name, _tile(tile), builder.inttoptr(args[1], I8.as_pointer()), stride)
            return context.get_dummy_value()

        return types.void(tile, types.int64, types.int64), generate

    move.__doc__ = doc
    return move


load = _moved("tileloadd64", "Load a tile from an address, whose rows are *stride* bytes apart.")
store = _moved("tilestored64", "Store a tile at an address, its rows *stride* bytes apart.")


@intrinsic(prefer_literal=True)
def multiply(context: Any, into: Any, left: Any, right: Any) -> Any:
    """Add the product of two tiles of bfloat16 to a tile of float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tdpbf16ps", _tile(into), _tile(left), _tile(right))
        return context.get_dummy_value()

    return types.void(into, left, right), generate


@intrinsic(prefer_literal=True)
def room(context: Any, size: Any) -> Any:
    """Return the address of so many bytes on the stack."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():  # (numba's own way fills it with zeros, one by one)
            space = builder.alloca(ir.ArrayType(I8, size.literal_value))
        space.align = 64
        return builder.ptrtoint(space, I64)

    return types.int64(size), generate


class _BFloat(ir.Type):
    def _to_string(self) -> str:
        return "bfloat"


WORDS, SHORTS, HALVES = ir.VectorType(ir.IntType(32), 16), ir.VectorType(ir.IntType(16), 32), ir.VectorType(ir.IntType(16), 16)
SINGLES, BFLOATS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_BFloat(), 32)


def at_address(builder: Any, kind: Any, address: Any, offset: Any = 0) -> Any:
    """Return a pointer to a *kind* that lies *offset* bytes from an address."""
    offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def shuffled(builder: Any, one: Any, other: Any, order: list[int]) -> Any:
    """Return the elements of two vectors in this order."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the transposed of 16 vectors of 16 words."""
    for step in (1, 2, 4, 8):  # swaps, of each two rows that are step apart, the blocks of that size beside the diagonal
        swapped = list(rows)
        for n in (n for n in range(16) if not n & step):
            one, other = rows[n], rows[n + step]
            swapped[n] = shuffled(builder, one, other, [i if not i & step else 16 + i - step for i in range(16)])
            swapped[n + step] = shuffled(builder, one, other, [i + step if not i & step else 16 + i for i in range(16)])
        rows = swapped
    return rows


def rounded(builder: Any, low: Any, high: Any) -> Any:
    """Return two vectors of 16 float32 as one of bfloat16, rounded to the nearest, ties to even; denormals are zeros."""
    kind = ir.FunctionType(BFLOATS, [SINGLES, SINGLES])
    convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return builder.bitcast(builder.call(convert, [high, low]), SHORTS)


@intrinsic
def interleave(context: Any, tile: Any, source: Any, stride: Any) -> Any:
    """Write 32 rows of 16 bfloat16 at *source*, *stride* bytes apart, to the address *tile* as one of a right matrix."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, source, stride = args
        order = [i for n in range(16) for i in (n, 16 + n)]
        for pair in range(16):
            rows = (builder.mul(stride, ir.Constant(I64, 2 * pair + n)) for n in (0, 1))
            upper, lower = (builder.load(at_address(builder, HALVES, source, row), align=2) for row in rows)
            builder.store(shuffled(builder, upper, lower, order), at_address(builder, SHORTS, tile, 64 * pair), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def transpose(context: Any, tile: Any, source: Any, stride: Any) -> Any:
    """Write the transposed of 16 rows of 32 bfloat16 at *source*, *stride* bytes apart, to *tile*, as one of a right matrix."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, source, stride = args
        rows = []
        for n in range(16):  # of 16 words of two bfloat16
            rows.append(builder.load(at_address(builder, WORDS, source, builder.mul(stride, ir.Constant(I64, n))), align=2))
        for n, row in enumerate(transposed(builder, rows)):
            builder.store(row, at_address(builder, WORDS, tile, 64 * n), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
