"""Weights packed in 4 bits: unpacked to the bits of bitsandbytes, or multiplied by a few rows as they are, LoRA included.

For many rows a weight is unpacked once and multiplied by all of them. For the one row of a new token, writing the unpacked
weight to memory and reading it again takes ten times as long as its product. Imports numba.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from qlora_fused.jit import (
    BLOCK,
    DTYPES,
    I16,
    I32,
    I64,
    INLINE,
    SINGLE,
    Loop,
    elements,
    floats,
    get,
    numbers,
    octets,
    put,
    real,
    take,
)

__all__ = ["ROWS", "Packed", "gemv", "scale_of", "unpacked"]

ROWS = 8  # up to which it is quicker, or as quick: measured at 576 x 576 to 4096 x 4096
BLOCKS = 8  # into which the outputs of a layer are cut: a few for each thread
FIRST, NUMBERS = 7, 16  # where the first layer's numbers are in the array, and how many each has
ZERO = np.float32(0)

LANES = 16
OCTETS, HALVES, INTEGERS, SINGLES = (ir.VectorType(kind, LANES) for kind in (ir.IntType(8), I16, I32, SINGLE))


def _all(number: int) -> Any:
    return ir.Constant(INTEGERS, [number] * LANES)


def _load(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)


@intrinsic
def _unpack(context: Any, dtype: Any, code: Any, scale: Any, packed: Any, out: Any, count: Any) -> Any:
    """Write *count* times 32 weights, code * scale rounded to what *dtype* points to, to *out*, two for each octet.

    *out* is of that dtype, or float32.
    Vectors are written out, since no compiler finds them: sixteen products stay in a register, in which levels are looked up.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, code, scale, packed, out, count = args
        out_kind = signature.args[4]
        features = context.codegen().magic_tuple()[2]
        first = builder.insert_element(ir.Constant(SINGLES, ir.Undefined), scale, ir.Constant(I32, 0))
        scales = builder.shuffle_vector(first, first, _all(0))
        table = builder.fmul(_load(builder, SINGLES, code), scales)
        if dtype.dtype != types.float32:  # to the nearest, ties to even
            bits = builder.bitcast(table, INTEGERS)
            odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            bits = builder.add(builder.add(bits, _all(0x7FFF)), odd)
            table = builder.bitcast(builder.and_(bits, _all(0xFFFF0000)), SINGLES)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            here = builder.mul(loop.index, ir.Constant(I64, LANES))
            pairs = builder.zext(_load(builder, OCTETS, builder.gep(packed, [here])), INTEGERS)
            high, low = builder.lshr(pairs, _all(4)), builder.and_(pairs, _all(15))
            to = builder.gep(out, [builder.mul(here, ir.Constant(I64, 2))])
            for half in (0, 1):
                order = [i for n in range(half * LANES // 2, (half + 1) * LANES // 2) for i in (n, LANES + n)]
                weights = _looked_up(builder, table, builder.shuffle_vector(high, low, ir.Constant(INTEGERS, order)), features)
                if out_kind.dtype != types.float32:
                    weights = builder.trunc(builder.lshr(builder.bitcast(weights, INTEGERS), _all(16)), HALVES)
                address = builder.bitcast(builder.gep(to, [ir.Constant(I64, half * LANES)]), weights.type.as_pointer())
                builder.store(weights, address, align=2)
        return context.get_dummy_value()

    kinds = (dtype, types.CPointer(types.float32), types.float32, types.CPointer(types.uint8), out, types.int64)
    return types.void(*kinds), generate


def _looked_up(builder: Any, table: Any, levels: Any, features: str) -> Any:
    """Return the values of *table* at *levels*, in the way that the processor has."""

    def call(name: str, *values: Any) -> Any:
        declared = ir.FunctionType(values[0].type, [value.type for value in values])
        return builder.call(cgutils.get_or_insert_function(builder.module, declared, name), values)

    if "+avx512f" in features:
        return call("llvm.x86.avx512.permvar.sf.512", table, levels)
    if "+avx2" in features:
        halves = [ir.Constant(ir.VectorType(I32, 8), list(range(start, start + 8))) for start in (0, 8)]
        found = []
        for half in halves:
            own = builder.shuffle_vector(levels, levels, half)
            lower, upper = (call("llvm.x86.avx2.permps", builder.shuffle_vector(table, table, part), own) for part in halves)
            beyond = builder.icmp_signed(">", own, ir.Constant(own.type, [7] * 8))
            found.append(builder.select(beyond, upper, lower))
        return builder.shuffle_vector(*found, ir.Constant(INTEGERS, list(range(LANES))))
    place = builder.bitcast(cgutils.alloca_once_value(builder, table), SINGLE.as_pointer())
    out = ir.Constant(SINGLES, ir.Undefined)
    for lane in (ir.Constant(I32, n) for n in range(LANES)):
        value = builder.load(builder.gep(place, [builder.extract_element(levels, lane)]))
        out = builder.insert_element(out, value, lane)
    return out


@intrinsic
def _ahead(context: Any, pointer: Any, count: Any) -> Any:
    """Return *pointer*, moved by *count* of what it points to."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


@njit(error_model="numpy", fastmath=False)  # by itself: in the loop the product and the sum would be rounded together
def _plus(x: Any, y: Any, z: Any) -> Any:
    return x * y + z


@njit(**INLINE)
def scale_of(at: Any, first: Any, block: Any) -> Any:
    """Return the scale of a block of weights, to the bits of bitsandbytes; *first* is where a Packed's numbers begin."""
    if at[first + 3] == 0:
        return floats(at[first + 4])[block]
    levels, code, scales = octets(at[first + 4]), floats(at[first + 5]), floats(at[first + 6])
    return _plus(code[levels[block]], scales[block // at[first + 8]], floats(at[first + 7])[0])


@Loop
def _unpacked(a: Any) -> None:
    at = numbers(a)
    out, n, size, weight = elements(a, at[2]), at[3], at[4], 5
    packed, code, blocksize = octets(at[weight]), floats(at[weight + 1]), at[weight + 2]
    block = take(a)
    while block < at[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            here, to = _ahead(packed, i * blocksize // 2), _ahead(out, i * blocksize)
            _unpack(a, code, scale_of(at, weight, i), here, to, blocksize // 32)
        block = take(a)


@Loop
def _gemv(a: Any) -> None:
    at = numbers(a)
    x, room, rows, d_in, ranks = elements(a, at[2]), at[3], at[4], at[5], at[6]
    block = take(a)
    if block < at[1]:  # each thread has room of its own, that of the first block it takes: for a row of W, x and h
        weights = floats(room + 4 * block * (d_in + rows * (d_in + ranks)))
        wide = _ahead(weights, d_in)
        h = _ahead(wide, rows * d_in)
        for i in range(rows * d_in):
            wide[i] = get(x, i)
    done = np.int64(-1)
    while block < at[1]:
        layer = FIRST + block // BLOCKS * NUMBERS
        y, lora_a, lora_b = elements(a, at[layer]), floats(at[layer + 1]), floats(at[layer + 2])
        rank, scale, bias, d_out = at[layer + 3], real(at[layer + 4]), floats(at[layer + 5]), at[layer + 6]
        weight = layer + 7
        packed, code, blocksize = octets(at[weight]), floats(at[weight + 1]), at[weight + 2]
        per_row, size = d_in // blocksize, -(-d_out // BLOCKS)
        if done != layer:
            done = layer
            for n in range(rows * rank):
                total = ZERO
                for i in range(d_in):
                    total += lora_a[n % rank * d_in + i] * wide[n // rank * d_in + i]
                h[n] = total * scale
        start = block % BLOCKS * size
        for j in range(start, min(d_out, start + size)):
            for n in range(j * per_row, (j + 1) * per_row):
                there = _ahead(weights, (n - j * per_row) * blocksize)
                _unpack(a, code, scale_of(at, weight, n), _ahead(packed, n * blocksize // 2), there, blocksize // 32)
            for row in range(rows):
                total = ZERO
                for i in range(d_in):
                    total += weights[i] * wide[row * d_in + i]
                for r in range(rank):
                    total += h[row * rank + r] * lora_b[j * rank + r]
                if at[layer + 5] != 0:
                    total += bias[j]
                put(y, row * d_out + j, total)
        block = take(a)


@dataclass(frozen=True)
class Packed:
    """What the loop is told of a weight that it knows, as long as the weight lies where it did."""

    dtype: torch.dtype
    numbers: tuple[int, ...]
    """Addresses of weight and code, block size; of the scales 1 where they are nested, addresses, and their own block size."""
    sources: tuple[Tensor, ...]
    """What lies at the addresses besides the weight."""

    def __reduce__(self) -> Any:
        """Let a copy of a model, whose weights lie elsewhere, begin with None."""
        return type(None), ()

    @classmethod
    def of(cls, layer: Any) -> Packed | None:
        """Return that of *layer*, a Linear4bit, or None."""
        weight = layer.weight
        state = weight.quant_state
        found: Packed | None = getattr(state, "packed_numbers", None)
        if found is None or not found.holds(weight, _sources(state)):
            state.packed_numbers = found = cls._read(weight, state)
        return found

    def holds(self, weight: Tensor, sources: tuple[Tensor, ...]) -> bool:
        """Return whether all lies where it did."""
        same = self.numbers[0] == weight.data_ptr() and len(sources) == len(self.sources)
        return same and all(map(operator.is_, sources, self.sources))

    @classmethod
    def _read(cls, weight: Tensor, state: Any) -> Packed | None:
        code, absmax, *nested = sources = _sources(state)
        known = state.dtype in DTYPES and weight.device.type == "cpu" and weight.shape[0] != 1 and weight.is_contiguous()
        known = known and state.blocksize % 32 == 0 and state.shape[1] % state.blocksize == 0
        known = known and absmax.dtype == (torch.uint8 if nested else torch.float32)
        if not known or any(part.dtype != torch.float32 for part in (code, *nested)):
            return None
        if nested and state.state2.dtype != torch.float32:
            return None
        more = [*(part.data_ptr() for part in nested), state.state2.blocksize] if nested else [0, 0, 0, 1]
        numbers = (weight.data_ptr(), code.data_ptr(), state.blocksize, int(bool(nested)), absmax.data_ptr(), *more)
        return cls(state.dtype, numbers, sources)


def _sources(state: Any) -> tuple[Tensor, ...]:
    """Return what a QuantState has beside the weight: its code and scales, and where these are nested those of the scales."""
    if not state.nested:
        return state.code, state.absmax
    return state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset


def unpacked(layer: Any) -> Tensor | None:
    """Return Q(W) (out, in) of *layer*, a Linear4bit, as bitsandbytes does, or None where its weight is not known."""
    packed = Packed.of(layer)
    if packed is None:
        return None
    out = torch.empty(layer.weight.quant_state.shape, dtype=packed.dtype)
    blocks = out.numel() // (blocksize := packed.numbers[2])
    size = max(1, BLOCK // blocksize)
    _unpacked(packed.dtype, -(-blocks // size), out, blocks, size, *packed.numbers)
    return out


def gemv(x: Tensor, layers: Sequence[Any], ab: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor] | None:
    """Return y_i = x Q(W_i)^T + b_i + s_i (x A_i^T) B_i^T, (rows, out_i), float32 inside and rounded once.

    None where a weight is not known, or is of another dtype or width than x, and for more than ROWS rows, where it would be
    slower. x: (rows, in); *layers* are Linear4bit, *ab* all A and then all B. Q(W) is rounded as bitsandbytes rounds it; A and
    B, which may be wider than x, are not.
    """
    rows, d_in = x.shape
    if rows > ROWS or x.device.type != "cpu" or any(layer.weight.quant_state.shape[1] != d_in for layer in layers):
        return None
    weights = [Packed.of(layer) for layer in layers]
    if any(packed is None or packed.dtype != x.dtype for packed in weights):
        return None
    x, ab = x.contiguous(), [part.float().contiguous() for part in ab]
    ys, biases, arguments, ranks = [], [], [], 0
    for layer, packed, a, b, scale in zip(layers, weights, ab[: len(layers)], ab[len(layers) :], scales, strict=True):
        rank = len(a)
        ys.append(x.new_empty(rows, len(b)))
        biases.append(None if layer.bias is None else layer.bias.float())
        arguments += (ys[-1], a, b, rank, float(scale), 0 if biases[-1] is None else biases[-1], len(b), *packed.numbers)  # type: ignore[union-attr]
        ranks = max(ranks, rank)
    blocks = BLOCKS * len(layers)
    room = torch.empty(blocks * (d_in + rows * (d_in + ranks)), dtype=torch.float32)
    _gemv(x.dtype, blocks, x, room, rows, d_in, ranks, *arguments)
    return ys
