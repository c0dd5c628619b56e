"""What every dataset source must keep."""

from __future__ import annotations

import json
import unittest
from typing import Any, Literal

from qlora_core.config import DataConfig
from qlora_core.data.encode import encode_split
from qlora_core.model import load_tokenizer
from qlora_core.testing.conformance import Conformance
from qlora_core.testing.tiny import tiny_config

import datasets  # isort: skip

__all__ = ["DatasetConformance"]

COLUMNS: tuple[tuple[set[str], set[str]], ...] = (
    ({"text"}, {"continues"}),
    ({"prompt", "completion"}, {"system"}),
    ({"messages"}, {"tools"}),
    ({"input_ids"}, {"labels"}),
)
"""The sets of columns that rows may have: those that are needed, and those that may stand beside them, as `origin` may."""


class DatasetConformance(Conformance):
    """The checks of a dataset source."""

    kind = "dataset"

    def rows(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return the examples of *split* from a new source."""
        examples: datasets.Dataset | None = self.usable().examples(split)
        return examples

    def test_the_training_split_has_rows_of_a_known_schema(self) -> None:
        """the splits are datasets.Datasets with rows of text, prompt and completion, messages, or input_ids and labels"""
        for split in ("train", "eval"):
            examples: Any = self.rows(split)
            if split == "eval" and examples is None:
                continue
            assert isinstance(examples, datasets.Dataset), f"{split}: a {type(examples).__name__} is no datasets.Dataset"
            assert len(examples) > 0, f"{split}: there are no rows"
            columns = set(examples.column_names)
            assert any(needed <= columns <= needed | optional | {"origin"} for needed, optional in COLUMNS), (
                f"{split}: the columns are {sorted(columns)}; rows have text, or prompt and completion, or messages, "
                "or input_ids and labels"
            )
            for index, row in enumerate(examples):
                self.__check_row(split, index, row)

    def __check_row(self, split: str, index: int, row: dict[str, Any]) -> None:
        where = f"{split}, row {index}"
        for name in ("text", "prompt", "completion", "origin"):
            assert isinstance(row.get(name, ""), str), f"{where}: {name} is {row[name]!r}"
        system = row.get("system")
        assert system is None or isinstance(system, str), f"{where}: system is {system!r}"
        goes_on = row.get("continues", False)
        assert isinstance(goes_on, bool), f"{where}: continues is {goes_on!r}, neither True nor False"
        if "messages" in row:
            self.__check_chat(where, row["messages"], row.get("tools"))
        if "input_ids" in row:
            self.__check_tokens(where, row["input_ids"], row.get("labels"))

    def __check_chat(self, where: str, messages: Any, tools: Any) -> None:
        assert isinstance(messages, list), f"{where}: messages is {messages!r}, not a list"
        assert messages, f"{where}: no messages"
        for turn in messages:
            assert isinstance(turn, dict), f"{where}: a message is {turn!r}, not {{role, content}}"
            assert isinstance(turn.get("role"), str), f"{where}: a message has the role {turn.get('role')!r}"
            assert "content" in turn or turn.get("tool_calls"), f"{where}: a message has neither content nor tool_calls"
        assert tools is None or isinstance(tools, list), f"{where}: tools is {tools!r}, neither a list nor None"
        for tool in tools or ():
            assert isinstance(tool, dict), f"{where}: a tool is {tool!r}, no description of a function"

    def __check_tokens(self, where: str, input_ids: Any, labels: Any) -> None:
        assert input_ids, f"{where}: no tokens"
        assert all(isinstance(i, int) and i >= 0 for i in input_ids), f"{where}: input_ids are no token ids"
        labels = input_ids if labels is None else labels
        assert len(labels) == len(input_ids), f"{where}: {len(labels)} labels for {len(input_ids)} tokens"
        assert all(isinstance(i, int) and (i >= 0 or i == -100) for i in labels), (
            f"{where}: labels are neither token ids nor -100"
        )

    def test_two_readings_are_the_same(self) -> None:
        """read twice, with the same options, the rows are the same and in the same order"""
        for split in ("train", "eval"):
            one, two = (self.rows(split) for _ in range(2))
            if one is not None and two is not None:
                same = [self.__told(row) for row in one] == [self.__told(row) for row in two]
                assert same, f"{split}: two readings differ; sort files, and seed what is random"

    def test_a_stream_gives_the_same_rows_and_goes_on_from_any_position(self) -> None:
        """a stream gives the rows of the training split, and from a position that JSON holds those after it"""
        examples = self.rows("train")
        assert examples is not None, "the training split is None"
        expected = [self.__told(row) for row in examples]
        streamed = list(self.usable().stream())
        assert [self.__told(row) for row, _ in streamed] == expected, (
            "the rows of the stream are not those of the training split"
        )
        for count in sorted({1, max(1, len(streamed) // 2), len(streamed)}):
            position = json.loads(json.dumps(streamed[count - 1][1]))
            rest = [self.__told(row) for row, _ in self.usable().stream(position)]
            assert rest == expected[count:], f"from the position after row {count} on, the stream gives other rows"

    @staticmethod
    def __told(row: dict[str, Any]) -> dict[str, Any]:
        """Return *row* without the keys that say nothing, and without its origin: each source has an example of its own."""
        return {name: value for name, value in row.items() if value is not None and name != "origin"}

    def test_the_splits_are_disjoint(self) -> None:
        """no row stands in both splits"""
        train, evaluation = self.rows("train"), self.rows("eval")
        if train is None or evaluation is None:
            raise unittest.SkipTest("it has no evaluation split of its own")
        both = {repr(self.__told(row)) for row in train} & {repr(self.__told(row)) for row in evaluation}
        assert not both, f"{len(both)} rows stand in both splits, such as {min(both)[:80]}"

    def test_the_rows_become_blocks(self) -> None:
        """the core makes blocks of tokens of the rows, and its gate finds no error in them"""
        data = DataConfig(sequence_length=2**16, template="plain")  # a template that needs no token of its own
        blocks = encode_split(self.usable(), "train", load_tokenizer(tiny_config()), data)
        assert blocks is not None, "the training split is None"
        assert len(blocks) > 0, "the rows give no block of tokens"
