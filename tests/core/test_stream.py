"""Blocks of a stream: the same on every pass, and after going on from what a checkpoint holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from qlora_core.config import DataConfig
from qlora_core.data.encode import encode
from qlora_core.data.stream import StreamedBlocks
from qlora_core.errors import ConfigError, DataError
from qlora_core.providers import DatasetSource

LENGTH = 32


class Counted(DatasetSource):
    """Prompts by number; keeps which were read."""

    name = "counted"
    rows = 300
    read: list[int]
    bad: int | None = None

    def examples(self, split: str) -> None:
        return None

    def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
        for index in range(position or 0, self.rows):
            self.read.append(index)
            text = "" if index == self.bad else f"row {index} " * (1 + index % 7)
            yield {"prompt": "Say it.", "completion": text, "origin": f"counted:{index + 1}"}, index + 1


@pytest.fixture
def tokenizer(tiny_model: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def data(**changes: Any) -> DataConfig:
    base = {"sequence_length": LENGTH * 4, "eval_fraction": 0.0, "streaming": True, "buffer": 40, "gate_rows": 10}
    return DataConfig(**{**base, "template": "none", **changes})


def source(**changes: Any) -> Counted:
    made = Counted()
    made.read = []
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def blocks(of: StreamedBlocks, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    taken = itertools.islice(iter(of), count)
    return [(block["input_ids"].tolist(), block["labels"].tolist(), block["lengths"]) for block in taken]


def test_the_same_seed_gives_the_same_blocks_and_another_another_order(tokenizer: Any) -> None:
    first, again, other = (blocks(encode(source(), tokenizer, data(), seed=seed).train, 40) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_pass_gives_every_row_once_and_then_begins_anew(tokenizer: Any) -> None:
    train = encode(source(rows=50), tokenizer, data(packing=False, buffer=50)).train
    passes = [sorted(ids for ids, _, _ in blocks(train, 100)[start : start + 50]) for start in (0, 50)]
    assert passes[0] == passes[1]
    assert len({tuple(ids) for ids in passes[0]}) == 50


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 7, 23, 41])
def test_going_on_from_a_state_gives_what_would_have_come_and_reads_nothing_again(
    tokenizer: Any, packing: bool, taken: int
) -> None:
    whole = encode(source(), tokenizer, data(packing=packing)).train
    expected = blocks(whole, 60)
    first = encode(source(), tokenizer, data(packing=packing)).train
    reader = iter(first)
    for _ in range(taken + 3):  # as a loader does, which is ahead of what is trained
        next(reader)
    state = json.loads(json.dumps(first.state_after(taken), default=lambda array: array.tolist()))
    for block in state["pending"]:
        block |= {name: np.array(block[name], np.int32) for name in ("input_ids", "labels")}
    resumed = encode(new := source(), tokenizer, data(packing=packing)).train
    new.read.clear()
    resumed.restore(state)
    assert blocks(resumed, 60 - taken) == expected[taken:]
    if taken and new.read:
        assert new.read[0] == state["streams"][0]["position"]


@pytest.mark.parametrize("ahead", [0, 9_000])  # as many blocks as a step of batch size times accumulation reads at once
def test_a_moment_is_known_however_far_a_loader_has_read_on_and_forgotten_once_it_is_past(tokenizer: Any, ahead: int) -> None:
    train = encode(source(), tokenizer, data(packing=False)).train
    reader = iter(train)
    taken = 50
    expected = [next(reader)["input_ids"].tolist() for _ in range(taken + 5)][taken:]
    for _ in range(ahead):
        next(reader)
    state = train.state_after(taken)
    assert len(train._moments) == 1 + 5 + ahead
    train.restore(state)
    assert [ids for ids, _, _ in blocks(train, 5)] == expected


def test_the_gate_sees_the_first_rows_before_and_each_later_row_as_it_comes(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="counted:6: the completion is empty"):
        encode(source(bad=5), tokenizer, data())
    train = encode(source(bad=100), tokenizer, data()).train
    with pytest.raises(DataError, match="counted:101: empty: the completion is empty; mend the row in place"):
        blocks(train, 200)
    skipping = encode(source(bad=100, rows=120), tokenizer, data(on_problem="skip", packing=False, buffer=119)).train
    assert len({tuple(ids) for ids, _, _ in blocks(skipping, 119)}) == 119


def test_no_more_rows_are_read_before_training_than_the_gate_sees(tokenizer: Any) -> None:
    encode(made := source(), tokenizer, data(gate_rows=10))
    assert max(made.read) <= 10 + 128


def test_text_goes_on_in_the_middle_of_a_document(tokenizer: Any, text_file: Path) -> None:
    from qlora_text import TextFile

    settings = data(buffer=8)
    expected = [
        block["input_ids"].tolist()
        for block in itertools.islice(iter(encode(TextFile(path=str(text_file)), tokenizer, settings).train), 60)
    ]
    first = encode(TextFile(path=str(text_file)), tokenizer, settings).train
    for _ in itertools.islice(iter(first), 30):
        pass
    resumed = encode(TextFile(path=str(text_file)), tokenizer, settings).train
    resumed.restore(first.state_after(20))
    assert [block["input_ids"].tolist() for block in itertools.islice(iter(resumed), 40)] == expected[20:]


def test_a_mix_takes_its_shares_of_every_buffer(tokenizer: Any) -> None:
    text = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]] * 30})

    class Tokens(DatasetSource):
        name = "tokens"

        def examples(self, split: str) -> datasets.Dataset | None:
            return text if split == "train" else None

    for weights, expected in (((3.0, 1.0), 50), ((99.0, 1.0), 2), ((1.0, 9.0), 180)):
        mix = [(source(), weights[0]), (Tokens(), weights[1])]
        window = blocks(encode(mix, tokenizer, data(packing=False, buffer=40)).train, 200)
        assert sum(ids == [5, 6, 7] for ids, _, _ in window) == expected


def test_training_rows_that_are_held_out_too_are_found_among_the_first(tokenizer: Any) -> None:
    held_out = datasets.Dataset.from_dict({"prompt": ["Say it."] * 2, "completion": ["row 0 ", "no such row"]})

    class Both(Counted):
        def examples(self, split: str) -> datasets.Dataset | None:
            return held_out if split == "eval" else None

    made = Both()
    made.read = []
    found = encode(made, tokenizer, data()).findings["train"]["overlap"]
    assert (found.count, found.examples) == (1, ["counted:1"])


def test_what_a_stream_can_not_hold_out_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: a stream has no end to hold out"):
        encode(source(), tokenizer, data(eval_fraction=0.1))


def test_an_empty_stream_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="gives no rows"):
        encode(source(rows=0), tokenizer, data())
