"""The arithmetic of gated MLPs, act(gate) * up and its gradients, for 32 numbers at a time in compiled loops. Imports numba.

With z = g (c0 + c1 g^2) both activations are g sigmoid(z): SiLU with c0 = 1 and c1 = 0, GELU by tanh, for
tanh(y) = 2 sigmoid(2 y) - 1, with c0 = 2 sqrt(2 / pi) and c1 = 0.044715 c0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from qlora_fused.jit import INLINE
from qlora_fused.tiles.lanes import difference, fused, lanes, power, product, quotient, smaller, spread, total, wide, write

__all__ = ["CONSTANTS", "gate", "gate_backward"]

TANH = 2 * math.sqrt(2 / math.pi)
CONSTANTS = {"silu": (1.0, 0.0), "gelu_tanh": (TANH, 0.044715 * TANH)}
ONE, THREE, MOST, MINUS_LOG2_E = (np.float32(number) for number in (1, 3, 1e30, -math.log2(math.e)))


@njit(**INLINE)
def _square(g: Any) -> Any:
    return smaller(product(g, g), spread(MOST))  # infinity times c1 = 0 would be no number


@njit(**INLINE)
def _sigmoid(g: Any, square: Any, c0: Any, c1: Any) -> Any:
    z = product(g, fused(square, spread(c1), spread(c0)))
    return quotient(spread(ONE), total(spread(ONE), power(product(z, spread(MINUS_LOG2_E)))))


@njit(**INLINE)
def _act(g: Any, u: Any, c0: Any, c1: Any) -> Any:
    return product(product(g, _sigmoid(g, _square(g), c0, c1)), u)


@njit(error_model="numpy")
def gate(g: Any, u: Any, out: Any, c0: Any, c1: Any) -> None:
    """Write act(g) * u of 32 numbers; addresses: *g* and *u* float32, *out* bfloat16."""
    low = _act(lanes(g), lanes(u), c0, c1)
    write(out, low, _act(lanes(g + 64), lanes(u + 64), c0, c1))


@njit(**INLINE)
def _gradients(d: Any, g: Any, u: Any, c0: Any, c1: Any) -> Any:
    """Return act(g) * u and the gradients of g and u."""
    square, one = _square(g), spread(ONE)
    s = _sigmoid(g, square, c0, c1)
    slope = fused(square, spread(THREE * c1), spread(c0))
    act = product(g, s)
    bent = fused(product(act, difference(one, s)), slope, s)  # s (1 + g (1 - s) dz/dg)
    return product(act, u), product(product(d, u), bent), product(d, act)


@njit(error_model="numpy")
def gate_backward(d: Any, g: Any, u: Any, out: Any, d_g: Any, d_u: Any, c0: Any, c1: Any) -> None:
    """Write act(g) * u and the gradients of both, 32 numbers of each; addresses: *d* float32, the others bfloat16."""
    low, low_g, low_u = _gradients(lanes(d), wide(g), wide(u), c0, c1)
    high, high_g, high_u = _gradients(lanes(d + 64), wide(g + 32), wide(u + 32), c0, c1)
    write(out, low, high)
    write(d_g, low_g, high_g)
    write(d_u, low_u, high_u)
