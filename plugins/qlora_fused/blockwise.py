"""Causal attention with a backward pass in blocks of query rows, by plain matrix products: for CPUs, and as exact as torch's.

The forward pass is torch's. Nothing is saved but what it was given: the backward pass makes probabilities again, for a block of
queries at a time and without the keys that come after it, so memory grows with the length, not with its square. Scores are
float32, and heads that share keys share the products. Registered in transformers as the attention `blockwise`; as
`blockwise_compiled` with a compiled loop for the gradient of the softmax; and as `blockwise_tiled` with both passes by
`tiles.attention`, which saves a number for each query, where that applies. What no way applies to goes to `sdpa`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_fused.cpu import has_amx

__all__ = ["BLOCKWISE", "COMPILED", "TILED", "attention"]

BLOCKWISE, COMPILED, TILED = "blockwise", "blockwise_compiled", "blockwise_tiled"
ROWS, ROWS_OF_AMX = 128, 256  # of queries in a block; measured: more are quicker where products are, and skip less


class Blockwise(torch.autograd.Function):
    """softmax(scale * q k^T) v with a causal mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, loops: Any = None, tiles: Any = None) -> Tensor:
        """q: (B, H, T, d), k: (B, K, T, d), v: (B, K, T, dv), H a multiple of K; return (B, T, H, dv)."""
        ctx.scale, ctx.loops = scale, loops if loops is not None and q.dtype in loops.DTYPES else None
        found = None if tiles is None else tiles.attend(q, k, v, scale)
        ctx.tiles = tiles
        if found is not None:
            out, sums = found
            ctx.save_for_backward(q, k, v, sums)
            return out  # type: ignore[no-any-return]
        ctx.save_for_backward(q, k, v)
        width, shared = max(q.shape[-1], v.shape[-1]), q.shape[1] != k.shape[1]
        # of one width: otherwise torch keeps all probabilities
        even = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*even, is_causal=True, scale=scale, enable_gqa=shared)
        return out[..., : v.shape[-1]].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, *sums = ctx.saved_tensors
        found = ctx.tiles.attend_backward(do.to(q.dtype).contiguous(), q, k, v, ctx.scale, *sums) if sums else None
        if found is not None:
            return *found, None, None, None
        (batch, heads, length, width), shared = q.shape, k.shape[1]
        pairs, share = batch * shared, heads // shared
        q, k, v = q.reshape(pairs, share, length, width), k.reshape(pairs, length, width), v.reshape(pairs, length, -1)
        do = do.view(batch, length, shared, share, -1)
        keys, values = k.transpose(1, 2).float(), v.transpose(1, 2)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        rows = ROWS_OF_AMX if q.dtype == torch.bfloat16 and has_amx() else ROWS
        for start in range(0, length, rows):
            end = min(start + rows, length)
            queries = q[:, :, start:end].flatten(1, 2)
            doi = do[:, start:end].permute(0, 2, 3, 1, 4).reshape(pairs, share * (end - start), -1)
            dp = _products(doi, values[:, :, :end])
            p, ds = _softmax_backward(_scores(queries, keys[:, :, :end]), dp, start, ctx.scale, ctx.loops)
            dv[:, :end] += _products(p.transpose(1, 2), doi)
            dq[:, :, start:end] = _products(ds, k[:, :end]).view(pairs, share, end - start, width)
            dk[:, :end] += _products(ds.transpose(1, 2), queries)
        dk, dv = (grad.to(q.dtype).view(batch, shared, length, -1) for grad in (dk, dv))
        return dq.view(batch, -1, length, width), dk, dv, None, None, None


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products of pairs, a (pairs, m, k) with b (pairs, k, n)."""
    if len(a) % 2 == 0 or a.dtype != torch.float32:
        return torch.bmm(a, b)
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    # bmm gives a thread of float32 whole pairs: 2 threads take as long for 3 as for 4
    for one, other, product in zip(a, b, out, strict=True):
        torch.mm(one, other, out=product)
    return out


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return q k^T (pairs, rows, n) float32 of *queries* (pairs, rows, d) with *keys* (pairs, d, n) float32."""
    with torch.autocast(queries.device.type, enabled=False):  # the backward pass may be called in autocast
        if queries.dtype != torch.bfloat16:
            return _products(queries.float(), keys)
        # products of bfloat16 come out rounded to it, which is too coarse for an exponent
        with _units_of_bfloat16():
            return torch.bmm(queries.float(), keys)


@contextlib.contextmanager
def _units_of_bfloat16() -> Iterator[None]:
    """Let products of float32 be made by the units for bfloat16: of numbers that are bfloat16 they are the same, and sooner.

    That holds for the whole process, so that no other thread may multiply float32 meanwhile.
    """
    everywhere, products = torch.backends.mkldnn, torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = "none" if before == everywhere.fp32_precision else before  # none: what holds everywhere


def _softmax_backward(scores: Tensor, dp: Tensor, start: int, scale: float, loops: Any) -> tuple[Tensor, Tensor]:
    """Return the probabilities p and the gradients of the scores, scale * p * (dp - sum of p * dp), of the dtype of *dp*.

    scores, not yet scaled, and dp: (pairs, share * rows, end) of the queries from *start* on, which may be written over.
    """
    if loops is not None:
        return loops.softmax_backward(scores, dp, start, scale)  # type: ignore[no-any-return]
    rows = scores.shape[-1] - start
    later = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
    scores.mul_(scale).view(len(scores), -1, rows, scores.shape[-1])[..., start:].masked_fill_(later, -torch.inf)
    p = torch.softmax(scores, -1)
    return p.to(dp.dtype), torch._softmax_backward_data(dp.float(), p, -1, p.dtype).mul_(scale).to(dp.dtype)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    loops: Any = None,
    tiles: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the output (B, T, H, dv) of attention; query (B, H, T, d), key (B, K, T, d) and value (B, K, T, dv)."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    square = query.shape[2] == key.shape[2] > 1
    plain = attention_mask is None and kwargs.get("position_bias") is None and not kwargs.get("dropout")
    if not (causal and square and plain and query.device.type == "cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    scale = kwargs.get("scaling")
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):  # which would round the scores
        return Blockwise.apply(query, key, value, scale, loops, tiles), None  # type: ignore[no-untyped-call]
