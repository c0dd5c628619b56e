"""Rows become one batch: padding is masked by length, whatever its token id."""

from __future__ import annotations

import pytest
import torch

from qlora_core.data.collate import IGNORED, Collator


def test_rows_of_one_length_need_no_mask() -> None:
    batch = Collator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 4]}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 4]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, 4]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("pad", [0, 2, 7])
def test_padding_is_neither_attended_to_nor_supervised_whatever_its_id(pad: int) -> None:
    batch = Collator(pad_token_id=pad)([{"input_ids": [5, 2, 2]}, {"input_ids": [2]}])
    assert batch["input_ids"].tolist() == [[5, 2, 2], [2, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 2], [IGNORED, IGNORED, IGNORED]]
    assert batch["attention_mask"].dtype == torch.int64


def test_the_end_token_is_supervised_although_it_is_the_padding_too() -> None:
    eos = 2
    batch = Collator(pad_token_id=eos)([{"input_ids": [5, 6, eos]}, {"input_ids": [5, 6, 7, 8, eos]}])
    assert batch["labels"].tolist() == [[IGNORED, 6, eos, IGNORED, IGNORED], [IGNORED, 6, 7, 8, eos]]


def test_labels_of_the_source_are_kept_except_for_the_first_token_which_nothing_predicts() -> None:
    batch = Collator()([{"input_ids": [5, 6, 7], "labels": [5, IGNORED, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, IGNORED, IGNORED]]


def test_arrays_and_tensors_are_taken_like_lists() -> None:
    import numpy as np

    rows = [{"input_ids": np.array([5, 6], dtype=np.int32)}, {"input_ids": torch.tensor([7, 8])}]
    assert Collator()(rows)["input_ids"].tolist() == [[5, 6], [7, 8]]
