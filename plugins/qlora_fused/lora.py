"""LoRA on frozen linear layers as one autograd function: y_i = x Q(W_i)^T + b_i + s_i (x A_i^T) B_i^T, for layers that share x.

Q(W) is made from its packed form in the forward pass and again in the backward pass, and never saved. Products with A and B are
added into the large ones, and those of layers that share their input are made together.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor

__all__ = [
    "CHANGED",
    "Group",
    "Member",
    "compute_dtype",
    "forward",
    "fuse_group",
    "fusible",
    "infer",
    "into_ab",
    "into_h",
    "into_x",
    "matrices",
    "members_of",
    "output_dtype",
]


CHANGED = "weights were exchanged between the forward and the backward pass: their gradients can't be computed any more"


@dataclass(frozen=True)
class Member:
    """One frozen layer, with the scale of its adapter (alpha / r), the dropout of the adapter's input, and who computes.

    That are modules, or None: compiled loops, and products by tiles.
    """

    layer: torch.nn.Module
    scale: float
    dropout: float
    loops: Any = None
    tiles: Any = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return Q(W), (out_features, in_features), in *dtype*."""
        weight: Any = self.layer.weight
        if not isinstance(self.layer, Linear4bit):
            return weight.detach().to(dtype)  # type: ignore[no-any-return]
        found = self.loops.unpacked(self.layer) if self.loops is not None else None
        return (dequantize_4bit(weight.data, weight.quant_state) if found is None else found).to(dtype)  # type: ignore[no-any-return]

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x Q(W)^T + b to y (rows, out_features) in place, and return it; y comes small, so that rounding counts once."""
        if self.layer.bias is not None:
            y.add_(self.layer.bias.detach())  # type: ignore[operator]
        return y.addmm_(x, self.weight(x.dtype).t())


def matrices(ab: Sequence[Tensor], members: Sequence[Member], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return [A_1; A_2; ...] (sum of ranks, in) and all s_i B_i (out_i, r_i), in *dtype*, given all A and then all B."""
    a, b = ab[: len(members)], ab[len(members) :]
    return torch.cat(list(a)).to(dtype), [(part * member.scale).to(dtype) for part, member in zip(b, members, strict=True)]


