"""What loops over elements are compiled with: numba, and the threads that torch's own kernels run on. Imports numba.

A loop gets one array of int64: the next block to be taken, the number of blocks, then addresses, sizes and float32s' bits. It
is declared as a pointer to what tensors are made of, so that a loop is written once and compiled for each dtype. Threads take
blocks until none is left, so one that the machine holds up delays nobody.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import cfunc, njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from qlora_fused.cpu import has_amx

__all__ = [
    "BLOCK",
    "DTYPES",
    "ONE",
    "Loop",
    "elements",
    "exp",
    "floats",
    "from_order",
    "get",
    "has_tiles",
    "integers",
    "numbers",
    "octets",
    "put",
    "real",
    "sigmoid",
    "take",
    "threads",
    "to_order",
]

BLOCK = 2**15  # elements that a thread takes at a time: a few microseconds
INLINE = {"fastmath": {"contract"}, "inline": "always", "error_model": "numpy"}
I16, I32, I64, SINGLE = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

FOR_TILES = ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")

DTYPES = {torch.bfloat16: types.uint16, torch.float32: types.float32}
"""Of the tensors, with what they are to numba, which does not know bfloat16: the upper half of a float32."""
# sums in any order, so that they are made in vectors; no assumption about NaN and infinity
ARITHMETIC = ("contract", "reassoc", "nsz", "arcp")


class Loop:
    """A function of that array, compiled for a dtype when it is first called with it and kept on disk for the next process."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[torch.dtype, Any] = {}

    def __call__(self, dtype: torch.dtype, blocks: int, *values: Tensor | int | float) -> None:
        """Run for the *blocks* with *values*: the addresses of tensors, ints, and floats as float32."""
        if dtype not in self.compiled:
            # by this name numba keeps it; it looks for changes in the function's own file alone
            self.function.__qualname__ = f"{self.function.__name__}_{_sources()}"
            declared = types.void(types.CPointer(DTYPES[dtype]))
            self.compiled[dtype] = cfunc(declared, cache=True, error_model="numpy", fastmath=set(ARITHMETIC))(self.function)
        array = [_number(value) for value in values]
        data = (ctypes.c_int64 * (2 + len(array)))(0, blocks, *array)
        threads()(self.compiled[dtype].address, data, min(blocks, torch.get_num_threads()), 0)


@functools.cache
def threads() -> Any:
    """Return the entry to the threads that torch uses, `GOMP_parallel(function, data, threads, flags)`, or None.

    It is looked for where torch's library finds it: other threads beside its own would wait for the same cores.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return entry


@functools.cache
def has_tiles() -> bool:
    """Return whether loops may use tiles: the CPU has them, and numba compiles for them and knows them (0.62, of LLVM 20)."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    known = llvm_version_info[0] >= 20 and {f"+{name}" for name in FOR_TILES} <= features
    return known and threads() is not None and has_amx()


@functools.cache
def _sources() -> str:
    """Return a name for what all modules beside this one say: a loop is compiled with functions of several."""
    contents = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(contents).hexdigest()[:12]


def _number(value: Tensor | int | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, int) else int(struct.unpack("i", struct.pack("f", value))[0])


@intrinsic
def take(context: Any, data: Any) -> Any:
    """Return the next block for the calling thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.bitcast(args[0], I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return types.int64(data), generate


@intrinsic
def numbers(context: Any, data: Any) -> Any:
    """Return the array as what it is, of int64."""
    kind = types.CPointer(types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "+avx512bf16" in context.codegen().magic_tuple()[2]:  # LLVM's default, half of it, is for older ones that slow down
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # (add itself knows no attribute with a value)
        return builder.bitcast(args[0], context.get_value_type(kind))

    return kind(data), generate


@intrinsic
def elements(context: Any, data: Any, address: Any) -> Any:
    """Return the tensor at *address*, of the dtype that the loop is compiled for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(data))

    return data(data, types.int64), generate


def _pointer(to: Any) -> Any:
    """Return what turns an address into a pointer to numbers of that type."""
    kind = types.CPointer(to)

    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return pointer


floats, integers, octets = (_pointer(to) for to in (types.float32, types.int64, types.uint8))


@intrinsic
def get(context: Any, tensor: Any, index: Any) -> Any:
    """Return an element as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        if tensor.dtype == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), SINGLE)

    return types.float32(tensor, types.int64), generate


@intrinsic
def put(context: Any, tensor: Any, index: Any, value: Any) -> Any:
    """Set an element to a float32, which for bfloat16 is rounded to the nearest, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rounded = args[2] if tensor.dtype == types.float32 else _half(builder, args[2])
        builder.store(rounded, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(tensor, types.int64, types.float32), generate


def _half(builder: Any, single: Any) -> Any:
    bits = builder.bitcast(single, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd), ir.Constant(I32, 16))
    unordered = builder.fcmp_unordered("uno", single, single)
    return builder.trunc(builder.select(unordered, ir.Constant(I32, 0x7FC0), rounded), I16)


@intrinsic
def real(context: Any, bits: Any) -> Any:
    """Return the float32 whose bits are the lower ones of an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], I32), SINGLE)

    return types.float32(types.int64), generate


@intrinsic
def to_order(context: Any, single: Any) -> Any:
    """Return an int32 that is in the order of the float32s: its maximum is found in vectors whatever becomes of NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _flipped(builder, builder.bitcast(args[0], I32))

    return types.int32(types.float32), generate


@intrinsic
def from_order(context: Any, order: Any) -> Any:
    """Return the float32 that `to_order` was given."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_flipped(builder, args[0]), SINGLE)

    return types.float32(types.int32), generate


def _flipped(builder: Any, bits: Any) -> Any:
    negative = builder.ashr(bits, ir.Constant(I32, 31))
    return builder.xor(bits, builder.and_(negative, ir.Constant(I32, 0x7FFFFFFF)))


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """Return 2 to a whole float32 of -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], I32), ir.Constant(I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(I32, 23)), SINGLE)

    return types.float32(types.float32), generate


ONE = np.float32(1)
LOWEST, HIGHEST = np.float32(-87), np.float32(88)
LOG2_E, HALF = np.float32(1.44269504), np.float32(0.5)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# of Cephes' expf
E0, E1, E2, E3, E4, E5 = (
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@njit(**INLINE)
def exp(x: Any) -> Any:
    """Return e to the float32 *x*, to 3 units in the last place, and below -87 what it is there; in vectors."""
    x = LOWEST if x < LOWEST else x  # (NaN stays NaN)
    x = HIGHEST if x > HIGHEST else x
    n = np.floor(x * LOG2_E + HALF)
    x = x - n * LN2_HIGH
    x = x - n * LN2_LOW
    y = ((((E0 * x + E1) * x + E2) * x + E3) * x + E4) * x + E5
    return (y * x * x + x + ONE) * _power_of_two(n)


@njit(**INLINE)
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e^-x)."""
    return ONE / (ONE + exp(-x))
