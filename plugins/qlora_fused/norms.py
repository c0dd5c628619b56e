"""Norms with float32 arithmetic and an output in the dtype of the products, so that no cast stands between norm and layer.

RMSNorms are known by what they compute, whatever their class: x / rms(x) times weight (Llama's), or times 1 + weight (Gemma's).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["fuse_layer_norm", "fuse_rms_norm", "rms_norm_of"]


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * scale, float32 inside.

    Saves y, which the next layer saves anyway, and one number per row, but not x, the float32 residual: x / rms(x) = y / scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, loops: Any = None) -> Tensor:
        """x: (..., d), scale: (d,) float32, nowhere 0; return (..., d) in *dtype*."""
        if loops is not None and dtype not in loops.DTYPES:
            loops = None
        if loops is not None:
            y, inverse = loops.rms_norm(x.float().contiguous(), scale, eps, dtype)
        else:
            wide = x.float()
            inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y = (wide * inverse).mul_(scale).to(dtype)
        ctx.dtype, ctx.loops = x.dtype, loops
        ctx.save_for_backward(y, inverse, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = inverse * (dy * scale - y / scale * mean(dy * y))."""
        y, inverse, scale = ctx.saved_tensors
        if ctx.loops is not None:
            dx = ctx.loops.rms_norm_backward(dy.contiguous(), y, inverse, scale)
            return dx.to(ctx.dtype), None, None, None, None
        wide = dy.float()
        mean = (wide * y).mean(-1, keepdim=True)
        dx = (wide * scale).sub_((y * scale.reciprocal()).mul_(mean)).mul_(inverse)
        return dx.to(ctx.dtype), None, None, None, None


def rms_norm_of(module: torch.nn.Module) -> tuple[float, int] | None:
    """Return eps, and 1 if the scale is 1 + weight else 0, where *module* is an RMSNorm over its last dimension, or None."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.ndim != 1 or weight.requires_grad or not isinstance(eps, float):
        return None
    x = torch.linspace(-3, 2, 4 * weight.numel(), device=weight.device).view(4, -1).sin_()
    try:
        with torch.no_grad():
            y = module(x).float()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    for plus in (0, 1):
        wanted = F.rms_norm(x, weight.shape, weight.float() + plus, eps)
        if not bool((weight + plus == 0).any()) and torch.allclose(y, wanted, rtol=1e-2, atol=1e-3):
            return eps, plus
    return None


def fuse_rms_norm(module: Any, eps: float, plus: int, dtype_of: Callable[[Tensor], torch.dtype], loops: Any = None) -> None:
    """Let *module* compute as RMSNorm does; `dtype_of(x)` is the dtype of its output."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scale = self.weight.detach().float()
        scale = scale + plus if plus else scale
        return RMSNorm.apply(x, scale, eps, dtype_of(x), loops)  # type: ignore[no-any-return,no-untyped-call]

    module.forward = types.MethodType(forward, module)


def fuse_layer_norm(module: torch.nn.LayerNorm, dtype_of: Callable[[Tensor], torch.dtype]) -> None:
    """Let *module* compute in float32, and return the dtype of the products."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight, bias = (None if part is None else part.float() for part in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(dtype_of(x))

    module.forward = types.MethodType(forward, module)
