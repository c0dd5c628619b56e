"""What every dataset source must keep."""

from __future__ import annotations

import unittest
from typing import Any, Literal

from qlora_core.config import DataConfig
from qlora_core.data.encode import encode_split
from qlora_core.model import load_tokenizer
from qlora_core.testing.conformance import Conformance
from qlora_core.testing.tiny import tiny_config

import datasets  # isort: skip

__all__ = ["DatasetConformance"]

COLUMNS = ({"text"}, {"text", "continues"}, {"input_ids"}, {"input_ids", "labels"})


class DatasetConformance(Conformance):
    """The checks of a dataset source."""

    kind = "dataset"

    def rows(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return the examples of *split* from a new source."""
        examples: datasets.Dataset | None = self.usable().examples(split)
        return examples

    def test_the_training_split_has_rows_of_a_known_schema(self) -> None:
        """the training split is a datasets.Dataset with rows of text, or of input_ids and labels"""
        for split in ("train", "eval"):
            examples: Any = self.rows(split)
            if split == "eval" and examples is None:
                continue
            assert isinstance(examples, datasets.Dataset), f"{split}: a {type(examples).__name__} is no datasets.Dataset"
            assert len(examples) > 0, f"{split}: there are no rows"
            columns = set(examples.column_names)
            assert columns in COLUMNS, f"{split}: the columns are {sorted(columns)}; rows have text, or input_ids and labels"
            for index, row in enumerate(examples):
                self.__check_row(split, index, row)

    def __check_row(self, split: str, index: int, row: dict[str, Any]) -> None:
        if "text" in row:
            assert isinstance(row["text"], str), f"{split}, row {index}: text is {row['text']!r}"
            goes_on = row.get("continues", False)
            assert isinstance(goes_on, bool), f"{split}, row {index}: continues is {goes_on!r}, neither True nor False"
            return
        assert row["input_ids"], f"{split}, row {index}: no tokens"
        assert all(isinstance(i, int) and i >= 0 for i in row["input_ids"]), f"{split}, row {index}: input_ids are no token ids"
        labels = row.get("labels", row["input_ids"])
        assert len(labels) == len(row["input_ids"]), (
            f"{split}, row {index}: {len(labels)} labels for {len(row['input_ids'])} tokens"
        )
        assert all(isinstance(i, int) and (i >= 0 or i == -100) for i in labels), (
            f"{split}, row {index}: labels are neither token ids nor -100"
        )

    def test_two_readings_are_the_same(self) -> None:
        """read twice, with the same options, the rows are the same and in the same order"""
        for split in ("train", "eval"):
            one, two = (self.rows(split) for _ in range(2))
            if one is not None and two is not None:
                assert one.to_list() == two.to_list(), f"{split}: two readings differ; sort files, and seed what is random"

    def test_the_splits_are_disjoint(self) -> None:
        """no row stands in both splits"""
        train, evaluation = self.rows("train"), self.rows("eval")
        if train is None or evaluation is None:
            raise unittest.SkipTest("it has no evaluation split of its own")
        both = {repr(row) for row in train} & {repr(row) for row in evaluation}
        assert not both, f"{len(both)} rows stand in both splits, such as {min(both)[:80]}"

    def test_the_rows_become_blocks(self) -> None:
        """the core makes blocks of tokens of the rows"""
        rows = self.rows("train")
        assert rows is not None, "the training split is None"
        tokens = rows["input_ids"] if "input_ids" in getattr(rows, "column_names", ()) else ()
        data = DataConfig(sequence_length=max([16, *map(len, tokens)]))  # rows of tokens are blocks already, of any length
        blocks = encode_split(self.usable(), "train", load_tokenizer(tiny_config()), data, keep_rest=True)
        assert blocks is not None, "the training split is None"
        assert len(blocks) > 0, "the rows give no block of tokens"
