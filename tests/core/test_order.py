"""The order of training is a function of seed and epoch, groups blocks of similar length, and is kept when a run resumes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from qlora_core.data.blocks import Blocks
from qlora_core.training.order import EpochOrder, FollowEpochs, padding_share, training_order

LENGTHS = np.random.default_rng(0).integers(1, 500, 1003)


def some(n: int, packed: bool = False) -> Blocks:
    return Blocks(datasets.Dataset.from_dict({"input_ids": [[1] * int(k) for k in LENGTHS[:n]]}), packed=packed)


@pytest.mark.parametrize("batch_size", [None, 1, 4, 7, 2000])
def test_every_block_comes_once_and_only_seed_and_epoch_decide_when(batch_size: int | None) -> None:
    order = training_order(LENGTHS, 3, 1, batch_size)
    assert sorted(order.tolist()) == list(range(len(LENGTHS)))
    assert np.array_equal(order, training_order(LENGTHS, 3, 1, batch_size))
    assert not np.array_equal(order, training_order(LENGTHS, 3, 2, batch_size))
    assert not np.array_equal(order, training_order(LENGTHS, 4, 1, batch_size))


def test_no_blocks_have_no_order() -> None:
    assert training_order(LENGTHS[:0], 0, 0, 4).tolist() == training_order(LENGTHS[:0], 0, 0).tolist() == []


def test_batches_hold_similar_lengths_in_no_order_of_length() -> None:
    order = training_order(LENGTHS, 0, 0, 4)
    batches = LENGTHS[order[:1000]].reshape(250, 4)
    spread = batches.max(1) - batches.min(1)
    assert spread.mean() < 10  # 300 if batches were random
    assert abs(np.corrcoef(np.arange(250), batches.mean(1))[0, 1]) < 0.15
    assert batches[0].max() == LENGTHS[order[:1000]].max()  # what does not fit shows at once
    assert batches.max(1).argmax() == 0


def test_other_blocks_share_a_batch_in_another_epoch() -> None:
    first, second = ({frozenset(b) for b in training_order(LENGTHS, 0, e, 4)[:1000].reshape(250, 4).tolist()} for e in (0, 1))
    assert len(first & second) < 5


def test_the_share_of_padding_is_that_of_the_batches() -> None:
    order = training_order(LENGTHS, 0, 0, 8)
    positions = 0
    for start in range(0, len(order), 8):
        batch = LENGTHS[order[start : start + 8]]
        positions += len(batch) * -(-int(batch.max()) // 16) * 16
    assert padding_share(LENGTHS, 8, 16, order) == pytest.approx(1 - LENGTHS.sum() / positions, abs=1e-12)
    assert padding_share(np.array([4, 2, 3]), 2) == pytest.approx(1 - 9 / 11)
    assert padding_share(LENGTHS[:0], 8) == 0


def test_grouping_by_length_spares_most_of_the_padding() -> None:
    assert padding_share(LENGTHS, 8, 8, training_order(LENGTHS, 0, 0)) > 0.4
    assert padding_share(LENGTHS, 8, 8, training_order(LENGTHS, 0, 0, 8)) < 0.05


def test_packed_blocks_come_in_random_order_and_others_grouped() -> None:
    packed, alone = EpochOrder(some(100, packed=True), 4, 7), EpochOrder(some(100), 4, 7)
    assert list(packed) == training_order(LENGTHS[:100], 7, 0).tolist()
    assert list(alone) == training_order(LENGTHS[:100], 7, 0, 4).tolist()
    assert len(packed) == len(alone) == 100


def loader(order: EpochOrder, processes: int, process: int) -> Any:
    loader = torch.utils.data.DataLoader(list(range(len(order))), batch_size=2, sampler=order)
    return prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_epoch_has_its_order_and_a_resumed_one_goes_on_in_it(processes: int) -> None:
    """With several processes, accelerate's set_epoch does not reach the sampler of a resumed loader: FollowEpochs does."""
    accelerate.PartialState()
    blocks = some(16, packed=True)

    def epoch(number: int, skipped: int = 0) -> list[list[int]]:
        streams = []
        for process in range(processes):
            order = EpochOrder(blocks, 2 * processes, 5)
            follow, batches = FollowEpochs(order), loader(order, processes, process)
            begun = number + 0.25 if skipped else float(number)
            follow.on_epoch_begin(None, SimpleNamespace(epoch=begun), None)
            batches = accelerate.skip_first_batches(batches, skipped) if skipped else batches
            batches.set_epoch(number)  # as the Trainer does
            streams.append([batch.tolist() for batch in batches])
        return [batch for together in zip(*streams, strict=True) for batch in together]

    for number in (0, 1, 2):
        whole = epoch(number)
        assert [index for batch in whole for index in batch] == training_order(LENGTHS[:16], 5, number).tolist()
        assert epoch(number, skipped=3) == whole[3 * processes :]
