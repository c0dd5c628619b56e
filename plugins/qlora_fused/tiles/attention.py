"""Causal attention and its gradients in the CPU's units for tiles of bfloat16 (AMX). Imports numba.

softmax(scale * q k^T) v. Nothing is saved but a number for each query. Scores, probabilities and the gradients of both are
float32, rounded once for the products that they go into; gradients of keys and values are summed in float32 in a fixed order.
The loops are in `attention_forward` and `attention_backward`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from qlora_fused.jit import Loop, has_tiles
from qlora_fused.tiles.attention_backward import backward_loop, sum_loop
from qlora_fused.tiles.attention_forward import attend_loop
from qlora_fused.tiles.attention_products import CHUNK, LINE, SIDE
from qlora_fused.tiles.instructions import TILE

__all__ = ["attend", "attend_backward"]

PANELS, FEWER, LONG = 8, 4, 1024  # that share a pass over the gradients of keys and values; fewer where sequences are longer
PARTS = 6  # items at least for the backward pass, if long enough: none waits long for another (their number changes sums)
LOG2_E = math.log2(math.e)


def _applies(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    (batch, heads, length, width), shared = q.shape, k.shape[1]
    shaped = k.shape == v.shape == (batch, shared, length, width) and q.numel() > 0 and shared > 0 and heads % shared == 0
    kinds = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1 for x in (q, k, v))
    return (
        shaped and kinds and length % SIDE == 0 and width % SIDE == 0 and width <= 256 and 0 < scale < math.inf and has_tiles()
    )


def _run(loop: Loop, items: int, regions: tuple[int, ...], sizes: tuple[Any, ...], xs: tuple[Tensor, ...]) -> None:
    """Run a loop with the tensors *xs* (B, H, T, d), and with room for each thread, of *regions* of so many bytes."""
    *offsets, size = itertools.accumulate(regions, initial=0)
    room = torch.empty(min(items, torch.get_num_threads()), size, dtype=torch.uint8)
    tensors = [number for x in xs for number in (x.data_ptr(), *(2 * stride for stride in x.stride()[:3]))]
    loop(torch.bfloat16, items, *sizes, torch.zeros(1, dtype=torch.int64), room, size, *offsets, *tensors)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return softmax(scale * q k^T) v with a causal mask, (B, T, H, d), and what the backward pass needs; None: not for this.

    q: (B, H, T, d), k and v: (B, K, T, d), bfloat16, H a multiple of K, T and d of 32. What the backward pass needs is the
    logarithm to base 2 of each query's sum of exp(scale * q k^T), (B, H, T) float32.
    """
    if not _applies(q, k, v, scale):
        return None
    (batch, heads, length, width), shared = q.shape, k.shape[1]
    out, lse = q.new_empty(batch, length, heads, width), q.new_empty(batch, heads, length, dtype=torch.float32)
    parts = _parts(batch * shared, length, 16 * torch.get_num_threads())
    regions = (2 * length * width, LINE * CHUNK, 64 * width, LINE * width, LINE + 2 * TILE, 0, 0, 0, 0)
    sizes = (heads, shared, length, width, parts, scale * LOG2_E, lse, float(scale), 0, 0, 0)
    _run(attend_loop, batch * shared * parts, regions, sizes, (q, k, v, out.transpose(1, 2)))
    return out, lse


def _parts(pairs: int, length: int, items: int) -> int:
    """Return in how many parts the queries of each of *pairs* are done, for as many *items*."""
    return max(1, min(-(-items // pairs), length // (8 * SIDE)))


def _at_once(share: int, length: int) -> tuple[int, int]:
    """Return of how many heads that share keys, and how many queries, probabilities are kept until they are added up."""
    panels = PANELS if length <= LONG else FEWER
    together = max(n for n in range(1, panels + 1) if share % n == 0)
    return together, panels // together * SIDE


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of q, k and v, for that of the output, do (B, T, H, d); None: not for this.

    The others are what `attend` was given, and what it returned beside the output. Memory beside the gradients grows with T:
    for each thread 2 T d bytes and up to 1,280 T, and for sums of gradients of k and v 8 T d for each thread, or for each part
    of the work where B K is less than PARTS.
    """
    alike = do.dtype == q.dtype and do.shape == q.transpose(1, 2).shape and do.stride(-1) == 1
    if not alike or not _applies(q, k, v, scale):
        return None
    (batch, heads, length, width), shared = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    items = batch * shared * (parts := _parts(batch * shared, length, PARTS))
    together, rows = _at_once(heads // shared, length)
    panels, kept = together * rows // SIDE, 2 * length * width
    small = (LINE * width, LINE + 2 * TILE, 64 * CHUNK, 128 * panels * width)
    regions = (kept, 2 * LINE * length, 128 * width, *small, panels * LINE * length, 4 * kept if parts == 1 else 0)
    sums = torch.empty(items if parts > 1 else 0, kept, dtype=torch.float32)
    sizes = (heads, shared, length, width, parts, scale * LOG2_E, lse, float(scale), rows, together, sums)
    xs = (q, k, v, do.transpose(1, 2), dq, dk, dv)
    _run(backward_loop, items, regions, sizes, xs)
    if parts > 1:
        _run(sum_loop, batch * shared * length // SIDE, (0,) * len(regions), sizes, xs)
    return dq, dk, dv
