"""Chains of matrix products by tiles of bfloat16 (AMX), the threads of torch together in one call. Imports numba.

What LoRA on a packed weight needs is x Q(W)^T + h B^T; `lora` says what is multiplied by what, `loop` has the loop.

Matrices are (rows, columns), or in blocks, (rows / 32, columns / 32, 32, 32): these are written and read in the order of
memory, where rows that are far apart take a quarter longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_fused.fourbit import Packed
from qlora_fused.tiles import loop as t
from qlora_fused.tiles.gates import CONSTANTS
from qlora_fused.tiles.instructions import TILE
from qlora_fused.tiles.panels import FOURBIT, FOURBIT_T, PLAIN, PLAIN_T, WIDE

__all__ = ["Chain", "Right", "in_blocks"]

PANELS = 2**20  # bytes of panels that are worked on at a time: they stay in L2
STEPS = 144  # times 32 of a sum of long rows that are made at a time: more would leave no room for panels
SHARES = 3  # parts, at least, that a thread gets of a product
UNPACKED = (0,) * 9  # where a packed weight has the numbers of a Packed


def in_blocks(rows: int, columns: int) -> Tensor:
    """Return room for a matrix of bfloat16 in blocks."""
    return torch.empty(rows // 32, columns // WIDE, 32, WIDE, dtype=torch.bfloat16)


def _strides(matrix: Tensor) -> tuple[int, int, int]:
    """Return the bytes from a row to the next, and from 32 rows and 32 columns to the next."""
    size, row = matrix.element_size(), matrix.stride(-2)
    down, ahead = (matrix.stride(0), matrix.stride(1)) if matrix.dim() == 4 else (32 * row, WIDE)
    return row * size, down * size, ahead * size


def _shape(matrix: Tensor) -> tuple[int, int]:
    size = 32 if matrix.dim() == 4 else 1
    return matrix.shape[0] * size, matrix.shape[1] * size


class Right(NamedTuple):
    """A right matrix (rows, columns): bfloat16 or a layer's weight in 4 bits, as it is or the *transposed* of it."""

    kind: int
    rows: int
    columns: int
    numbers: tuple[int, ...]
    source: Any
    """What has to live until the chain has run."""

    @classmethod
    def plain(cls, matrix: Tensor, *, transposed: bool = False) -> Right:
        """Return that of a matrix of bfloat16, whose rows are contiguous."""
        rows, columns = _shape(matrix)[::-1] if transposed else _shape(matrix)
        numbers = (matrix.data_ptr(), *_strides(matrix), *UNPACKED)
        return cls(PLAIN_T if transposed else PLAIN, rows, columns, numbers, matrix)

    @classmethod
    def packed(cls, weight: Packed, shape: Sequence[int], *, transposed: bool = False) -> Right:
        """Return Q(W) of *shape*, (out, in)."""
        rows, columns = reversed(shape) if transposed else shape
        numbers = (0, shape[1] // 2, 0, 0, *weight.numbers)
        return cls(FOURBIT_T if transposed else FOURBIT, rows, columns, numbers, weight)


Summand = tuple[Tensor, Right]
"""A left matrix of bfloat16 (rows, k) and a right one (k, columns), of which the product is meant."""
Part = tuple[Tensor, Right, int, int]
"""A summand, and the first of the rows / 32 of the right matrix that are meant, and how many."""


def _whole(summands: Sequence[Summand]) -> list[Part]:
    return [(left, right, 0, right.rows // 32) for left, right in summands]


def _cut(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Return the first STEPS of a sum, and the others."""
    some: list[Part] = []
    others: list[Part] = []
    room = STEPS
    for left, right, first, steps in parts:
        now = min(room, steps)
        now -= now % 2 if right.kind == FOURBIT_T and now < steps else 0  # of which two are unpacked at once
        room -= now
        if now:
            some.append((left, right, first, now))
        if steps > now:
            others.append((left, right, first + now, steps - now))
    return some, others


class Chain:
    """Products that are computed one after the other, or side by side where no `then` lies between them."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.blocks = self.before = self.space = 0
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.alive: list[Part] = []  # addresses are taken before the loop runs; what is in steps lives there

    def then(self) -> Chain:
        """Let what follows wait for what is there."""
        self.before = self.blocks
        return self

    def copy(self, out: Tensor, matrix: Tensor, factor: float = 1.0, *, column: int = 0) -> None:
        """Write *factor* times *matrix*, float32, to the first rows of *out*, bfloat16, from *column* on; elsewhere zeros."""
        if matrix.dtype != torch.float32 or not matrix.is_contiguous():
            matrix = matrix.detach().float().contiguous()
        self._step(1, t.COPY, [matrix, out, float(factor), *matrix.shape, *out.shape, column])

    def product(
        self,
        out: Tensor,
        *summands: Summand,
        addend: Tensor | None = None,
        bias: Tensor | None = None,
        turned: Tensor | None = None,
    ) -> Tensor:
        """Write the sum of all summands to *out*, and the transposed of it to *turned*; return *out*.

        *addend* (rows, columns) and *bias* (columns), float32, are added before it is rounded; a long sum is written over
        *addend* meanwhile. *turned* is bfloat16, out bfloat16 or float32, which takes no bias. Columns and k are multiples of
        32, rows of 16.
        """
        parts, size = _whole(summands), _shape(out)
        while sum(steps for *_, steps in parts) > STEPS:
            some, parts = _cut(parts)
            if (sums := addend) is None:
                if size in self.sums:
                    self.then()  # that which it was for may not have been read yet
                else:
                    self.sums[size] = torch.empty(size)
                sums = self.sums[size]
            self._product(size, some, {**_written(sums), t.ADDEND: 0 if addend is None else addend})
            self.then()
            addend = sums
        told = _written(out)
        if turned is not None:
            told |= {t.TURNED: turned, t.TURNED_STRIDE: turned.stride(0)}
        told |= {place: given for place, given in ((t.ADDEND, addend), (t.BIAS, bias)) if given is not None}
        self._product(size, parts, told)
        return out

    def product_t(self, out: Tensor, left: Tensor, right: Right, factor: float) -> Tensor:
        """Write *factor* times the transposed of left @ right to *out* (columns, rows), float32; return it.

        left: (at least *rows*, k), right: (k, columns).
        """
        told = {t.OUT: out, t.STRIDE: out.stride(0), t.HOW: t.SINGLE_T, t.FACTOR: float(factor)}
        self._product((out.shape[1], out.shape[0]), _whole([(left, right)]), told)
        return out

    def gated(
        self, x: Tensor, h: Tensor, rights: Sequence[tuple[Right, Right]], biases: Sequence[Tensor | None], activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x @ right + h @ other + bias of both sides, gate and up, and act(gate) * up, in blocks.

        The last is made of gate and up as they are before they are rounded.
        """
        gate, up, out = (in_blocks(len(x), rights[0][0].columns) for _ in range(3))
        told = {t.GATING: t.FORWARD, t.GATE: gate, t.UP: up, t.GATED: out}
        told |= {place: bias for place, bias in zip((t.BIAS, t.UP_BIAS), biases, strict=True) if bias is not None}
        parts = [part for pair in rights for part in _whole(list(zip((x, h), pair, strict=True)))]
        self._product(_shape(out), parts, told | _constants(activation))
        return gate, up, out

    def gated_backward(self, gate: Tensor, up: Tensor, *summands: Summand, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return act(gate) * up, and the gradients of gate and up for that of their product, the sum of *summands*.

        All in blocks; the sum is not rounded.
        """
        out, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
        told = {t.GATING: t.BACK, t.GATE: gate, t.UP: up, t.GATED: out, t.D_GATE: d_gate, t.D_UP: d_up}
        self._product(_shape(gate), _whole(summands), told | _constants(activation))
        return out, d_gate, d_up

    def _product(self, size: tuple[int, int], parts: Sequence[Part], told: Mapping[int, Any]) -> None:
        (rows, columns), steps, wanted = size, sum(own for *_, own in parts), SHARES * torch.get_num_threads()
        for left, right, *_ in parts:  # beyond what is there nothing must be read
            if _shape(left)[1] != right.rows:
                raise ValueError(
                    f"a left matrix {_shape(left)} has no product with a right one ({right.rows}, {right.columns})"
                )
            if right.columns != columns or columns % WIDE or _shape(left)[0] < -(-rows // 16) * 16:
                raise ValueError(f"products of {_shape(left)} with ({right.rows}, {right.columns}) don't fit into {size}")
        panels = max(1, min(PANELS // (2 * TILE * steps), -(-columns // (WIDE * wanted))))
        shares = -(-columns // (WIDE * panels))
        cuts = -(-wanted // shares) if shares < torch.get_num_threads() else 1
        some = -(-rows // (32 * cuts)) * 32
        told = {**told, t.ROWS: rows, t.SOME: some, t.COLUMNS: columns, t.PANELS: panels, t.STEPS: steps, t.PARTS: len(parts)}
        numbers = [told.get(place, 0) for place in range(t.ROWS, t.SUMMANDS)]
        for left, right, first, own in parts:
            row, down, ahead = _strides(left)
            numbers += [left.data_ptr() + first * ahead, row, down, ahead, right.kind, own, first, *right.numbers]
        self._step(shares * -(-rows // some), t.PRODUCT, numbers)
        self.space = max(self.space, panels * 2 * TILE * steps + 128 * steps)  # and room for scales
        self.alive += parts

    def _step(self, blocks: int, kind: int, numbers: Sequence[Any]) -> None:
        self.steps.append([self.blocks, blocks, 0, kind, self.before, *numbers])
        self.blocks += blocks

    def run(self) -> None:
        """Compute all."""
        numbers, end = [], t.STEP
        for step in self.steps:
            end += len(step)
            step[t.NEXT] = end
            numbers += step
        own = -(-self.space // 4096) * 4096
        space = torch.empty(torch.get_num_threads() * own + 64, dtype=torch.uint8)
        t.run_chain(torch.bfloat16, self.blocks, 0, 0, space.data_ptr() + -space.data_ptr() % 64, own, *numbers)


def _written(out: Tensor) -> dict[int, Any]:
    """Return what a product is told of where it goes."""
    row, down, ahead = _strides(out)
    how = t.SINGLE if out.dtype == torch.float32 else t.ROUNDED
    return {t.OUT: out, t.STRIDE: row, t.DOWN: down, t.AHEAD: ahead, t.HOW: how}


def _constants(activation: str) -> dict[int, Any]:
    return dict(zip((t.C0, t.C1), CONSTANTS[activation], strict=True))
