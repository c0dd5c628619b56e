"""The first rows of a source, and the stages of a dry run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_core import DataError, DatasetSource
from qlora_core.rehearsal import BLOCKS, CHARACTERS, FEW, ROWS, first_rows
from qlora_core.stages import Stage, Stages
from qlora_records import Records
from qlora_text import TextFile


class Listed(DatasetSource):
    """A source without a stream of its own."""

    name = "listed"
    rows: Any = ()

    def examples(self, split: str) -> Any:
        return datasets.Dataset.from_list(self.rows) if split == "train" else None


class Lazy(Listed):
    """A source that can be read row by row, and only so."""

    name = "lazy"
    read = 0

    def examples(self, split: str) -> Any:
        raise AssertionError("all rows are asked for")

    def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
        for index, row in enumerate(self.rows):
            type(self).read = index + 1
            yield row, index + 1


def listed(kind: type[Listed], rows: list[dict[str, Any]]) -> Listed:
    source = kind()
    source.rows = rows
    return source


@pytest.mark.parametrize("kind", [Listed, Lazy])
def test_only_the_first_rows_come_and_as_they_are(kind: type[Listed]) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(2000)]
    source = first_rows(listed(kind, rows), 512)
    assert type(source) is kind
    found = source.examples("train")
    assert found is not None
    assert found.to_list() == rows[:ROWS]


def test_of_a_source_that_can_stream_no_more_is_read() -> None:
    Lazy.read = 0
    first_rows(listed(Lazy, [{"prompt": "x" * 5000, "completion": "y"}] * 2000), 32).examples("train")
    assert Lazy.read == FEW
    first_rows(listed(Lazy, [{"text": "long " * 5000}] * 2000), 32).examples("train")
    assert Lazy.read == 1


def test_a_text_is_cut_to_what_fills_the_blocks(tmp_path: Path) -> None:
    text = "word " * 100_000
    (tmp_path / "a.txt").write_text(text)
    options = {"path": str(tmp_path / "a.txt"), "eval_path": str(tmp_path / "a.txt")}
    whole, first = TextFile(**options), first_rows(TextFile(**options), 128)
    for split in ("train", "eval"):
        (row,) = first.examples(split).to_list()
        assert row == {**whole.examples(split)[0], "text": text[: BLOCKS[split] * 128 * CHARACTERS]}
    assert first_rows(TextFile(path=options["path"]), 128).examples("eval") is None


def test_chats_come_back_as_they_are(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}}]
    turns = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": "Add"}, {"role": "assistant", "content": None, "tool_calls": calls}],
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    whole = Records(path=str(path)).examples("train")
    found = first_rows(Records(path=str(path)), 128).examples("train")
    assert [list(row["messages"]) for row in found] == [list(row["messages"]) for row in whole] == turns
    assert found["origin"] == whole["origin"]


def test_token_ids_stay_whole_numbers() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    found = first_rows(listed(Lazy, rows), 128).examples("train")
    assert found.to_list() == rows
    assert found.features["input_ids"] == datasets.List(datasets.Value("int64"))


def test_where_a_stream_fails_the_examples_have_the_last_word() -> None:
    class Cached(Listed):
        name = "cached"

        def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
            raise DataError("no network")

    found = first_rows(listed(Cached, [{"text": "kept"}]), 128).examples("train")
    assert found.to_list() == [{"text": "kept"}]


def test_stages_that_take_turns_are_told_when_another_kind_begins() -> None:
    told: list[Stage] = []
    stages = Stages(told.append)
    for name in ("inject", "step", "checkpoint", "step", "step", "checkpoint"):
        stages.begin(name)
    assert [stage.name for stage in told] == ["inject"]
    stages.begin("save")
    assert [stage.name for stage in told] == ["inject", "step", "checkpoint"]
    stages.begin("step")
    stages.begin("evaluate")
    stages.begin("step")
    stages.end(failed=True)
    assert [(stage.name, stage.failed) for stage in told[3:]] == [("save", False), ("evaluate", False), ("step", True)]
    assert stages.done == told
