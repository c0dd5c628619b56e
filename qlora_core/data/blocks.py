"""What is trained on: samples, alone or packed, as a map-style data set. Tokens stay in Arrow files until asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.data.mask import IGNORED
from qlora_core.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["Blocks"]

Numbers = npt.NDArray[np.int64]

ROWS = 1000  # samples per read when all are passed over


class Blocks:
    """Blocks of one sample each, or of those that *packs* says; in memory are only a few numbers per sample.

    *samples* has the columns `input_ids` and, where some tokens are not supervised, `labels` (IGNORED there), both lists of
    int32; other columns are left alone. *packs* is what `pack` returns: offsets (n_blocks + 1,) and indices of samples; a
    sample may stand in several blocks or in none. *packed*: whether blocks hold several samples, by default with *packs*.
    The first token of a sample counts as not supervised, whatever its label: nothing predicts it.
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        packs: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
        *,
        packed: bool | None = None,
    ) -> None:
        self.table = samples
        columns = [name for name in ("input_ids", "labels") if name in samples.column_names]
        self._samples = samples.select_columns(columns).with_format("arrow")
        sizes = [_sizes(rows.column("input_ids")) for rows in self._samples.iter(batch_size=ROWS)]
        self._sizes: Numbers = np.concatenate(sizes) if sizes else np.empty(0, dtype=np.int64)
        each = np.arange(len(self._sizes) + 1, dtype=np.int64)
        offsets, indices = packs if packs is not None else (each, each[:-1])
        self._offsets: Numbers = np.asarray(offsets, dtype=np.int64)
        self._indices: Numbers = np.asarray(indices, dtype=np.int64)
        self.packed = packs is not None if packed is None else packed
        empty = self._indices[self._sizes[self._indices] == 0]
        if len(empty):
            raise DataError(f"sample {empty[0]} has no tokens; leave it out")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids`: (T,) int32, `labels`: (T,) int32 if the samples have any, `lengths`: tokens of each sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index %= len(self)
        which = self.rows(index)
        rows = self._samples[which.tolist()]
        block = {name: _flat(rows.column(name)) for name in rows.column_names}
        return {**block, "lengths": self._sizes[which].tolist()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def rows(self, index: int | None = None) -> Numbers:
        """Return which rows of `table` a block is made of, or all blocks in order: (n,) int64."""
        return self._indices if index is None else self._indices[self._offsets[index] : self._offsets[index + 1]]

    def select(self, indices: Sequence[int] | npt.NDArray[Any]) -> Blocks:
        """Return the blocks at *indices*, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        sizes = np.diff(self._offsets)[chosen]
        pieces = [self._indices[self._offsets[i] : self._offsets[i + 1]] for i in chosen]
        blocks = object.__new__(Blocks)
        blocks.table = self.table
        blocks._samples, blocks._sizes, blocks.packed = self._samples, self._sizes, self.packed
        blocks._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        blocks._indices = np.concatenate(pieces) if pieces else self._indices[:0]
        return blocks

    @property
    def samples(self) -> int:
        """Samples in all blocks."""
        return len(self._indices)

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self._sizes[self._indices].sum())

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens of each block: (n_blocks,) int64."""
        ends = np.concatenate([[0], np.cumsum(self._sizes[self._indices])])
        return np.diff(ends[self._offsets])

    @cached_property
    def supervised(self) -> int:
        """Supervised tokens in all blocks; reads every label once."""
        if "labels" not in self._samples.column_names:
            return self.tokens - self.samples
        counts = []
        for rows in self._samples.iter(batch_size=ROWS):
            column = rows.column("labels")
            ends = np.cumsum(_sizes(column))
            supervised = np.concatenate([[0], np.cumsum(_flat(column) != IGNORED)])
            firsts = np.concatenate([[0], ends[:-1]])
            counts.append(supervised[ends] - supervised[np.minimum(firsts + 1, ends)])
        return int(np.concatenate(counts)[self._indices].sum()) if counts else 0


def _sizes(column: pa.ChunkedArray) -> Numbers:
    return np.asarray(pc.list_value_length(column), dtype=np.int64)


def _flat(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Return the values of all lists as one array (n,) int32 of its own, which may be written to."""
    return np.asarray(pc.list_flatten(column)).astype(np.int32)
