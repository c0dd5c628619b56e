"""Causal attention in blocks of query rows, by plain matrix products: on CPUs faster than torch's, and exact to its rounding.

Blocks above the diagonal are skipped; the scores of a block are float32, and heads that share keys share the products.
Registered in transformers as the attention `blockwise`, and as `blockwise_compiled` with compiled loops for the softmax; what
it does not apply to goes to `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["BLOCKWISE", "COMPILED", "attention"]

BLOCKWISE, COMPILED = "blockwise", "blockwise_compiled"
ROWS = 128  # of queries in a block; measured
SAVED = 2 * 2**20  # bytes of the probabilities of a layer up to which they are saved, not made again


class Blockwise(torch.autograd.Function):
    """softmax(scale * q k^T) v with a causal mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, loops: Any = None) -> Tensor:
        """q: (B, H, T, d), k: (B, K, T, d), v: (B, K, T, dv), H a multiple of K; return (B, T, H, dv)."""
        batch, heads, length, width = q.shape
        shared = k.shape[1]
        pairs, share = batch * shared, heads // shared
        q, k, v = q.reshape(pairs, share, length, width), k.reshape(pairs, length, width), v.reshape(pairs, length, -1)
        keys = k.transpose(1, 2).float()
        out = q.new_empty(batch, length, shared, share, v.shape[-1])
        kept: list[Tensor] = []
        keep = batch * heads * length * length // 2 * q.element_size() <= SAVED
        ctx.loops = loops if loops is not None and q.dtype in loops.DTYPES else None
        for start in range(0, length, ROWS):
            end = min(start + ROWS, length)
            p = _probabilities(q[:, :, start:end], keys, scale, start, ctx.loops)
            o = torch.bmm(p, v[:, :end])
            out[:, start:end] = o.view(batch, shared, share, end - start, -1).permute(0, 3, 1, 2, 4)
            if keep:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.shape = scale, (batch, shared)
        return out.flatten(2, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, *kept = ctx.saved_tensors
        batch, shared = ctx.shape
        pairs, share, length, width = q.shape
        keys = None if kept else k.transpose(1, 2).float()
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        do = do.view(batch, length, shared, share, -1)
        values = v.transpose(1, 2)
        for index, start in enumerate(range(0, length, ROWS)):
            end = min(start + ROWS, length)
            queries = q[:, :, start:end].reshape(pairs, -1, width)
            p = kept[index] if kept else _probabilities(q[:, :, start:end], keys, ctx.scale, start, ctx.loops)
            doi = do[:, start:end].permute(0, 2, 3, 1, 4).reshape(pairs, share * (end - start), -1)
            dv[:, :end] += torch.bmm(p.transpose(1, 2), doi)
            ds = torch._softmax_backward_data(torch.bmm(doi, values[:, :, :end]), p, -1, p.dtype)
            dq[:, :, start:end] = torch.bmm(ds, k[:, :end]).mul_(ctx.scale).view(pairs, share, end - start, width)
            dk[:, :end] += torch.bmm(ds.transpose(1, 2), queries)
        dk, dv = (grad.to(q.dtype).view(batch, shared, length, -1) for grad in (dk.mul_(ctx.scale), dv))
        return dq.view(batch, -1, length, width), dk, dv, None, None


def _probabilities(q: Tensor, keys: Tensor | None, scale: float, start: int, loops: Any) -> Tensor:
    """Return the softmax of the scores (pairs, share * rows, end) of the queries from *start* on, in the dtype of q."""
    assert keys is not None
    pairs, share, size, width = q.shape
    end = start + size
    # products of bfloat16 come out rounded to it, which is too coarse for an exponent
    with torch.autocast(q.device.type, enabled=False):  # where the backward pass is called in it
        scores = torch.bmm(q.reshape(pairs, -1, width).to(torch.float32, copy=True).mul_(scale), keys[:, :, :end])
    if loops is not None:
        return loops.probabilities(scores, start, size, q.dtype)  # type: ignore[no-any-return]
    scores.view(pairs, share, size, end)[..., start:].masked_fill_(
        torch.ones(size, size, dtype=torch.bool).triu_(1), -torch.inf
    )
    return torch.softmax(scores, -1).to(q.dtype)


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