def forward(
    x: Tensor, members: Sequence[Member], a: Tensor, b: Sequence[Tensor], seen: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return y_i (rows, out_i), and h = x [A_1; A_2; ...]^T (rows, sum of ranks), which the gradients need.

    x: (rows, in); *a* and *b* are as `matrices` returns them, of the dtype of the products. *seen* is x after dropout.
    """
    h = (x if seen is None else seen) @ a.t()
    parts = zip(members, h.split([part.shape[1] for part in b], dim=1), b, strict=True)
    # the small product first: added to the large one while that is still float32, and the sum is rounded once
    return [member.add_product(torch.mm(own, part.t()), x) for member, own, part in parts], h


def infer(x: Tensor, members: Sequence[Member], ab: Sequence[Tensor]) -> list[Tensor]:
    """Return y_i (rows, out_i) where nobody asks for gradients, given all A and then all B. x: (rows, in)."""
    loops = members[0].loops
    if loops is not None and all(isinstance(member.layer, Linear4bit) for member in members):
        ys = loops.gemv(x, [member.layer for member in members], ab, [member.scale for member in members])
        if ys is not None:  # few rows, and weights that stay packed
            return ys  # type: ignore[no-any-return]
    if (adapters := tiled(x, members, ab)) is not None:
        return members[0].tiles.linear(x, adapters)[0]  # type: ignore[no-any-return]
    return forward(x, members, *matrices(ab, members, x.dtype))[0]


def tiled(x: Tensor, members: Sequence[Member], ab: Sequence[Tensor]) -> Any:
    """Return the Adapters of *members* if products by tiles are to be had for x (rows, in), else None."""
    if members[0].tiles is None:
        return None
    return members[0].tiles.adapters_of(x, members, ab[: len(members)], ab[len(members) :])


def into_h(dys: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the gradient of h (rows, sum of ranks), given those of all y."""
    if len(b) == 1:
        return torch.mm(dys[0], b[0])
    dh = dys[0].new_empty(len(dys[0]), sum(part.shape[1] for part in b))
    for dy, part, into in zip(dys, b, dh.split([part.shape[1] for part in b], dim=1), strict=True):
        torch.mm(dy, part, out=into)
    return dh


def into_x(dys: Sequence[Tensor], dh: Tensor, members: Sequence[Member], a: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the gradient of x (rows, in); *kept* is the mask of dropout over 1 - p."""
    dx = torch.mm(dh, a)
    if kept is not None:
        dx.mul_(kept)
    for dy, member in zip(dys, members, strict=True):
        dx.addmm_(dy, member.weight(dx.dtype))
    return dx


def into_ab(
    dys: Sequence[Tensor], dh: Tensor, x: Tensor, h: Tensor, members: Sequence[Member], b: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients, float32, of all A and then of all B; with dropout x and h are those after it."""
    ranks = [part.shape[1] for part in b]
    da = torch.mm(dh.t(), x).float().split(ranks)
    db = [
        torch.mm(dy.t(), own).float().mul_(member.scale)
        for dy, own, member in zip(dys, h.split(ranks, 1), members, strict=True)
    ]
    return [*da, *db]


class FusedLinear(torch.autograd.Function):
    """The layers of a group; `apply(x, members, *A, *B)` returns one y for each. x: (..., in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: Sequence[Member], *ab: Tensor) -> tuple[Tensor, ...]:
        """Compute y; with dropout, which is drawn as PEFT draws it, there is one member."""
        flat = x.reshape(-1, x.shape[-1])
        kept = seen = None
        if members[0].dropout:
            kept = torch.empty_like(x).bernoulli_(1 - members[0].dropout).view_as(flat)
            seen = flat * kept.div(1 - members[0].dropout)
        adapters = tiled(flat, members, ab)
        ctx.members, ctx.dropped, ctx.tiled = members, kept is not None, adapters is not None
        if adapters is not None:
            ys, h = members[0].tiles.linear(flat, adapters, seen)
        else:
            ys, h = forward(flat, members, *matrices(ab, members, x.dtype), seen)
        ctx.save_for_backward(*((flat,) if kept is None else (flat, kept.bool())), h, *ab)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, of all A and of all B."""
        x, *rest = ctx.saved_tensors
        kept = None
        if ctx.dropped:
            kept = rest.pop(0).to(x.dtype).div_(1 - ctx.members[0].dropout)
        h, *ab = rest
        flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = None
        if ctx.tiled:
            tiles, adapters = ctx.members[0].tiles, tiled(x, ctx.members, ab)
            if adapters is None:
                raise RuntimeError(CHANGED)
            dx, dab = tiles.linear_backward(flat, x, h, adapters, kept, into_x=ctx.needs_input_grad[0])
        else:
            a, b = matrices(ab, ctx.members, x.dtype)
            dh = into_h(flat, b)
            dab = into_ab(flat, dh, x if kept is None else x * kept, h, ctx.members, b)
            if ctx.needs_input_grad[0]:
                dx = into_x(flat, dh, ctx.members, a, kept)
        return None if dx is None else dx.view(*dys[0].shape[:-1], -1), None, *dab


def _compute(x: Tensor, members: Sequence[Member], ab: list[Tensor]) -> Sequence[Tensor]:
    if torch.is_grad_enabled() or any(member.dropout for member in members):
        return FusedLinear.apply(x, members, *ab)  # type: ignore[no-any-return,no-untyped-call]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in infer(x.reshape(-1, x.shape[-1]), members, ab)]


def fusible(layer: torch.nn.Module) -> bool:
    """Return whether *layer* is LoRA of PEFT on a frozen linear layer, packed in 4 bits or plain."""
    if not isinstance(layer, LoraLayer):
        return False
    base: Any = layer.base_layer
    if isinstance(base, Linear4bit):
        return base.weight.quant_state is not None and not _trained(base)
    # a packed weight may be a tensor of a class of its own in an ordinary layer, as torchao's is
    return type(base) is torch.nn.Linear and type(base.weight.data) is Tensor and not _trained(base)


def _trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def members_of(layers: Sequence[Any], loops: Any = None, tiles: Any = None) -> tuple[tuple[Member, ...], list[Tensor]] | None:
    """Return *layers* as their adapters stand now, with all A and all B; None where that is for PEFT to compute.

    So it is where no adapter is active, or several are, and where one is merged or is of a variant such as DoRA.
    """
    members, a, b = [], [], []
    for layer in layers:
        if not isinstance(layer, LoraLayer):  # (the adapter was unloaded)
            return None
        active = layer.active_adapters
        if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
            return None
        name = active[0]
        if name in layer.lora_variant or layer.lora_bias.get(name):
            return None
        dropout = layer.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, torch.nn.Dropout) and layer.training else 0.0
        members.append(Member(layer.base_layer, layer.scaling[name], rate, loops, tiles))
        a.append(layer.lora_A[name].weight)
        b.append(layer.lora_B[name].weight)
    return tuple(members), [*a, *b]


def compute_dtype(x: Tensor, layer: Any) -> torch.dtype:
    """Return the dtype of the products of *layer*, LoRA of PEFT, with *x*: autocast's, else the layer's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    base = layer.base_layer
    return (base.compute_dtype or x.dtype) if isinstance(base, Linear4bit) else base.weight.dtype  # type: ignore[no-any-return]


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that layers and norms give for *x*: autocast's, else its own, which other layers count on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Group:
    """Layers that their parent calls one after the other with the same input: the first call computes all of them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.x: Tensor | None = None
        self.ys: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "x": None, "ys": {}}

    def call(self, index: int, x: Tensor, loops: Any = None, tiles: Any = None) -> Tensor | None:
        """Return y of the layer at *index* for *x*, or None where that is for PEFT to compute."""
        if index and self.x is x and index in self.ys:
            y = self.ys.pop(index)
            if not self.ys:
                self.x = None
            return y
        self.x, self.ys = None, {}
        dtype = compute_dtype(x, self.layers[index])
        if dtype != output_dtype(x):  # (without autocast: PEFT then keeps A and B in a wider dtype)
            return None
        found = members_of(self.layers[index:] if not index else self.layers[index : index + 1], loops, tiles)
        if found is None:
            found = members_of(self.layers[index : index + 1], loops, tiles)
        if found is None:
            return None
        members, ab = found
        if members[0].dropout or any(member.dropout for member in members):
            members, ab = members_of(self.layers[index : index + 1], loops, tiles)  # type: ignore[misc]
        with torch.autocast(x.device.type, enabled=False):
            y, *others = _compute(x.to(dtype), members, ab)
        if others:
            self.x, self.ys = x, dict(enumerate(others, start=1))
        return y  # type: ignore[no-any-return]


def fuse_group(layers: Sequence[Any], loops: Any = None, tiles: Any = None) -> None:
    """Let *layers*, all `fusible`, compute as one group."""
    group = Group(layers)
    for index, layer in enumerate(layers):
        layer.fused_group = group  # an attribute: a deep copy of the model gets groups of its own layers

        def forward(self: Any, x: Tensor, *args: Any, _index: int = index, **kwargs: Any) -> Tensor:
            y = None if args or kwargs else self.fused_group.call(_index, x, loops, tiles)
            return type(self).forward(self, x, *args, **kwargs) if y is None else y  # type: ignore[no-any-return]

        layer.forward = types.MethodType(forward, layer)
