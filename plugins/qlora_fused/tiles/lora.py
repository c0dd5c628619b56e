"""LoRA on frozen linear layers, and gated MLPs, as chains of products on the CPU's units for tiles (AMX). Imports numba.

The same functions as in `lora` and `mlp`, which serve where these don't: for other dtypes and sizes, and on other CPUs. Sums
are rounded once, products for gradients of A and B not at all, and nothing is written that the next product could make in the
cache: unpacked weights are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from qlora_fused.fourbit import Packed
from qlora_fused.jit import has_tiles
from qlora_fused.loops import gated, gated_backward
from qlora_fused.tiles.chains import Chain, Right, in_blocks

if TYPE_CHECKING:
    from qlora_fused.lora import Member

__all__ = ["Adapters", "adapters_of", "fits", "linear", "linear_backward", "mlp", "mlp_backward"]

LONGEST = 3000  # inputs and ranks up to which gate and up are made together: at 2,048 it is quicker, at 4,096 slower


class Adapters:
    """A and B of layers that share their input, in bfloat16, side by side: h = x A^T (rows, ranks) is one product for all.

    *ranks* is their sum, filled up to a multiple of 32. B (out_i, ranks) of a layer, times its scale, is zero but for its own;
    so what is not finite in one layer's h spoils the others.
    """

    def __init__(
        self, members: Sequence[Member], a: Sequence[Tensor], b: Sequence[Tensor], packed: Sequence[Packed | None]
    ) -> None:
        self.members, self.packed = members, packed
        self.sizes = [len(part) for part in a]
        spare = 16 if any(rank % 16 for rank in self.sizes) else 0  # products take 16 rows, also from the last rank on
        self.ranks = -(-(sum(self.sizes) + spare) // 32) * 32
        self.offsets = [sum(self.sizes[:n]) for n in range(len(a))]
        self.sources = (a, b)
        self.a = torch.empty(self.ranks, a[0].shape[1], dtype=torch.bfloat16)
        self.b = [torch.empty(len(part), self.ranks, dtype=torch.bfloat16) for part in b]

    def copy(self, chain: Chain) -> None:
        """Let *chain* fill A and B."""
        ends = [*self.offsets[1:], self.ranks]
        parts = zip(self.members, *self.sources, self.b, self.offsets, ends, strict=True)
        for member, a, b, into, offset, end in parts:
            chain.copy(self.a[offset:end], a)
            chain.copy(into, b, member.scale, column=offset)

    def weight(self, n: int, *, transposed: bool = False) -> Right:
        """Return Q(W) of the *n*-th layer, (out, in)."""
        weight: Any = self.members[n].layer.weight
        if (packed := self.packed[n]) is not None:
            return Right.packed(packed, weight.quant_state.shape, transposed=transposed)
        return Right.plain(weight.detach().to(torch.bfloat16).contiguous(), transposed=transposed)

    def bias(self, n: int) -> Tensor | None:
        """Return the bias of the *n*-th layer, float32."""
        bias: Any = self.members[n].layer.bias
        return None if bias is None else bias.detach().float()

    def h(self, chain: Chain, x: Tensor, turned: Tensor) -> Tensor:
        """Let *chain* compute h (rows, ranks), returned, and the transposed of it."""
        h = torch.empty(turned.shape[::-1], dtype=torch.bfloat16)
        return chain.product(h, (x, Right.plain(self.a, transposed=True)), turned=turned)

    def y(self, chain: Chain, out: Tensor, n: int, x: Tensor, h: Tensor) -> Tensor:
        """Let *chain* compute the output of the *n*-th layer."""
        summands = (x, self.weight(n, transposed=True)), (h, Right.plain(self.b[n], transposed=True))
        return chain.product(out, *summands, bias=self.bias(n))

    def dh(self, chain: Chain, dys: Sequence[Tensor], turned: Tensor) -> Tensor:
        """Let *chain* compute the gradient of h, and the transposed of it."""
        dh = torch.empty(turned.shape[::-1], dtype=torch.bfloat16)
        return chain.product(dh, *((dy, Right.plain(b)) for dy, b in zip(dys, self.b, strict=True)), turned=turned)

    def dx(self, chain: Chain, out: Tensor, dys: Sequence[Tensor], dh: Tensor | None, addend: Tensor | None = None) -> Tensor:
        """Let *chain* compute the gradient of x; *addend*, float32, stands for what comes through A where *dh* is None."""
        summands = [(dy, self.weight(n)) for n, dy in enumerate(dys)]
        if dh is not None:
            summands.append((dh, Right.plain(self.a)))
        return chain.product(out, *summands, addend=addend)

    def da(self, chain: Chain, x: Tensor, dh_turned: Tensor) -> list[Tensor]:
        """Let *chain* compute the gradients of all A, float32."""
        total = sum(self.sizes)
        da = torch.empty(-(-total // 16) * 16, self.a.shape[1])
        chain.product(da, (dh_turned, Right.plain(x)))
        return list(da[:total].split(self.sizes))

    def db(self, chain: Chain, dys: Sequence[Tensor], h_turned: Tensor) -> list[Tensor]:
        """Let *chain* compute the gradients of all B, float32."""
        parts = zip(self.members, dys, self.b, self.sizes, self.offsets, strict=True)
        return [
            chain.product_t(torch.empty(len(b), rank), h_turned[offset:], Right.plain(dy), member.scale)
            for member, dy, b, rank, offset in parts
        ]


def adapters_of(x: Tensor, members: Sequence[Member], a: Sequence[Tensor], b: Sequence[Tensor]) -> Adapters | None:
    """Return those of *members* where tiles can compute them with x (rows, in), else None."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not len(x) or any(member.loops is None for member in members):
        return None
    if not has_tiles():  # asked again: a model may have been loaded into another process, or on another machine
        return None
    layers: list[Any] = [member.layer for member in members]
    packed = [Packed.of(layer) if isinstance(layer, Linear4bit) else None for layer in layers]
    if all(fits(layer, weight) for layer, weight in zip(layers, packed, strict=True)):
        return Adapters(members, a, b, packed)
    return None


