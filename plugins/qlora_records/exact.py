"""JSON in Arrow that comes back as it was. Heavy: imports datasets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import datasets

from qlora_records.json_text import from_text

__all__ = ["ExactJson"]


@dataclass
class ExactJson(datasets.Json):  # type: ignore[misc]
    """The feature `datasets.Json` for objects, read by Python's parser.

    That of `datasets` reads 0.7 as 0.7000000000000001, which a model would then learn to write, and no number beyond 64 bits.
    Files say `Json`, so that anybody reads them.
    """

    def encode_example(self, example_data: Any) -> str | None:
        """Return an object as JSON text; text is JSON already, `datasets` encodes some values twice."""
        if example_data is None or isinstance(example_data, str):
            return example_data
        return json.dumps(example_data, ensure_ascii=False, default=str)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """Return what the JSON text holds; `datasets` encodes once more what its own parser can't read."""
        return from_text(example_data)
