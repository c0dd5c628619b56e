"""Pack weights into 4 bits on the CPU: the bits of bitsandbytes, several times as fast and in little memory. Imported late.

bitsandbytes 0.50 has no CPU kernel for this. Its formula in torch works on a whole matrix at once, some 16 bytes per weight
beside it, and finds each weight's level by binary search, which no CPU does many at a time. Here a table says the level of
nearly every weight, and the few that lie beside a border between two levels are searched for.
"""

from __future__ import annotations

import functools

import bitsandbytes.functional
import torch

__all__ = ["install_packing", "pack_4bit"]

OPERATOR = "bitsandbytes::quantize_4bit"
CHUNK = 2**19
"""Weights that are worked on together: their float32 copies fit a cache. A multiple of every block size."""
BINS = 2**15
"""Bins of the table between 0 and 1."""
UNSURE = 255
"""In the table: a border lies in this bin."""


def install_packing() -> None:
    """Let bitsandbytes quantise to 4 bits with `pack_4bit` on the CPU, unless it has a kernel of its own there."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU"):
        torch.library.register_kernel(OPERATOR, "cpu", pack_4bit)


def pack_4bit(
    weights: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `bitsandbytes::quantize_4bit` does: packed levels, (ceil(n / 2), 1) uint8, and scales, (blocks,) float32.

    Of two levels in a byte the first is the high one. They may be viewed as *quant_storage*.
    """
    flat = weights.detach().reshape(-1)
    size, whole = flat.numel(), flat.numel() // blocksize * blocksize
    packed = torch.empty((size + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-size // blocksize), dtype=torch.float32)
    borders, order, table = _borders(quant_type)
    work = _Workspace(min(CHUNK, whole))
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        largest = scales[start // blocksize : stop // blocksize]
        scaled = work.scale(flat[start:stop], largest)
        finite = bool(largest.isfinite().all())
        levels = work.levels(scaled, table, borders, order) if finite else order[torch.bucketize(scaled, borders)]
        _pairs(levels, packed[start // 2 : stop // 2])
    if whole < size:  # the last block, which is divided by its scale where the others are multiplied by its inverse
        rest = flat[whole:].float()
        scales[-1] = rest.abs().max().clamp(min=1e-38)
        scaled = torch.clamp(rest / scales[-1], -1, 1)
        scaled = torch.nn.functional.pad(scaled, (0, size % 2))
        _pairs(order[torch.bucketize(scaled, borders)], packed[whole // 2 :])
    if quant_storage != torch.uint8:
        packed = packed.view(quant_storage)
    return packed.unsqueeze(1), scales


@functools.cache
def _borders(quant_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the 15 midpoints between the levels in order, float32, the level above each, (16,) uint8, and a table.

    The table has the level of each bin, (2 * BINS + 1,) uint8, UNSURE where a border lies in it.
    """
    code = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    places = torch.argsort(code)
    borders, order = (code[places[:-1]] + code[places[1:]]) / 2, places.to(torch.uint8)
    at = _bins(borders).int()
    table = order[torch.bucketize(torch.arange(2 * BINS + 1, dtype=torch.int32), at)]
    table[at] = UNSURE
    return borders, order, table


def _bins(scaled: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the bin of each weight in -1 to 1, float32, to be rounded down; it never falls as the weight grows."""
    return torch.add(scaled, 1.0, out=out).mul_(BINS)


class _Workspace:
    """What a chunk of at most *size* weights is worked on in, 14 bytes per weight; each chunk uses it again.

    Anew for each chunk, it would leave gaps between the weights that are kept: up to half of the memory that they take.
    """

    def __init__(self, size: int) -> None:
        self.weights, self.scaled = torch.empty(2, size, dtype=torch.float32)
        self.bins = torch.empty(size, dtype=torch.int32)
        self.level = torch.empty(size, dtype=torch.uint8)
        self.unsure = torch.empty(size, dtype=torch.bool)

    def scale(self, weights: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Return *weights* (n,) in -1 to 1, float32, and write the largest magnitude of each block to *largest*."""
        blocks = self.weights[: len(weights)].copy_(weights).view(len(largest), -1)
        scaled = self.scaled[: len(weights)]
        torch.amax(torch.abs(blocks, out=scaled.view_as(blocks)), dim=1, out=largest)
        torch.mul(blocks, (1.0 / largest.clamp(min=1e-38)).view(-1, 1), out=scaled.view_as(blocks))
        return scaled.clamp_(-1, 1)

    def levels(self, scaled: torch.Tensor, table: torch.Tensor, borders: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return the level of each weight, (n,) uint8; *scaled* lies in -1 to 1."""
        size = len(scaled)
        bins = self.bins[:size].copy_(_bins(scaled, self.weights[:size]))
        levels = torch.index_select(table, 0, bins, out=self.level[:size])
        unsure = torch.eq(levels, UNSURE, out=self.unsure[:size]).nonzero().view(-1)
        levels[unsure] = order[torch.bucketize(scaled[unsure], borders)]
        return levels


def _pairs(levels: torch.Tensor, out: torch.Tensor) -> None:
    """Write two levels per byte to *out*, (n / 2,) uint8; the first is the high one."""
    pairs = levels.view(-1, 2)
    torch.bitwise_left_shift(pairs[:, 0], 4, out=out).bitwise_or_(pairs[:, 1])
