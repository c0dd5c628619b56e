"""Gated MLPs, down(act(gate(x)) * up(x)), as one function that saves x, gate(x) and up(x), and makes the product again.

Known by what they compute, whatever their class: Llama's, Qwen's, Mistral's, Gemma's and others.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_fused.lora import (
    CHANGED,
    Member,
    compute_dtype,
    forward,
    infer,
    into_ab,
    into_h,
    into_x,
    matrices,
    members_of,
    output_dtype,
    tiled,
)

__all__ = ["ACTIVATIONS", "activation_of", "fuse_mlp"]

ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = {
    "silu": (torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input, {}),
    "gelu": (torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input, {"approximate": "none"}),
    "gelu_tanh": (torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input, {"approximate": "tanh"}),
}
"""Each with its gradient and the arguments of both: `act(x, out=)`, `gradient(grad of the output, x, grad_input=)`."""
WORKED_ON = 2**18  # elements that are float32 at a time: they stay in the cache, and need no new pages each time


def _pieces(like: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield slices of the rows of *like* (rows, d), each with three float32 buffers of its size."""
    size = max(1, WORKED_ON // like.shape[1]) if like.device.type == "cpu" else len(like)
    buffers = [torch.empty(min(size, len(like)), like.shape[1], device=like.device) for _ in range(3)]
    for start in range(0, len(like), size):
        here = slice(start, min(start + size, len(like)))
        yield here, [buffer[: here.stop - start] for buffer in buffers]


def gated(gate: Tensor, up: Tensor, activation: str, loops: Any = None) -> Tensor:
    """Return act(gate) * up, (rows, d), rounded once; in one pass where there are *loops* for it."""
    if loops is not None and activation in loops.GATES and gate.dtype in loops.DTYPES:
        return loops.gated(gate, up, activation)  # type: ignore[no-any-return]
    act, _, arguments = ACTIVATIONS[activation]
    product = torch.empty_like(up)
    for here, (x, y, _) in _pieces(gate):
        act(x.copy_(gate[here]), **arguments, out=y)
        product[here] = y.mul_(up[here])
    return product


def gated_backward(
    d_product: Tensor, gate: Tensor, up: Tensor, activation: str, loops: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return act(gate) * up, written over *d_product*, and the gradients of gate and up, (rows, d), each rounded once."""
    if loops is not None and activation in loops.GATES and gate.dtype in loops.DTYPES:
        return loops.gated_backward(d_product, gate, up, activation)  # type: ignore[no-any-return]
    act, gradient, arguments = ACTIVATIONS[activation]
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    for here, (x, y, z) in _pieces(gate):
        act(x.copy_(gate[here]), **arguments, out=y)
        d_up[here] = z.copy_(d_product[here]).mul_(y)
        z.copy_(up[here]).mul_(d_product[here])
        d_product[here] = y.mul_(up[here])
        d_gate[here] = gradient(z, x, **arguments, grad_input=y)
    return d_product, d_gate, d_up


class FusedMLP(torch.autograd.Function):
    """`apply(x, members, activation, loops, *A, *B)` of gate, up and down, in this order. x: (..., in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: Sequence[Member], activation: str, loops: Any, *ab: Tensor) -> Tensor:
        """Compute y (..., in)."""
        flat = x.reshape(-1, x.shape[-1])
        ctx.members, ctx.activation, ctx.loops, ctx.tiled = members, activation, loops, False
        if (adapters := _tiled(flat, members, activation, ab)) is not None:
            y, kept = members[0].tiles.mlp(flat, *adapters, activation)
            ctx.tiled = True
            ctx.save_for_backward(flat, *kept, *ab)
            return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]
        wide, narrow = _split(ab)
        (gate, up), h = forward(flat, members[:2], *matrices(wide, members[:2], x.dtype))
        (y,), h_down = forward(gated(gate, up, activation, loops), members[2:], *matrices(narrow, members[2:], x.dtype))
        ctx.save_for_backward(flat, gate, up, h, h_down, *ab)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, of all A and of all B."""
        x, gate, up, h, h_down, *ab = ctx.saved_tensors
        flat = [dy.reshape(-1, dy.shape[-1])]
        if ctx.tiled:
            adapters = _tiled(x, ctx.members, ctx.activation, ab)
            if adapters is None:
                raise RuntimeError(CHANGED)
            tiles, kept = ctx.members[0].tiles, (gate, up, h, h_down)
            found = tiles.mlp_backward(flat[0], x, kept, *adapters, ctx.activation, into_x=ctx.needs_input_grad[0])
            dx, (da, da_up, db, db_up), (da_down, db_down) = found
            dx = None if dx is None else dx.view(*dy.shape[:-1], -1)
            return dx, None, None, None, da, da_up, da_down, db, db_up, db_down
        wide, narrow = _split(ab)
        members, down = ctx.members[:2], ctx.members[2:]
        a, b = matrices(narrow, down, x.dtype)
        dh = into_h(flat, b)
        product, *both = gated_backward(into_x(flat, dh, down, a), gate, up, ctx.activation, ctx.loops)
        da_down, db_down = into_ab(flat, dh, product, h_down, down, b)
        del product
        a, b = matrices(wide, members, x.dtype)
        dh = into_h(both, b)
        da, da_up, db, db_up = into_ab(both, dh, x, h, members, b)
        dx = into_x(both, dh, members, a).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, da, da_up, da_down, db, db_up, db_down


def _tiled(x: Tensor, members: Sequence[Member], activation: str, ab: Sequence[Tensor]) -> Any:
    """Return the Adapters of gate and up, and of down, where products by tiles are to be had for x (rows, in), else None."""
    if members[0].loops is None or activation not in members[0].loops.GATES:
        return None
    wide, narrow = _split(ab)
    found = tiled(x, members[:2], wide), tiled(x, members[2:], narrow)
    return None if found[0] is None or found[1] is None else found


def _infer(x: Tensor, members: Sequence[Member], activation: str, loops: Any, ab: Sequence[Tensor]) -> Tensor:
    wide, narrow = _split(ab)
    flat = x.reshape(-1, x.shape[-1])
    few = loops is not None and len(flat) <= loops.ROWS  # of which weights stay packed
    if not few and (adapters := _tiled(flat, members, activation, ab)) is not None:
        y, _ = members[0].tiles.mlp(flat, *adapters, activation)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]
    gate, up = infer(flat, members[:2], wide)
    (y,) = infer(gated(gate, up, activation, loops), members[2:], narrow)
    return y.view(*x.shape[:-1], y.shape[-1])


def _split(ab: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the A and B of gate and up, and those of down."""
    return [*ab[:2], *ab[3:5]], [ab[2], ab[5]]


def activation_of(module: torch.nn.Module) -> str | None:
    """Return which of ACTIVATIONS *module* computes, or None."""
    x = torch.linspace(-6, 6, 193, dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
    for name, (act, _, arguments) in ACTIVATIONS.items():
        if torch.allclose(act(x, **arguments, out=torch.empty_like(x)), y, rtol=1e-9, atol=1e-12):
            return name
    return None


def fuse_mlp(module: Any, activation: str, loops: Any = None, tiles: Any = None) -> None:
    """Let *module*, with `fusible` gate_proj, up_proj and down_proj, compute as one function where no dropout forbids it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        # hooks: with them PEFT tells each layer which adapter a row of the batch is for
        hooked = any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
        found = None if hooked else members_of(layers, loops, tiles)
        if found is None or any(member.dropout for member in found[0]):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        dtype = compute_dtype(x, self.gate_proj)
        if dtype != output_dtype(x):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        members, ab = found
        with torch.autocast(x.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return _infer(x.to(dtype), members, activation, loops, ab)
            return FusedMLP.apply(x.to(dtype), members, activation, loops, *ab)  # type: ignore[no-any-return,no-untyped-call]

    module.forward = types.MethodType(forward, module)