def fits(layer: Any, packed: Packed | None) -> bool:
    """Return whether the weight of *layer*, a Packed where it is a Linear4bit, is known and of a size that tiles take."""
    if isinstance(layer, Linear4bit):
        return packed is not None and packed.numbers[2] % 64 == 0 and layer.weight.quant_state.shape[0] % 32 == 0
    return layer.weight.device.type == "cpu" and all(size % 32 == 0 for size in layer.weight.shape)


def _turned(rows: int, adapters: Adapters) -> Tensor:
    return torch.empty(adapters.ranks, rows, dtype=torch.bfloat16)


def _even(x: Tensor) -> Tensor:
    """Return *x* with contiguous rows, and as many of zeros below as make them a multiple of 32."""
    spare = -len(x) % 32
    return F.pad(x, (0, 0, 0, spare)) if spare else x.contiguous()


def linear(x: Tensor, adapters: Adapters, seen: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Return y_i (rows, out_i), and h transposed, which the gradients need. x: (rows, in); *seen* is x after dropout."""
    rows, x = len(x), _even(x)
    chain, h_turned = Chain(), _turned(len(x), adapters)
    adapters.copy(chain)
    h = adapters.h(chain.then(), x if seen is None else _even(seen), h_turned)
    chain.then()
    ys = [adapters.y(chain, x.new_empty(len(x), len(b)), n, x, h)[:rows] for n, b in enumerate(adapters.b)]
    chain.run()
    return ys, h_turned


def linear_backward(
    dys: Sequence[Tensor], x: Tensor, h_turned: Tensor, adapters: Adapters, kept: Tensor | None = None, *, into_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of x (rows, in), or None, and those of all A and then of all B.

    *kept* is the mask of dropout over 1 - p.
    """
    rows, dys = len(x), [_even(dy) for dy in dys]
    seen = _even(x if kept is None else x * kept)
    chain, dh_turned = Chain(), _turned(len(seen), adapters)
    adapters.copy(chain)
    dh = adapters.dh(chain.then(), dys, dh_turned)
    db = adapters.db(chain, dys, h_turned)
    da = adapters.da(chain.then(), seen, dh_turned)
    out = torch.empty_like(seen) if into_x else None
    if out is not None and kept is not None:
        through = torch.empty(out.shape)
        chain.product(through, (dh, Right.plain(adapters.a)))
        chain.run()
        chain = Chain()
        through[:rows].mul_(kept)
        adapters.dx(chain, out, dys, None, through)
    elif out is not None:
        adapters.dx(chain, out, dys, dh)
    chain.run()
    return None if out is None else out[:rows], [*da, *db]


def mlp(x: Tensor, wide: Adapters, narrow: Adapters, activation: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y (rows, out), and what the gradients need: gate and up in blocks, and both h, transposed."""
    given, x = len(x), _even(x)
    chain, h_turned, down_turned = Chain(), _turned(len(x), wide), _turned(len(x), narrow)
    wide.copy(chain)
    narrow.copy(chain)
    h = wide.h(chain.then(), x, h_turned)
    chain.then()
    if x.shape[1] + wide.ranks <= LONGEST:
        rights = [(wide.weight(n, transposed=True), Right.plain(wide.b[n], transposed=True)) for n in (0, 1)]
        gate, up, product = chain.gated(x, h, rights, [wide.bias(n) for n in (0, 1)], activation)
    else:
        gate, up = (wide.y(chain, in_blocks(len(x), len(b)), n, x, h) for n, b in enumerate(wide.b))
        chain.run()
        chain, product = Chain(), gated(gate, up, activation)
    h = narrow.h(chain.then(), product, down_turned)
    y = narrow.y(chain.then(), x.new_empty(len(x), len(narrow.b[0])), 0, product, h)
    chain.run()
    return y[:given], (gate, up, h_turned, down_turned)


def mlp_backward(
    dy: Tensor, x: Tensor, kept: Sequence[Tensor], wide: Adapters, narrow: Adapters, activation: str, *, into_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Return the gradient of x, or None, those of A and B of gate and up, all A first, and those of down."""
    gate, up, h_turned, down_turned = kept
    given, x, dy = len(x), _even(x), _even(dy)
    chain, dh_turned = Chain(), _turned(len(x), narrow)
    narrow.copy(chain)
    wide.copy(chain)
    dh = narrow.dh(chain.then(), [dy], dh_turned)
    db_down = narrow.db(chain, [dy], down_turned)
    chain.then()
    if dy.shape[1] + narrow.ranks <= LONGEST:
        through = (dy, narrow.weight(0)), (dh, Right.plain(narrow.a))
        product, *both = chain.gated_backward(gate, up, *through, activation=activation)
    else:
        d_product = narrow.dx(chain, torch.empty_like(gate), [dy], dh)
        chain.run()
        chain, (product, *both) = Chain(), gated_backward(d_product, gate, up, activation)
    down = [*narrow.da(chain.then(), product, dh_turned), *db_down]
    dh_turned = _turned(len(x), wide)
    db = wide.db(chain, both, h_turned)
    dh = wide.dh(chain, both, dh_turned)
    chain.then()
    dx = wide.dx(chain, torch.empty_like(x), both, dh) if into_x else None
    da = wide.da(chain, x, dh_turned)
    chain.run()
    return None if dx is None else dx[:given], [*da, *db], down
