"""The computations between matrix products, each as one pass over bfloat16 memory with float32 arithmetic. Imports numba.

What they compute is written down, and computed with torch for other dtypes and devices, in the modules that call them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_fused.jit import (
    BLOCK,
    ONE,
    exp,
    floats,
    from_order,
    halves,
    loop,
    real,
    run,
    sigmoid,
    take,
    to_half,
    to_order,
    to_single,
)

__all__ = ["gated", "gated_backward", "probabilities", "rms_norm", "rms_norm_backward", "rotated"]

ZERO, HALF, TWO, THREE = (np.float32(number) for number in (0, 0.5, 2, 3))
CUBIC, ROOT = np.float32(0.044715), np.float32(0.7978845608)  # sqrt(2 / pi)
NOTHING = np.uint16(0)


def _blocks(elements: int) -> int:
    return max(1, elements // BLOCK)


def _rows(rows: int, width: int) -> int:
    """Return how many rows a block has."""
    return max(1, min(rows, BLOCK // width))


@loop
def _silu(a: Any) -> None:
    gate, up, out, n, size = halves(a[2]), halves(a[3]), halves(a[4]), a[5], a[6]
    block = take(a)
    while block < a[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g = to_single(gate[i])
            out[i] = to_half(g * sigmoid(g) * to_single(up[i]))
        block = take(a)


@loop
def _gelu(a: Any) -> None:
    gate, up, out, n, size = halves(a[2]), halves(a[3]), halves(a[4]), a[5], a[6]
    block = take(a)
    while block < a[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g = to_single(gate[i])
            out[i] = to_half(g * sigmoid(TWO * ROOT * (g + CUBIC * g * g * g)) * to_single(up[i]))
        block = take(a)


@loop
def _silu_backward(a: Any) -> None:
    d_out, gate, up, d_gate, d_up, n, size = halves(a[2]), halves(a[3]), halves(a[4]), halves(a[5]), halves(a[6]), a[7], a[8]
    block = take(a)
    while block < a[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g, d = to_single(gate[i]), to_single(d_out[i])
            s = sigmoid(g)
            d_gate[i] = to_half(d * to_single(up[i]) * s * (ONE + g * (ONE - s)))
            d_up[i] = to_half(d * g * s)
        block = take(a)


@loop
def _gelu_backward(a: Any) -> None:
    d_out, gate, up, d_gate, d_up, n, size = halves(a[2]), halves(a[3]), halves(a[4]), halves(a[5]), halves(a[6]), a[7], a[8]
    block = take(a)
    while block < a[1]:
        for i in range(block * size, min(n, (block + 1) * size)):
            g, d = to_single(gate[i]), to_single(d_out[i])
            s = sigmoid(TWO * ROOT * (g + CUBIC * g * g * g))
            slope = TWO * ROOT * (ONE + THREE * CUBIC * g * g)
            d_gate[i] = to_half(d * to_single(up[i]) * s * (ONE + g * (ONE - s) * slope))
            d_up[i] = to_half(d * g * s)
        block = take(a)


GATES = {"silu": (_silu, _silu_backward), "gelu_tanh": (_gelu, _gelu_backward)}
"""gelu(x) with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), for tanh(z) = 2 sigmoid(2 z) - 1."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up, all bfloat16 and contiguous."""
    out = torch.empty_like(up)
    blocks = _blocks(n := up.numel())
    run(GATES[activation][0], blocks, gate, up, out, n, -(-n // blocks))
    return out


def gated_backward(d_product: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, all bfloat16 and contiguous."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    blocks = _blocks(n := up.numel())
    run(GATES[activation][1], blocks, d_product, gate, up, d_gate, d_up, n, -(-n // blocks))
    return d_gate, d_up


@loop
def _rms_norm(a: Any) -> None:
    x, scale, y, inverse, rows, d, size, eps = (
        floats(a[2]),
        floats(a[3]),
        halves(a[4]),
        floats(a[5]),
        a[6],
        a[7],
        a[8],
        real(a[9]),
    )
    block = take(a)
    while block < a[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            at, total = row * d, ZERO
            for i in range(d):
                total += x[at + i] * x[at + i]
            factor = ONE / np.sqrt(total / np.float32(d) + eps)
            inverse[row] = factor
            for i in range(d):
                y[at + i] = to_half(x[at + i] * factor * scale[i])
        block = take(a)


@loop
def _rms_norm_backward(a: Any) -> None:
    dy, y, inverse, scale, dx, rows, d, size = (
        halves(a[2]),
        halves(a[3]),
        floats(a[4]),
        floats(a[5]),
        floats(a[6]),
        a[7],
        a[8],
        a[9],
    )
    block = take(a)
    while block < a[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            at, total = row * d, ZERO
            for i in range(d):
                total += to_single(dy[at + i]) * to_single(y[at + i])
            mean = total / np.float32(d)
            for i in range(d):
                dx[at + i] = inverse[row] * (to_single(dy[at + i]) * scale[i] - to_single(y[at + i]) / scale[i] * mean)
        block = take(a)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y (..., d) bfloat16 and the inverse of rms(x), (..., 1) float32, for x float32 and contiguous."""
    y, inverse = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(*x.shape[:-1], 1)
    rows, d = inverse.numel(), x.shape[-1]
    run(_rms_norm, -(-rows // (size := _rows(rows, d))), x, scale, y, inverse, rows, d, size, float(eps))
    return y, inverse


def rms_norm_backward(dy: Tensor, y: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """Return dx, float32, for dy and y bfloat16; all contiguous."""
    dx = torch.empty_like(dy, dtype=torch.float32)
    rows, d = inverse.numel(), dy.shape[-1]
    run(_rms_norm_backward, -(-rows // (size := _rows(rows, d))), dy, y, inverse, scale, dx, rows, d, size)
    return dx


@loop
def _rotated(a: Any) -> None:
    x, cos, sin, out, tokens, heads, width, turning = (
        halves(a[2]),
        floats(a[3]),
        floats(a[4]),
        halves(a[5]),
        a[6],
        a[7],
        a[8],
        a[9],
    )
    x_batch, x_head, x_token, out_batch, out_head, out_token, turn_batch, sign = (
        a[10],
        a[11],
        a[12],
        a[13],
        a[14],
        a[15],
        a[16],
        a[17],
    )
    half = turning // 2
    first, second = (half, 0) if sign < 0 else (0, half)  # turning back is the transposed of turning
    direction = np.float32(sign)
    block = take(a)
    while block < a[1]:
        batch, head = block // heads, block % heads
        for token in range(tokens):
            at, to = batch * x_batch + head * x_head + token * x_token, batch * out_batch + head * out_head + token * out_token
            turn = batch * turn_batch + token * turning
            for i in range(half):
                p, q = to_single(x[at + i]), to_single(x[at + half + i])
                out[to + i] = to_half(p * cos[turn + i] - direction * q * sin[turn + first + i])
                out[to + half + i] = to_half(q * cos[turn + half + i] + direction * p * sin[turn + second + i])
            for i in range(turning, width):
                out[to + i] = x[at + i]
        block = take(a)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: int) -> Tensor:
    """Write x (B, H, T, d) turned, or turned back where *sign* is -1, to *out*, both bfloat16 with d contiguous; return *out*.

    cos, sin: (B or 1, 1, T, w) float32, contiguous, w at most d.
    """
    batch, heads, tokens, width = x.shape
    turning = cos.shape[-1]
    per_batch = tokens * turning if len(cos) > 1 else 0
    run(
        _rotated,
        batch * heads,
        x,
        cos,
        sin,
        out,
        tokens,
        heads,
        width,
        turning,
        *x.stride()[:3],
        *out.stride()[:3],
        per_batch,
        sign,
    )
    return out


@loop
def _probabilities(a: Any) -> None:
    scores, p, rows, width, start, queries, size = floats(a[2]), halves(a[3]), a[4], a[5], a[6], a[7], a[8]
    block = take(a)
    while block < a[1]:
        for row in range(block * size, min(rows, (block + 1) * size)):
            at, seen = row * width, start + row % queries + 1
            order = to_order(scores[at])
            for i in range(1, seen):
                order = max(order, to_order(scores[at + i]))
            highest, total = from_order(order), ZERO
            for i in range(seen):
                e = exp(scores[at + i] - highest)
                scores[at + i] = e
                total += e
            factor = ONE / total
            for i in range(seen):
                p[at + i] = to_half(scores[at + i] * factor)
            for i in range(seen, width):
                p[at + i] = NOTHING
        block = take(a)


def probabilities(scores: Tensor, start: int, queries: int) -> Tensor:
    """Return the softmax, bfloat16, of *scores* (pairs, share * queries, width) float32, which is written over.

    The queries are those from *start* on, and each sees the keys up to its own.
    """
    p = torch.empty_like(scores, dtype=torch.bfloat16)
    rows, width = scores.shape[0] * scores.shape[1], scores.shape[2]
    run(_probabilities, -(-rows // (size := _rows(rows, width))), scores, p, rows, width, start, queries, size)
    return p
