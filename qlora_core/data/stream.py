"""Blocks made while training, of data that is stored nowhere: read, encode, judge, pack within a buffer, shuffle, go on.

What is held between two blocks is small and can be written down, so that a resumed run seeks and gets the same blocks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from qlora_core.calls import calling
from qlora_core.config import DataConfig
from qlora_core.data import gate
from qlora_core.data.encoder import Encoder
from qlora_core.data.findings import FINDINGS
from qlora_core.data.pack import pack
from qlora_core.data.samples import Sample, table_of
from qlora_core.errors import DataError
from qlora_core.providers import DatasetSource

__all__ = ["Stream", "StreamedBlocks", "first_rows"]

PIECES = 4  # rows per call of the tokenizer where each is a piece of a file of 64 Ki characters


@dataclass(frozen=True)
class Stream:
    """A source with its encoder, and its share of the samples."""

    source: DatasetSource
    encoder: Encoder
    weight: float = 1.0

    def batches(self, state: dict[str, Any]) -> Iterator[list[Sample]]:
        """Yield samples from *state* on, for ever: after the last row comes the first; *state* is what comes after them."""
        while True:
            self.encoder.state = state["encoder"]
            for rows, position in self.rows(state["position"]):
                samples = list(self.encoder.encode(_columns(rows), state["row"]))
                state |= {"position": position, "row": state["row"] + len(rows), "encoder": self.encoder.state}
                yield samples
            if state["row"] == 0:
                raise DataError(f"dataset: {self.source.name!r} gives no rows; the data is empty")
            rest = list(self.encoder.finish())
            state |= _beginning()
            yield rest

    def rows(self, position: Any = None) -> Iterator[tuple[list[dict[str, Any]], Any]]:
        """Yield as many rows as the encoder takes at once, and the position after them."""
        with calling(self.source, "stream"):
            reader = iter(self.source.stream(position))
        size = PIECES if self.encoder.continuous else min(self.encoder.rows, self.encoder.data.buffer)
        while True:
            with calling(self.source, "stream"):
                batch = list(itertools.islice(reader, size))
            if not batch:
                return
            yield [row for row, _ in batch], batch[-1][1]


class StreamedBlocks(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Endless blocks of *streams*; the same seed gives the same blocks, also after `restore`."""

    packed: bool

    def __init__(self, streams: Sequence[Stream], data: DataConfig, *, labelled: bool, seed: int) -> None:
        self.streams = list(streams)
        self.data = data
        self.packed = data.packing
        self.labelled = labelled
        self.seed = seed
        held = {**_beginning(), "surplus": [], "owed": 0.0}
        self._start: dict[str, Any] = {"window": 0, "streams": [dict(held) for _ in streams], "pending": []}
        self._moments: deque[tuple[int, dict[str, Any], list[dict[str, Any]], int]] = deque()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield blocks: input_ids (T,) int32, labels (T,) int32 where some tokens are not supervised, lengths of samples."""
        state = {"window": self._start["window"], "streams": [dict(stream) for stream in self._start["streams"]]}
        readers = [stream.batches(held) for stream, held in zip(self.streams, state["streams"], strict=True)]
        blocks, taken = list(self._start["pending"]), 0
        self._moments.clear()
        while True:
            after = {"window": state["window"], "streams": [dict(stream) for stream in state["streams"]]}
            for index, block in enumerate(blocks):
                taken += 1
                self._moments.append((taken, after, blocks, index + 1))
                yield block
            blocks = self._window(readers, state)

    def state_after(self, taken: int) -> dict[str, Any]:
        """Return what `restore` needs to go on after *taken* blocks: JSON-ready, but for arrays. Forgets what was before."""
        self.forget(taken)
        if taken == 0:
            return self._start
        _, after, blocks, index = self._moments[0]
        return {**after, "pending": blocks[index:]}

    def forget(self, taken: int) -> None:
        """Forget the moments before *taken* blocks, which are trained; those after it, however far a loader reads on, stay."""
        while self._moments and self._moments[0][0] < taken:
            self._moments.popleft()

    def restore(self, state: dict[str, Any]) -> None:
        """Begin the next iteration where *state* was taken."""
        self._start = state

    def _window(self, readers: list[Iterator[list[Sample]]], state: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the blocks of the next samples, of each stream its share, in an order that only the seed decides."""
        total = sum(stream.weight for stream in self.streams)
        items: list[dict[str, Any]] = []
        for stream, reader, held in zip(self.streams, readers, state["streams"], strict=True):
            share = held["owed"] + self.data.buffer * stream.weight / total
            held["owed"] = share - int(share)
            items += self._taken(reader, int(share), stream, held)
        if not items:  # a buffer smaller than there are streams
            return []
        lengths = np.array([len(item["input_ids"]) for item in items], np.int64)
        bounds, chosen = np.arange(len(items) + 1), np.arange(len(items))
        if self.packed:
            bounds, chosen = pack(lengths, self.data.sequence_length)
        order = np.random.default_rng([self.seed, state["window"]]).permutation(len(bounds) - 1)
        state["window"] += 1
        return [_joined([items[i] for i in chosen[bounds[index] : bounds[index + 1]]]) for index in order]

    def _taken(self, reader: Iterator[list[Sample]], wanted: int, stream: Stream, held: dict[str, Any]) -> list[dict[str, Any]]:
        """Return *wanted* samples that can be used; *held* keeps those of the last batch that are too many."""
        items, refused = list(held["surplus"]), 0
        while len(items) < wanted:
            for sample in next(reader):
                if self._usable(sample, stream):
                    items.append(self._item(sample))
                else:
                    refused += 1
            if not items and refused > self.data.gate_rows:
                raise DataError(f"dataset: {stream.source.name!r}: none of {refused:,} rows in turn can be used")
        held["surplus"] = items[wanted:]
        return items[:wanted]

    def _usable(self, sample: Sample, stream: Stream) -> bool:
        errors = [problem for problem in sample.problems if FINDINGS[problem.partition(":")[0]].error]
        if errors and self.data.on_problem == "error":
            raise DataError(
                f"dataset: {stream.source.name!r}: {sample.origin}: {errors[0]}; mend the row in place, or set "
                "data.on_problem, and go on with --resume"
            )
        return bool(sample.supervised) and (not errors or self.data.on_problem == "warn")

    def _item(self, sample: Sample) -> dict[str, Any]:
        labels = {"labels": sample.ids if sample.labels is None else sample.labels} if self.labelled else {}
        return {"input_ids": sample.ids, **labels, "lengths": [len(sample.ids)]}


def first_rows(stream: Stream, rows: int, *, labelled: bool) -> tuple[datasets.Dataset, str]:
    """Return the samples of the first *rows* rows, in memory, for the gate, and a SHA-256 of their digests."""
    tables: list[pa.RecordBatch] = []
    seen, stream.encoder.state = 0, None
    for batch, _ in stream.rows():
        batch = batch[: rows - seen]
        tables.append(table_of(stream.encoder.encode(_columns(batch), seen), labelled))
        seen += len(batch)
        if max(seen, sum(map(len, tables))) >= rows:  # a row of text gives many samples
            break
    tables.append(table_of(stream.encoder.finish(), labelled))
    samples = datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_batches(tables)))
    digest = hashlib.sha256(gate.column(samples, "digest").tobytes()).hexdigest()
    return samples, digest


def _beginning() -> dict[str, Any]:
    """Return where a pass begins."""
    return {"position": None, "row": 0, "encoder": None}


def _joined(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the block that *items*, blocks of a sample each, make."""
    arrays = {name: np.concatenate([item[name] for item in items]) for name in items[0] if name != "lengths"}
    return {**arrays, "lengths": [length for item in items for length in item["lengths"]]}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}
