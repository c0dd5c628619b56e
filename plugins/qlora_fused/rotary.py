"""Rotary position embeddings in float32, without the copies that concatenating halves makes.

A model's own forward is kept; only the function `apply_rotary_pos_emb` that it calls is another one, for that module alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_rotary_pos_emb", "fuse_rotary", "rotates_halves"]

NAME = "apply_rotary_pos_emb"


class Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin on the first values of each head, float32 inside, rounded once; saves cos and sin only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, loops: Any = None) -> Tensor:
        """x: (B, heads, T, d) or (B, T, heads, d); cos and sin: the same with one head, and d or fewer values."""
        by_heads = cos.shape[1:3] == (1, x.shape[2])
        if loops is not None and not (x.dtype in loops.DTYPES and x.stride(-1) == 1 and by_heads):
            loops = None
        ctx.loops = loops
        ctx.save_for_backward(cos, sin)  # as they came: all layers share them
        if loops is not None:
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
            return loops.rotated(x, cos, sin, torch.empty(x.shape, dtype=x.dtype), 1)  # type: ignore[no-any-return]
        half = cos.shape[-1] // 2
        return _turned(x, cos, sin[..., :half].neg(), sin[..., half:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Turn back, by the transposed of the same matrix."""
        cos, sin = ctx.saved_tensors
        if ctx.loops is not None and dy.stride(-1) == 1:
            # as the layer before gave it: heads beside each other
            dx = torch.empty_like(dy.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
            return ctx.loops.rotated(dy, cos, sin, dx, -1), None, None, None
        half = cos.shape[-1] // 2
        return _turned(dy, cos, sin[..., half:], sin[..., :half].neg()), None, None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return x * cos, plus the second half of x times *first* in the first half, and the first times *second* in the second."""
    width = cos.shape[-1]
    half, turning = width // 2, x[..., :width]
    out = turning * cos.float()  # float32, by promotion
    out[..., :half].addcmul_(turning[..., half:], first)
    out[..., half:].addcmul_(turning[..., :half], second)
    out = out.to(x.dtype)
    return out if width == x.shape[-1] else torch.cat([out, x[..., width:]], dim=-1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, loops: Any = None
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, with the signature of transformers' functions of this name."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin, loops), Rotary.apply(k, cos, sin, loops)  # type: ignore[no-untyped-call]


def rotates_halves(module: torch.nn.Module) -> bool:
    """Return whether the forward of *module* calls a function that computes what ours does."""
    forward = type(module).forward
    theirs = getattr(forward, "__globals__", {}).get(NAME)
    if NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()) or theirs is None:
        return False
    q, k = (torch.linspace(-2, 3, 24 * heads).sin_().view(1, heads, 3, 8) for heads in (2, 1))
    alike = []
    for width in (8, 4):  # some take cos and sin of a part of each head
        cos, sin = (torch.linspace(start, 3, 3 * width).sin_().view(1, 3, width) for start in (-2, -1))
        try:
            pairs = zip(theirs(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True)
            alike.append(all(torch.allclose(a, b, atol=1e-5) for a, b in pairs))
        except (TypeError, ValueError, RuntimeError):
            alike.append(width < 8)
    return all(alike)


def fuse_rotary(module: Any, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Let the forward of *module* call *function* where it called the library's."""
    theirs = type(module).forward
    seen = {**theirs.__globals__, NAME: function}
    ours = types.FunctionType(theirs.__code__, seen, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    module.forward = types.MethodType(ours, module)
