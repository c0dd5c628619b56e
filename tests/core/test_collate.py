"""Rows become one batch: padding is masked by length, whatever its token id."""

from __future__ import annotations

import pytest
import torch

from qlora_core.data.collate import IGNORED, REAL_TOKENS, Collator


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


# Packed rows


def test_packed_rows_restart_their_positions_and_take_no_mask_and_no_cache() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "lengths": [3, 1]}, {"input_ids": [8, 9], "lengths": [2]}]
    batch = Collator(pad_token_id=1, pad_to_multiple_of=3)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch["use_cache"] is False
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 1], [8, 9, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch["position_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, IGNORED], [IGNORED, 9] + [IGNORED] * 4]


def test_the_labels_of_each_samples_first_token_and_of_the_padding_are_ignored() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, IGNORED, 8, 9], "lengths": [2, 1, 2]}]
    assert Collator(pad_token_id=9, pad_to_multiple_of=8)(rows)["labels"].tolist() == [
        [IGNORED, 6, IGNORED, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    ]


def test_the_form_of_a_packed_data_set_does_not_vary_from_batch_to_batch() -> None:
    single = [{"input_ids": [5, 6], "lengths": [2]}]
    assert set(Collator(packed=True)(single)) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert set(Collator()(single)) == {"input_ids", "labels"}


def test_rows_of_one_sample_are_padded_to_the_multiple_and_masked_by_length() -> None:
    batch = Collator(pad_token_id=6, pad_to_multiple_of=4)([{"input_ids": [5, 6, 6], "lengths": [3]}])
    assert batch["input_ids"].tolist() == [[5, 6, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert "attention_mask" not in Collator(pad_to_multiple_of=3)([{"input_ids": [5, 6, 6], "lengths": [3]}])


def test_real_tokens_are_counted_per_row_when_asked() -> None:
    rows = [{"input_ids": [5, 0, 0, 8], "lengths": [3, 1]}, {"input_ids": [0, 9], "lengths": [2]}]
    assert Collator(pad_to_multiple_of=8, count=True)(rows)[REAL_TOKENS].tolist() == [4, 2]


def test_accelerate_takes_a_batch_with_a_bool_in_it() -> None:
    from accelerate.utils import find_batch_size, send_to_device
    from transformers.trainer_pt_utils import find_batch_size as find_batch_size_too

    batch = Collator(packed=True)([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert send_to_device(batch, torch.device("cpu"))["use_cache"] is False
    assert find_batch_size(batch) == find_batch_size_too(batch) == 2
    loader = torch.utils.data.DataLoader([{"input_ids": [5, 6]}] * 2, collate_fn=Collator(packed=True), num_workers=1)
    assert [loaded["use_cache"] for loaded in loader] == [False, False]


def test_no_row_is_padded_beyond_the_longest_that_a_model_may_take() -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": list(range(9))}]
    assert Collator(0, 8)(rows)["input_ids"].shape == (2, 16)
    assert Collator(0, 8, longest=10)(rows)["input_ids"].shape == (2, 10)
    assert Collator(0, 8, longest=5)(rows)["input_ids"].shape == (2, 9)
