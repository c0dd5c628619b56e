"""Pack samples into blocks, none cut: best-fit decreasing on the histogram of lengths. Knows no tokens, only lengths."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pack"]

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Filling:
    """What lies in a block: *count* samples of *length* tokens, on top of what lay in it before."""

    length: int
    count: int
    below: _Filling | None


def pack(lengths: npt.NDArray[Any], capacity: int) -> tuple[Numbers, Numbers]:
    """Return `offsets` (n_blocks + 1,) and `indices` (n_samples,), int64: block b holds `indices[offsets[b]:offsets[b + 1]]`.

    Longest first, each sample goes into the block that it leaves least room in (Johnson 1973: at most 11/9 of the fewest
    blocks, plus one). Samples stand in ascending order in their block, blocks in the order of their first samples, so that
    pieces of one text stay in order. Deterministic. Raises ValueError for a sample without tokens or beyond *capacity*.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity} (got {lengths.min()} to {lengths.max()})")
    block_of = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(lengths, kind="stable")  # samples of one length are interchangeable: taken in their own order
    counts = np.bincount(lengths, minlength=1)
    taken = np.cumsum(counts) - counts  # of each length: where in by_length the next sample stands
    n_blocks = 0
    for blocks, filling in _fill(counts, capacity):
        numbers = np.arange(n_blocks, n_blocks + blocks)
        n_blocks += blocks
        step: _Filling | None = filling
        while step is not None:
            start, stop = taken[step.length], taken[step.length] + blocks * step.count
            block_of[by_length[start:stop]] = np.repeat(numbers, step.count)
            taken[step.length] = stop
            step = step.below
    return _in_order(block_of, n_blocks)


def _fill(counts: Numbers, capacity: int) -> list[tuple[int, _Filling]]:
    """Return how often each filling occurs; `counts[n]` samples have n tokens.

    Equal blocks are handled together: c blocks with room for r take r // n samples of n tokens each, which is what placing
    the samples one by one would come to, since the block just begun is then the tightest that fits.
    """
    room: dict[int, deque[tuple[int, _Filling]]] = {}  # blocks by the room left in them
    rooms = 0  # bit r is set where room[r] is not empty: the tightest fit is the lowest bit from n on
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            below: _Filling | None
            fits = rooms >> length
            if fits:
                space = length + (fits & -fits).bit_length() - 1
                blocks, below = room[space].popleft()
                if not room[space]:
                    rooms &= ~(1 << space)
            else:
                space, below = capacity, None  # new blocks: as many as take all they can, or one
                blocks = max(1, left // (capacity // length))
            each = min(space // length, left)
            used = min(blocks, left // each)
            if used < blocks and below is not None:
                room[space].appendleft((blocks - used, below))
                rooms |= 1 << space
            left -= used * each
            rest = space - each * length
            room.setdefault(rest, deque()).append((used, _Filling(length, each, below)))
            rooms |= 1 << rest
    return [group for groups in room.values() for group in groups]


def _in_order(block_of: Numbers, n_blocks: int) -> tuple[Numbers, Numbers]:
    """Return offsets and indices, blocks in the order of their smallest index."""
    indices = np.argsort(block_of, kind="stable")
    sizes = np.bincount(block_of, minlength=n_blocks)
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(indices[starts], kind="stable") if n_blocks else starts
    new_sizes = sizes[order]
    offsets = np.concatenate([[0], np.cumsum(new_sizes)]).astype(np.int64)
    within = np.arange(len(indices)) - np.repeat(offsets[:-1], new_sizes)
    return offsets, indices[np.repeat(starts[order], new_sizes) + within]
