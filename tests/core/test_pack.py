"""Samples are packed whole, tightly, in a fixed order, and fast."""

from __future__ import annotations

import bisect
import time
from itertools import pairwise

import numpy as np
import pytest

from qlora_core.data.pack import pack


def blocks(lengths: list[int], capacity: int) -> list[list[int]]:
    offsets, indices = pack(np.array(lengths, dtype=np.int64), capacity)
    assert offsets.dtype == indices.dtype == np.int64
    return [indices[a:b].tolist() for a, b in pairwise(offsets)]


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Return the room left in each block of best-fit decreasing, as the textbook has it."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, length)
        space = room.pop(at) if at < len(room) else capacity
        bisect.insort(room, space - length)
    return room


@pytest.mark.parametrize("capacity", [1, 16, 100, 512])
@pytest.mark.parametrize("n", [0, 1, 7, 400, 2000])
def test_blocks_are_those_of_best_fit_decreasing_one_sample_at_a_time(capacity: int, n: int) -> None:
    random = np.random.default_rng(n + capacity)
    uniform = random.integers(1, capacity + 1, n)
    for lengths in (uniform, np.minimum(uniform, random.integers(1, capacity + 1, n) // 3 + 1), uniform // 2 + 1):
        lengths = np.minimum(lengths, capacity).tolist()
        packed = blocks(lengths, capacity)
        assert sorted(index for block in packed for index in block) == list(range(n))
        room = sorted(capacity - sum(lengths[index] for index in block) for block in packed)
        assert room == one_by_one(lengths, capacity)
        assert not room or room[0] >= 0


def test_samples_ascend_in_their_block_and_blocks_by_their_first_sample() -> None:
    random = np.random.default_rng(0)
    packed = blocks(random.integers(1, 64, 1000).tolist(), 64)
    assert all(block == sorted(block) for block in packed)
    assert [block[0] for block in packed] == sorted(block[0] for block in packed)


def test_full_pieces_of_a_text_stay_in_their_order() -> None:
    assert blocks([8, 8, 8, 3], 8) == [[0], [1], [2], [3]]
    assert blocks([5, 8, 3, 8, 2, 6], 8) == [[0, 2], [1], [3], [4, 5]]


def test_the_same_lengths_give_the_same_blocks() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 5000)
    first, second = pack(lengths, 512), pack(lengths.copy(), 512)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lengths", [[3, 0], [9], [-1]])
def test_a_sample_without_tokens_or_too_long_for_a_block_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must be from 1 to 8 \(got"):
        pack(np.array(lengths), 8)


@pytest.mark.parametrize("capacity", [512, 8192])
def test_a_million_samples_take_seconds_and_fill_their_blocks(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64), 1, capacity)
    started = time.process_time()
    offsets, _ = pack(lengths, capacity)
    assert time.process_time() - started < 5  # 0.2 s where it was written
    assert lengths.sum() / ((len(offsets) - 1) * capacity) > 0.99
