"""Sixteen float32 in a register of AVX-512, for loops that must be vectors whatever a compiler finds. Imports numba."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from qlora_fused.tiles.instructions import SHORTS, SINGLES, WORDS, rounded

__all__ = [
    "LANES",
    "difference",
    "fused",
    "keep",
    "lanes",
    "larger",
    "operation",
    "power",
    "product",
    "quotient",
    "smaller",
    "spread",
    "total",
    "wide",
    "write",
]

POWER = (1.867130213e-3, 9.017030019e-3, 5.579991332e-2, 2.401644501e-1, 6.931513118e-1, 1.0)  # 2^x to 1e-7, 0 <= x < 1


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Lanes")


LANES = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, SINGLES)


def operation(result: Any, *operands: Any) -> Any:
    """Return what turns `emit(builder, *values)` into an intrinsic of these types."""

    def decorate(emit: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        @functools.wraps(emit)  # whose parameters numba counts
        def typed(context: Any, *given: Any) -> Any:
            return result(*operands), generate

        return intrinsic(typed)

    return decorate


def _all(number: Any, kind: Any = SINGLES) -> Any:
    return ir.Constant(kind, [number] * 16)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), args)


def _fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "fma.v16f32", SINGLES, x, y, z)


@operation(LANES, types.int64)
def lanes(builder: Any, address: Any) -> Any:
    """Return the 16 float32 at an address."""
    return builder.load(builder.inttoptr(address, SINGLES.as_pointer()), align=4)


@operation(LANES, types.int64)
def wide(builder: Any, address: Any) -> Any:
    """Return the 16 bfloat16 at an address."""
    halves = builder.load(builder.inttoptr(address, ir.VectorType(ir.IntType(16), 16).as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), _all(16, WORDS)), SINGLES)


@operation(types.void, types.int64, LANES)
def keep(builder: Any, address: Any, x: Any) -> None:
    """Write 16 float32 to an address."""
    builder.store(x, builder.inttoptr(address, SINGLES.as_pointer()), align=4)


@operation(types.void, types.int64, LANES, LANES)
def write(builder: Any, address: Any, low: Any, high: Any) -> None:
    """Write 32 float32 to an address as bfloat16, to the nearest, ties to even; denormals are zeros."""
    builder.store(rounded(builder, low, high), builder.inttoptr(address, SHORTS.as_pointer()), align=2)


@operation(LANES, types.float32)
def spread(builder: Any, number: Any) -> Any:
    """Return a float32 in all lanes."""
    one = builder.insert_element(ir.Constant(SINGLES, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, _all(0, WORDS))


def _arithmetic(name: str) -> Any:
    @operation(LANES, LANES, LANES)
    def arithmetic(builder: Any, x: Any, y: Any) -> Any:
        return getattr(builder, name)(x, y)

    return arithmetic


total, difference, product, quotient = (_arithmetic(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


@operation(LANES, LANES, LANES)
def smaller(builder: Any, x: Any, y: Any) -> Any:
    """Return the smaller ones of two, and y where x is NaN."""
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


@operation(LANES, LANES, LANES)
def larger(builder: Any, x: Any, y: Any) -> Any:
    """Return the larger ones of two, and y where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@operation(LANES, LANES, LANES, LANES)
def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z."""
    return _fused(builder, x, y, z)


@operation(LANES, LANES)
def power(builder: Any, x: Any) -> Any:
    """Return 2^x, and 0 for minus infinity."""
    usual = _all(0.0), ir.Constant(ir.IntType(16), -1), ir.Constant(ir.IntType(32), 4)
    part = _call(builder, "x86.avx512.mask.reduce.ps.512", SINGLES, x, ir.Constant(ir.IntType(32), 1), *usual)  # x - floor(x)
    y = _all(POWER[0])
    for factor in POWER[1:]:
        y = _fused(builder, y, part, _all(factor))
    return _call(builder, "x86.avx512.mask.scalef.ps.512", SINGLES, y, x, *usual)  # y * 2^floor(x)
