"""The computations between matrix products, each as one pass over bfloat16 or float32 memory, with float32 arithmetic.

What they compute is written down, and computed with torch for other dtypes and devices, in the modules that call them.
Imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qlora_fused.fourbit import ROWS, gemv, unpacked
from qlora_fused.jit import (
    BLOCK,
    DTYPES,
    ONE,
    Loop,
    elements,
    exp,
    floats,
    from_order,
    get,
    integers,
    numbers,
    put,
    real,
    sigmoid,
    take,
    to_order,
)

__all__ = [
    "DTYPES",
    "GATES",
    "ROWS",
    "cross_entropies",
    "gated",
    "gated_backward",
    "gemv",
    "rms_norm",
    "rms_norm_backward",
    "rotated",
    "softmax_backward",
    "unpacked",
]

ZERO, TWO, THREE = (np.float32(number) for number in (0, 2, 3))
CUBIC, ROOT = np.float32(0.044715), np.float32(0.7978845608)  # sqrt(2 / pi)


def _blocks(elements: int) -> int:
    return max(1, elements // BLOCK)


def _rows(rows: int, width: int) -> int:
    """Return how many rows a block has."""
    return max(1, min(rows, BLOCK // width))


@Loop
def _silu(a: Any) -> None:
    at = numbers(a)
    gate, up, out, n, size = elements(a, at[2]), elements(a, at[3]), elements(a, at[4]), at[5], at[6]
    block = take(a)
    while block < at[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g = get(gate, i)
            put(out, i, g * sigmoid(g) * get(up, i))
        block = take(a)


@Loop
def _gelu(a: Any) -> None:
    at = numbers(a)
    gate, up, out, n, size = elements(a, at[2]), elements(a, at[3]), elements(a, at[4]), at[5], at[6]
    block = take(a)
    while block < at[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g = get(gate, i)
            put(out, i, g * sigmoid(TWO * ROOT * (g + CUBIC * g * g * g)) * get(up, i))
        block = take(a)


@Loop
def _silu_backward(a: Any) -> None:
    at = numbers(a)
    product, gate, up = elements(a, at[2]), elements(a, at[3]), elements(a, at[4])
    d_gate, d_up, n, size = elements(a, at[5]), elements(a, at[6]), at[7], at[8]
    block = take(a)
    while block < at[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g, u, d = get(gate, i), get(up, i), get(product, i)
            s = sigmoid(g)
            put(product, i, g * s * u)
            put(d_gate, i, d * u * s * (ONE + g * (ONE - s)))
            put(d_up, i, d * g * s)
        block = take(a)


@Loop
def _gelu_backward(a: Any) -> None:
    at = numbers(a)
    product, gate, up = elements(a, at[2]), elements(a, at[3]), elements(a, at[4])
    d_gate, d_up, n, size = elements(a, at[5]), elements(a, at[6]), at[7], at[8]
    block = take(a)
    while block < at[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g, u, d = get(gate, i), get(up, i), get(product, i)
            s = sigmoid(TWO * ROOT * (g + CUBIC * g * g * g))
            slope = TWO * ROOT * (ONE + THREE * CUBIC * g * g)
            put(product, i, g * s * u)
            put(d_gate, i, d * u * s * (ONE + g * (ONE - s) * slope))
            put(d_up, i, d * g * s)
        block = take(a)


GATES = {"silu": (_silu, _silu_backward), "gelu_tanh": (_gelu, _gelu_backward)}
"""gelu(x) with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), for tanh(z) = 2 sigmoid(2 z) - 1."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up, all of one dtype and contiguous."""
    out = torch.empty_like(up)
    blocks = _blocks(n := up.numel())
    GATES[activation][0](up.dtype, blocks, gate, up, out, n, -(-n // blocks))
    return out


def gated_backward(d_product: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return act(gate) * up, written over *d_product*, and the gradients of gate and up, all of one dtype and contiguous."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    blocks = _blocks(n := up.numel())
    GATES[activation][1](up.dtype, blocks, d_product, gate, up, d_gate, d_up, n, -(-n // blocks))
    return d_product, d_gate, d_up


@Loop
def _rms_norm(a: Any) -> None:
    at = numbers(a)
    x, scale, y, inverse = floats(at[2]), floats(at[3]), elements(a, at[4]), floats(at[5])
    rows, d, size, eps = at[6], at[7], at[8], real(at[9])
    block = take(a)
    while block < at[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            start, total = row * d, ZERO
            for i in range(d):
                total += x[start + i] * x[start + i]
            factor = ONE / np.sqrt(total / np.float32(d) + eps)
            inverse[row] = factor
            for i in range(d):
                put(y, start + i, x[start + i] * factor * scale[i])
        block = take(a)


@Loop
def _rms_norm_backward(a: Any) -> None:
    at = numbers(a)
    dy, y, inverse, scale, dx = elements(a, at[2]), elements(a, at[3]), floats(at[4]), floats(at[5]), floats(at[6])
    rows, d, size = at[7], at[8], at[9]
    block = take(a)
    while block < at[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            start, total = row * d, ZERO
            for i in range(d):
                total += get(dy, start + i) * get(y, start + i)
            mean = total / np.float32(d)
            for i in range(d):
                dx[start + i] = inverse[row] * (get(dy, start + i) * scale[i] - get(y, start + i) / scale[i] * mean)
        block = take(a)


def rms_norm(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y (..., d) of *dtype* and the inverse of rms(x), (..., 1) float32, for x float32 and contiguous."""
    y, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1)
    rows, d = inverse.numel(), x.shape[-1]
    _rms_norm(dtype, -(-rows // (size := _rows(rows, d))), x, scale, y, inverse, rows, d, size, float(eps))
    return y, inverse


def rms_norm_backward(dy: Tensor, y: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """Return dx, float32, for dy and y of one dtype; all contiguous."""
    dx = torch.empty_like(dy, dtype=torch.float32)
    rows, d = inverse.numel(), dy.shape[-1]
    _rms_norm_backward(y.dtype, -(-rows // (size := _rows(rows, d))), dy, y, inverse, scale, dx, rows, d, size)
    return dx


@Loop
def _rotated(a: Any) -> None:
    at = numbers(a)
    x, cos, sin, out = elements(a, at[2]), floats(at[3]), floats(at[4]), elements(a, at[5])
    tokens, heads, width, turning = at[6], at[7], at[8], at[9]
    x_batch, x_head, x_token = at[10], at[11], at[12]
    out_batch, out_head, out_token = at[13], at[14], at[15]
    turn_batch, sign = at[16], at[17]
    half = turning // 2
    first, second = (half, 0) if sign < 0 else (0, half)  # turning back is the transposed of turning
    direction = np.float32(sign)
    block = take(a)
    while block < at[1]:
        batch, head = block // heads, block % heads
        for token in range(tokens):
            here, to = (
                batch * x_batch + head * x_head + token * x_token,
                batch * out_batch + head * out_head + token * out_token,
            )
            turn = batch * turn_batch + token * turning
            for i in range(half):
                p, q = get(x, here + i), get(x, here + half + i)
                put(out, to + i, p * cos[turn + i] - direction * q * sin[turn + first + i])
                put(out, to + half + i, q * cos[turn + half + i] + direction * p * sin[turn + second + i])
            for i in range(turning, width):
                put(out, to + i, get(x, here + i))
        block = take(a)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: int) -> Tensor:
    """Write x (B, H, T, d) turned, or turned back where *sign* is -1, to *out*, of one dtype with d contiguous; return it.

    cos, sin: (B or 1, 1, T, w) float32, contiguous, w at most d.
    """
    batch, heads, tokens, width = x.shape
    turning = cos.shape[-1]
    per_batch = tokens * turning if len(cos) > 1 else 0
    strides = (*x.stride()[:3], *out.stride()[:3], per_batch)
    _rotated(x.dtype, batch * heads, x, cos, sin, out, tokens, heads, width, turning, *strides, sign)
    return out


@Loop
def _softmax_backward(a: Any) -> None:
    at = numbers(a)
    scores, dp, p = floats(at[2]), elements(a, at[3]), elements(a, at[4])
    rows, width, first, queries, size, scale = at[5], at[6], at[7], at[8], at[9], real(at[10])
    block = take(a)
    while block < at[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            start, seen = row * width, first + row % queries + 1
            order = to_order(scores[start] * scale)
            for i in range(start + 1, start + seen):
                order = max(order, to_order(scores[i] * scale))
            highest, total, mean = from_order(order), ZERO, ZERO
            for i in range(start, start + seen):  # (one array to a loop that writes over it: others might be the same)
                scores[i] = exp(scores[i] * scale - highest)
            for i in range(start, start + seen):
                total += scores[i]
                mean += scores[i] * get(dp, i)
            factor = ONE / total
            mean *= factor
            for i in range(start, start + seen):
                put(dp, i, scale * factor * scores[i] * (get(dp, i) - mean))
            for i in range(start, start + seen):
                put(p, i, scores[i] * factor)
            for i in range(start + seen, start + width):
                put(p, i, ZERO)
                put(dp, i, ZERO)
        block = take(a)


def softmax_backward(scores: Tensor, dp: Tensor, first: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return p = softmax(scale * scores), of the dtype of dp, and scale * p * (dp - sum of p * dp); writes over what is given.

    scores: (pairs, share * queries, first + queries) float32; dp: the same of any dtype. The queries are those from *first* on,
    and each sees the keys up to its own.
    """
    p = scores if dp.dtype == torch.float32 else torch.empty_like(dp)
    rows, width = scores.shape[0] * scores.shape[1], scores.shape[2]
    blocks = -(-rows // (size := _rows(rows, width)))
    _softmax_backward(dp.dtype, blocks, scores, dp, p, rows, width, first, width - first, size, float(scale))
    return p, dp


@njit(error_model="numpy", fastmath=False)  # by itself: large numbers that are close, from which nothing may be taken before
def _minus(x: Any, y: Any) -> Any:
    return x - y


@Loop
def _cross_entropies(a: Any) -> None:
    at = numbers(a)
    logits, targets, nats, room = elements(a, at[2]), integers(at[3]), floats(at[4]), at[5]
    rows, width, size, into_logits, factor = at[6], at[7], at[8], at[9], real(at[10])
    block = take(a)
    powers = floats(room + 4 * width * block)  # each thread has room of its own, that of the first block it takes
    while block < at[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            start = row * width
            order = to_order(get(logits, start))
            for i in range(start + 1, start + width):
                order = max(order, to_order(get(logits, i)))
            highest, total, own = from_order(order), ZERO, get(logits, start + targets[row])
            for i in range(width):
                powers[i] = exp(get(logits, start + i) - highest)
            for i in range(width):
                total += powers[i]
            nats[row] = np.log(total) + _minus(highest, own)
            if into_logits != 0:
                share = factor / total
                for i in range(width):
                    put(logits, start + i, powers[i] * share)
                put(logits, start + targets[row], powers[targets[row]] * share - factor)
        block = take(a)


def cross_entropies(
    logits: Tensor, targets: Tensor, gradient: Tensor | None = None, factor: Tensor | None = None
) -> Tensor | None:
    """Return the cross-entropies (n,) float32, and write their gradients times *factor* to *gradient*; None: not for this.

    logits: (m, V), targets: (n,) int64, with n at most m; *gradient* (m, V) may be *logits*, and is 0 from row n on. What it
    takes is contiguous, on the CPU, and of a dtype in DTYPES. Raises IndexError for a target that is none of V.
    """
    floating = [logits] if gradient is None else [logits, gradient]
    if any(part.dtype != logits.dtype or part.dtype not in DTYPES for part in floating) or targets.dtype != torch.int64:
        return None
    if any(part.device.type != "cpu" or not part.is_contiguous() for part in (*floating, targets)):
        return None
    nats, width = torch.empty(len(targets), dtype=torch.float32), logits.shape[1]
    if gradient is not None and gradient.data_ptr() != logits.data_ptr():
        logits = gradient.copy_(logits)
    if len(targets):
        least, most = map(int, targets.aminmax())
        if least < 0 or most >= width:
            raise IndexError(f"targets must lie in 0 to {width - 1} (got {least} to {most})")
        rows, blocks = len(targets), min(len(targets), 4 * torch.get_num_threads())
        room = torch.empty(blocks, width, dtype=torch.float32)  # of which pages are only those that threads write to
        sizes = (rows, width, -(-rows // blocks), int(gradient is not None), 1.0 if factor is None else float(factor))
        _cross_entropies(logits.dtype, blocks, logits, targets, nats, room, *sizes)
    if gradient is not None:
        torch.autograd.graph.increment_version(gradient)  # for whoever has saved the logits, and must not use them any more
        gradient[len(targets) :] = 0
    return nats
