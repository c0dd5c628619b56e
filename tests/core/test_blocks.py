"""Blocks give the tokens of their samples, whatever lies under them, and know their numbers without reading them."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from qlora_core.data.blocks import Blocks
from qlora_core.data.collate import IGNORED
from qlora_core.data.pack import pack
from qlora_core.errors import DataError

LISTS = datasets.List(datasets.Value("int32"))
IDS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
LABELS = [[1, IGNORED, 3], [4], [IGNORED, IGNORED], [7, 8, 9, IGNORED]]


def samples(labels: bool = True) -> datasets.Dataset:
    columns = {"input_ids": IDS, "labels": LABELS, "origin": list("abcd")}
    features = {"input_ids": LISTS, "labels": LISTS, "origin": datasets.Value("string")}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return made if labels else made.remove_columns("labels")


def test_without_packs_each_sample_is_a_block() -> None:
    blocks = Blocks(samples())
    assert not blocks.packed
    assert [block["input_ids"].tolist() for block in blocks] == IDS
    assert [block["labels"].tolist() for block in blocks] == LABELS
    assert [block["lengths"] for block in blocks] == [[3], [1], [2], [4]]
    assert set(blocks[0]) == {"input_ids", "labels", "lengths"}
    assert blocks[0]["input_ids"].dtype == blocks[0]["labels"].dtype == np.int32
    assert blocks[0]["input_ids"].flags.writeable
    assert (len(blocks), blocks.samples, blocks.tokens, blocks.lengths.tolist()) == (4, 4, 10, [3, 1, 2, 4])


def test_a_pack_holds_its_samples_one_after_the_other() -> None:
    blocks = Blocks(samples(), pack(np.array([3, 1, 2, 4]), 5))
    assert blocks.packed
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 10]]
    assert [block["labels"].tolist() for block in blocks] == [
        [1, IGNORED, 3, IGNORED, IGNORED],
        [4, 7, 8, 9, IGNORED],
    ]
    assert [block["lengths"] for block in blocks] == [[3, 2], [1, 4]]
    assert (blocks.lengths.tolist(), blocks.tokens, blocks.samples) == ([5, 5], 10, 4)


def test_samples_without_labels_give_blocks_without() -> None:
    block = Blocks(samples(labels=False))[2]
    assert set(block) == {"input_ids", "lengths"}


def test_supervised_tokens_are_counted_but_for_the_first_of_each_sample() -> None:
    assert Blocks(samples()).supervised == 1 + 0 + 0 + 2
    assert Blocks(samples(labels=False)).supervised == 10 - 4
    assert Blocks(samples(), (np.array([0, 1, 3]), np.array([3, 3, 0]))).supervised == 2 + 2 + 1


def test_a_sample_may_stand_in_several_blocks_or_in_none() -> None:
    blocks = Blocks(samples(), (np.array([0, 2, 3]), np.array([2, 0, 2])), packed=True)
    assert [block["input_ids"].tolist() for block in blocks] == [[5, 6, 1, 2, 3], [5, 6]]
    assert (blocks.tokens, blocks.lengths.tolist()) == (7, [5, 2])
    assert not Blocks(samples(), (np.arange(3), np.array([3, 1])), packed=False).packed


def test_selected_blocks_come_in_the_order_asked_for() -> None:
    blocks = Blocks(samples(), pack(np.array([3, 1, 2, 4]), 5))
    chosen = blocks.select([1, 0, 1])
    assert [block["lengths"] for block in chosen] == [[1, 4], [3, 2], [1, 4]]
    assert (chosen.packed, chosen.tokens, chosen.supervised) == (True, 15, 2 + 1 + 2)
    assert len(blocks.select([])) == blocks.select([]).tokens == 0


def test_indices_are_those_of_a_list() -> None:
    blocks = Blocks(samples())
    assert blocks[-1]["input_ids"].tolist() == IDS[-1]
    assert blocks[np.int64(1)]["input_ids"].tolist() == IDS[1]
    for index in (4, -5):
        with pytest.raises(IndexError):
            blocks[index]


def test_shuffled_sliced_and_concatenated_data_sets_are_read_as_they_stand() -> None:
    shuffled = samples().select([3, 1, 0])
    assert [block["input_ids"].tolist() for block in Blocks(shuffled)] == [IDS[3], IDS[1], IDS[0]]
    assert Blocks(shuffled).supervised == 2 + 0 + 1
    both = datasets.concatenate_datasets([samples().select(range(1, 3)), shuffled])
    blocks = Blocks(both, (np.array([0, 3]), np.array([1, 2, 4])))
    assert blocks[0]["input_ids"].tolist() == [*IDS[2], *IDS[3], *IDS[0]]


def test_a_sample_without_tokens_is_refused_where_it_is_used() -> None:
    empty = datasets.Dataset.from_dict({"input_ids": [[1], [], [2]]}, features=datasets.Features({"input_ids": LISTS}))
    with pytest.raises(DataError, match="sample 1 has no tokens"):
        Blocks(empty)
    assert Blocks(empty, (np.arange(3), np.array([0, 2]))).tokens == 2


def test_no_samples_are_no_blocks() -> None:
    none = datasets.Dataset.from_dict({"input_ids": []}, features=datasets.Features({"input_ids": LISTS}))
    blocks = Blocks(none)
    assert (len(blocks), blocks.tokens, blocks.supervised, blocks.lengths.tolist(), list(blocks)) == (0, 0, 0, [], [])


def test_workers_get_a_copy() -> None:
    blocks = pickle.loads(pickle.dumps(Blocks(samples(), pack(np.array([3, 1, 2, 4]), 5))))
    assert blocks[1]["input_ids"].tolist() == [4, 7, 8, 9, 10]


def test_a_block_is_read_from_disk_in_microseconds(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, 1000, size) for size in random.integers(20, 200, 5000)]
    features = datasets.Features({"input_ids": LISTS, "labels": LISTS})
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features).save_to_disk(tmp_path / "rows")
    stored = datasets.load_from_disk(str(tmp_path / "rows"))
    blocks = Blocks(stored, pack(np.array([len(row) for row in rows]), 512))
    started = time.process_time()
    assert sum(len(block["input_ids"]) for block in blocks) == blocks.tokens
    assert (time.process_time() - started) / blocks.samples < 200e-6  # 20 where it was written
