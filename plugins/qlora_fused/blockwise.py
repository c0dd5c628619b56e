"""Causal attention in blocks of query rows, by plain matrix products: for CPUs, and exact to the rounding of torch's.

Blocks above the diagonal are skipped; the scores of a block are float32, and heads that share keys share the products. Of the
probabilities only the logarithms of their sums are saved, one for a query (Dao, FlashAttention-2, section 3.1): memory grows
with the length, not with its square. Registered in transformers as the attention `blockwise`, and as `blockwise_compiled` with
compiled loops for the softmax; what it does not apply to goes to `sdpa`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["BLOCKWISE", "COMPILED", "attention"]

BLOCKWISE, COMPILED = "blockwise", "blockwise_compiled"
ROWS = 128  # of queries in a block; measured


class Blockwise(torch.autograd.Function):
    """softmax(scale * q k^T) v with a causal mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, loops: Any = None) -> Tensor:
        """q: (B, H, T, d), k: (B, K, T, d), v: (B, K, T, dv), H a multiple of K; return (B, T, H, dv)."""
        batch, heads, length, width = q.shape
        shared = k.shape[1]
        pairs, share = batch * shared, heads // shared
        q, k, v = q.reshape(pairs, share, length, width), k.reshape(pairs, length, width), v.reshape(pairs, length, -1)
        loops = loops if loops is not None and q.dtype in loops.DTYPES else None
        keys = k.transpose(1, 2).float()
        out = q.new_empty(batch, length, shared, share, v.shape[-1])
        sums = torch.empty(pairs, share, length)
        for start, end in _blocks(length):
            p, part = _softmax(_scores(q[:, :, start:end], keys[:, :, :end], scale), start, end, q.dtype, loops)
            o = _products(p, v[:, :end])
            out[:, start:end] = o.view(batch, shared, share, end - start, -1).permute(0, 3, 1, 2, 4)
            sums[:, :, start:end] = part.view(pairs, share, end - start)
        ctx.save_for_backward(q, k, v, sums)
        ctx.scale, ctx.loops, ctx.shape = scale, loops, (batch, shared)
        return out.flatten(2, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, sums = ctx.saved_tensors
        batch, shared = ctx.shape
        pairs, share, length, width = q.shape
        keys, values = k.transpose(1, 2).float(), v.transpose(1, 2)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        do = do.view(batch, length, shared, share, -1)
        for start, end in _blocks(length):
            queries = q[:, :, start:end].flatten(1, 2)
            doi = do[:, start:end].permute(0, 2, 3, 1, 4).reshape(pairs, share * (end - start), -1)
            scores = _scores(q[:, :, start:end], keys[:, :, :end], ctx.scale)
            dp = _products(doi, values[:, :, :end])
            p, ds = _softmax_backward(scores, dp, sums[:, :, start:end].flatten(1), start, end, ctx.loops)
            dv[:, :end] += _products(p.transpose(1, 2), doi)
            dq[:, :, start:end] = _products(ds, k[:, :end]).mul_(ctx.scale).view(pairs, share, end - start, width)
            dk[:, :end] += _products(ds.transpose(1, 2), queries)
        dk, dv = (grad.to(q.dtype).view(batch, shared, length, -1) for grad in (dk.mul_(ctx.scale), dv))
        return dq.view(batch, -1, length, width), dk, dv, None, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the first of each block of queries, and the one after the last."""
    return ((start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products of pairs, a (pairs, m, k) with b (pairs, k, n)."""
    if len(a) % 2 == 0 or a.dtype != torch.float32:
        return torch.bmm(a, b)
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    # bmm gives a thread of float32 whole pairs: 2 threads take as long for 3 as for 4
    for one, other, product in zip(a, b, out, strict=True):
        torch.mm(one, other, out=product)
    return out


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the scores (pairs, share * rows, n) float32 of q (pairs, share, rows, d) with keys (pairs, d, n) float32."""
    # products of bfloat16 come out rounded to it, which is too coarse for an exponent
    with torch.autocast(q.device.type, enabled=False):  # where the backward pass is called in it
        return _products(q.flatten(1, 2).to(torch.float32, copy=True).mul_(scale), keys)


def _softmax(scores: Tensor, start: int, end: int, dtype: torch.dtype, loops: Any) -> tuple[Tensor, Tensor]:
    """Return the probabilities (pairs, share * rows, end), of *dtype*, and the logarithms of their sums, float32.

    *scores*, of the queries from *start* on, may be written over.
    """
    if loops is not None:
        return loops.softmax(scores, start, end - start, dtype)  # type: ignore[no-any-return]
    _hide_later(scores, start)
    return torch.softmax(scores, -1).to(dtype), scores.logsumexp(-1)


def _softmax_backward(scores: Tensor, dp: Tensor, sums: Tensor, start: int, end: int, loops: Any) -> tuple[Tensor, Tensor]:
    """Return the probabilities p and the gradients of the scores, p * (dp - sum of p * dp), of the dtype of *dp*.

    scores, dp: (pairs, share * rows, end), which may be written over; sums: (pairs, share * rows) float32.
    """
    if loops is not None:
        return loops.softmax_backward(scores, dp, sums, start, end - start)  # type: ignore[no-any-return]
    p = _hide_later(scores.sub_(sums[..., None]), start).exp_()
    return p.to(dp.dtype), torch._softmax_backward_data(dp.float(), p, -1, p.dtype).to(dp.dtype)


def _hide_later(scores: Tensor, start: int) -> Tensor:
    """Return *scores* where those of keys that come after their query are set to minus infinity."""
    rows = scores.shape[-1] - start
    later = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
    scores.view(len(scores), -1, rows, scores.shape[-1])[..., start:].masked_fill_(later, -torch.inf)
    return scores


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, loops: Any = None, **kwargs: Any
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
        return Blockwise.apply(query, key, value, scale, loops), None  # type: ignore[no-untyped-call]
