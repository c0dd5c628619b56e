"""The same samples as batches in several layouts: padded on either side, in smaller batches, packed. Imported late."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qlora_core.data.collate import Collator
from qlora_core.data.mask import IGNORED
from qlora_core.data.pack import pack
from qlora_core.errors import DataError

__all__ = ["Layouts", "first_samples"]

Sample = dict[str, Any]
"""`input_ids` (T,) int32, `labels` (T,) int32 where some tokens are not supervised, `lengths`: [T]."""
Batch = dict[str, Any]

ALIKE = 0.75  # where the shortest is as long as so much of the longest, samples are cut to different lengths


def first_samples(blocks: Iterable[dict[str, Any]], rows: int) -> tuple[Sample, ...]:
    """Return the first *rows* samples of *blocks* that teach something, or as many as there are, of different lengths.

    Samples of about one length, as the pieces of a text are, would need no padding and weigh the same in every batch, which
    hides what is wrong with either. So of n such samples the second keeps (n - 1) / n of its tokens, the third (n - 2) / n, ...
    Raises DataError where there are fewer than two.
    """
    usable = (sample for block in blocks for sample in _samples(block) if _first(sample))
    samples = tuple(itertools.islice(usable, rows))
    if len(samples) < 2:
        raise DataError(f"dataset: gives {len(samples)} sample to train on, and batches need two; name more data")
    sizes = [len(sample["input_ids"]) for sample in samples]
    if min(sizes) < ALIKE * max(sizes):
        return samples
    return tuple(_cut(sample, len(samples) - index, len(samples)) for index, sample in enumerate(samples))


@dataclass(frozen=True)
class Layouts:
    """The same samples as the batches of a step, in each layout that must make no difference."""

    samples: tuple[Sample, ...]
    collator: Collator
    """Of training without packing."""

    @property
    def padded(self) -> list[Batch]:
        """One batch, padded on the right, as training without packing makes it."""
        return self.split(len(self.samples))

    def split(self, size: int) -> list[Batch]:
        """Return batches of *size* samples each."""
        return [self.collator(self.samples[start : start + size]) for start in range(0, len(self.samples), size)]

    @property
    def left(self) -> list[Batch]:
        """One batch, padded on the left, with the positions that its mask says."""
        (batch,) = self.padded
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))  # (B, T)
        shifts = (real.shape[1] - real.sum(dim=1)).tolist()

        def moved(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])

        moves = {"input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": real}
        left = {name: moved(rows) for name, rows in moves.items()}
        return [{**left, "position_ids": (left["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}]

    @property
    def packed(self) -> list[Batch]:
        """One batch of about two rows, at least one of which holds several samples, as packed training makes it."""
        lengths = np.array([len(sample["input_ids"]) for sample in self.samples])
        capacity = max(lengths.max(), -(-lengths.sum() // 2), np.sort(lengths)[:2].sum())
        offsets, indices = pack(lengths, int(capacity))
        rows = [_joined([self.samples[i] for i in indices[start:stop]]) for start, stop in itertools.pairwise(offsets)]
        return [replace(self.collator, packed=True, longest=None)(rows)]


def _samples(block: dict[str, Any]) -> Iterator[Sample]:
    ends = np.cumsum(block["lengths"])
    for end, length in zip(ends.tolist(), block["lengths"], strict=True):
        yield {
            **{name: block[name][end - length : end] for name in ("input_ids", "labels") if name in block},
            "lengths": [int(length)],
        }


def _first(sample: Sample) -> int:
    """Return the index of the first supervised token; 0, which nothing predicts, where there is none."""
    labels = np.asarray(sample.get("labels", sample["input_ids"]))[1:]
    supervised = np.flatnonzero(labels != IGNORED)
    return int(supervised[0]) + 1 if len(supervised) else 0


def _cut(sample: Sample, part: int, of: int) -> Sample:
    """Return *sample* with that part of its tokens; one that is supervised stays."""
    size = max(len(sample["input_ids"]) * part // of, _first(sample) + 1)
    return {**{name: values[:size] for name, values in sample.items() if name != "lengths"}, "lengths": [size]}


def _joined(samples: Sequence[Sample]) -> Sample:
    arrays = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0] if name != "lengths"}
    return {**arrays, "lengths": [length for sample in samples for length in sample["lengths"]]}
