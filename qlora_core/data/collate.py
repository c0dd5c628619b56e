"""Put blocks into one batch of tensors. Padding is masked by length, never by token id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["IGNORED", "Collator"]

IGNORED = -100  # the label of a token that is not supervised


@dataclass(frozen=True)
class Collator:
    """Makes `input_ids` and `labels` (B, T) int64, and `attention_mask` (B, T) int64 where a row is padded.

    `pad_token_id` fills rows on the right; any id will do, since padding is neither attended to nor supervised.
    The first token of a row has no label: nothing predicts it.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of *rows*, each with `input_ids` and optionally `labels`."""
        lengths = [len(row["input_ids"]) for row in rows]
        shape = len(rows), max(lengths)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            input_ids[index, :length] = ids
            labels[index, :length] = torch.as_tensor(row["labels"], dtype=torch.int64) if "labels" in row else ids
        labels[:, 0] = IGNORED
        batch = {"input_ids": input_ids, "labels": labels}
        if min(lengths) < shape[1]:
            batch["attention_mask"] = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch
