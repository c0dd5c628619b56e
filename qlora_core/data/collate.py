"""Put blocks into one batch of tensors. Padding is known by length, never by token id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_core.data.mask import IGNORED

__all__ = ["IGNORED", "REAL_TOKENS", "Collator"]

REAL_TOKENS = "real_tokens"  # the key of a batch that no model takes


@dataclass(frozen=True)
class Collator:
    """Makes `input_ids` and `labels` (B, T) int64 of blocks, padded on the right; `model(**batch)` is right as it stands.

    - Rows of one sample each: `attention_mask` (B, T) int64 where a row is padded.
    - Packed rows, and all rows of a *packed* data set: `position_ids` (B, T) int64 from 0 for each sample and for the padding,
      which is one more document; no attention mask, and `use_cache` False. transformers keeps documents apart by their
      positions only if it is given neither a mask nor a cache, and a model makes a cache unless told not to.

    The first token of a sample has no label: nothing predicts it. *pad_token_id* may be any id, EOS too, since padding is
    neither supervised nor attended to by what is before it. *count* adds `real_tokens` (B,) int64, the tokens of each row
    that are no padding, which no model takes: whoever asks for it takes it out. No row is padded beyond *longest* tokens,
    since a model may have no more positions.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1
    packed: bool = False
    count: bool = False
    longest: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of *rows*: each has `input_ids`, and may have `labels` and the `lengths` of its samples."""
        sizes = [len(row["input_ids"]) for row in rows]
        width = -(-max(sizes) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.longest is not None:
            width = max(max(sizes), min(width, self.longest))
        documents = [[int(length) for length in row.get("lengths", [size])] for row, size in zip(rows, sizes, strict=True)]
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for index, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            input_ids[index, :size] = ids
            labels[index, :size] = torch.as_tensor(row["labels"], dtype=torch.int64) if "labels" in row else ids
            starts = torch.tensor([0, *documents[index][:-1]]).cumsum(0)
            labels[index, starts] = IGNORED
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if self.packed or any(len(lengths) > 1 for lengths in documents):
            batch["position_ids"] = torch.stack([_positions(lengths, width) for lengths in documents])
            batch["use_cache"] = False
        elif min(sizes) < width:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(sizes)[:, None]).long()
        if self.count:
            batch[REAL_TOKENS] = torch.tensor(sizes, dtype=torch.int64)
        return batch


def _positions(lengths: list[int], width: int) -> torch.Tensor:
    """Return positions (width,) int64 that restart at 0 for each document and for what is left."""
    rest = width - sum(lengths)
    return torch.cat([torch.arange(length) for length in [*lengths, rest]])
