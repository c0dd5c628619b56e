"""The same samples in several layouts, and how they are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from qlora_core import DataError
from qlora_core.data.collate import IGNORED, Collator
from qlora_core.data.layouts import Layouts, first_samples


def block(*sizes: int, masked: int = 0) -> dict[str, Any]:
    """Return a block of samples, ids 1, 2, ... throughout, the first *masked* tokens of each not supervised."""
    ids = np.arange(1, sum(sizes) + 1, dtype=np.int32)
    labels, at = ids.copy(), 0
    for size in sizes:
        labels[at : at + masked] = IGNORED
        at += size
    return {"input_ids": ids, "labels": labels, "lengths": [*sizes]}


def sizes_of(samples: Any) -> list[int]:
    assert all(sample["lengths"] == [len(sample["input_ids"])] == [len(sample["labels"])] for sample in samples)
    return [len(sample["input_ids"]) for sample in samples]


def layouts(*sizes: int) -> Layouts:
    return Layouts(first_samples([block(*sizes)], len(sizes)), Collator(0, 4, longest=8))


def test_samples_are_the_first_ones_in_order_and_as_they_are_where_lengths_differ() -> None:
    samples = first_samples([block(7, 3), block(5), block(9)], 3)
    assert sizes_of(samples) == [7, 3, 5]
    assert samples[1]["input_ids"].tolist() == [8, 9, 10]
    assert sizes_of(first_samples([block(7, 3)], 8)) == [7, 3]


def test_samples_of_one_length_are_cut_to_different_ones() -> None:
    samples = first_samples([block(8, 8), block(8, 8)], 4)
    assert sizes_of(samples) == [8, 6, 4, 2]
    assert samples[1]["input_ids"].tolist() == [9, 10, 11, 12, 13, 14]


def test_a_sample_that_is_cut_keeps_a_token_that_is_supervised() -> None:
    samples = first_samples([block(8, 8, masked=6)], 2)
    assert sizes_of(samples) == [8, 7]
    assert samples[1]["labels"].tolist() == [IGNORED] * 6 + [15]


def test_samples_that_teach_nothing_are_passed_over() -> None:
    silent, single = block(6, masked=6), block(1)
    assert sizes_of(first_samples([silent, single, block(5), silent, block(2)], 2)) == [5, 2]


def test_an_endless_stream_is_not_read_to_its_end() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield block(6, 3)

    assert sizes_of(first_samples(endless(), 4)) == [6, 3, 6, 3]


@pytest.mark.parametrize("blocks", [[], [block(4)], [block(4), block(5, masked=5)]])
def test_one_sample_is_too_few(blocks: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"dataset: gives [01] samples? to train on, and batches need two"):
        first_samples(blocks, 4)


def test_padded_on_the_right_and_on_the_left() -> None:
    right, left = layouts(5, 2).padded[0], layouts(5, 2).left[0]
    assert right["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 0, 0, 0, 0, 0, 0]]
    assert left["input_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 6, 7]]
    assert left["attention_mask"].tolist() == [[0] * 3 + [1] * 5, [0] * 6 + [1] * 2]
    assert left["position_ids"].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4], [0] * 7 + [1]]
    assert left["labels"].tolist() == [[IGNORED] * 4 + [2, 3, 4, 5], [IGNORED] * 7 + [7]]


def test_without_any_padding_both_sides_are_the_same() -> None:
    full = Layouts((block(4), block(4)), Collator(0, 1))
    left = full.left[0]
    assert torch.equal(left["input_ids"], full.padded[0]["input_ids"])
    assert left["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("sizes", [(8, 6, 4, 2), (5, 5), (7, 7, 7), (8, 3), (40, 2, 3), (3, 3, 3, 3, 3, 3, 3)])
def test_packed_rows_hold_every_sample_once_and_one_holds_several(sizes: tuple[int, ...]) -> None:
    (batch,) = layouts(*sizes).packed
    expected = sorted(tuple(sample["input_ids"].tolist()) for sample in layouts(*sizes).samples)
    found, several = [], False
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0]
        documents = [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        documents = [document for document in documents if any(document)]  # the others are padding
        several = several or len(documents) > 1
        found += documents
    assert sorted(found) == expected
    assert several
    assert "attention_mask" not in batch
    supervised = sum(int((one["labels"] != IGNORED).sum()) for one in layouts(*sizes).split(1))
    assert int((batch["labels"] != IGNORED).sum()) == supervised == sum(len(ids) - 1 for ids in expected)


def test_small_batches_hold_every_sample_once() -> None:
    batches = layouts(6, 5, 4, 2, 3).split(2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert [batch["input_ids"].shape[1] for batch in batches] == [8, 4, 4]
