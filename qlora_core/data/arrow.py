"""Data sets in memory-mapped Arrow files, made once by a generator and found again by a key."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock

from qlora_core.errors import DataError

__all__ = ["cached_batches", "cached_dataset"]

FORMAT = 2  # raise it when the same key would give other rows than before
ROWS = 128  # rows per record batch: a row may be a piece of text of 64 Ki characters


def cached_dataset(
    generator: Callable[..., Iterator[dict[str, Any]]], features: dict[str, Any], key: str, **arguments: Any
) -> datasets.Dataset:
    """Return the rows of `generator(**arguments)` as a data set on disk; constant memory, however many rows.

    *key* must change whenever the rows would: rows that were made for it before are taken from the cache of `datasets`.
    What the generator raises comes through as it is, and a generator without rows gives an empty data set.
    """
    columns = datasets.Features(features)

    def batches() -> Iterator[pa.RecordBatch]:
        rows = generator(**arguments)
        while some := list(itertools.islice(rows, ROWS)):
            yield from datasets.Dataset.from_list(some, features=columns).data.table.to_batches()

    return cached_batches(batches, columns, key)


def cached_batches(batches: Callable[[], Iterator[pa.RecordBatch]], features: dict[str, Any], key: str) -> datasets.Dataset:
    """Return the record batches that `batches()` yields as a data set on disk; see `cached_dataset`.

    The file is written under another name and moved, so that it is whole or absent; of several processes one writes.
    """
    columns = datasets.Features(features)
    name = hashlib.sha256(f"{FORMAT} {sorted(features)} {key}".encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "qlora-core"
    path = folder / f"{name}.arrow"
    with _storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    try:
        if not path.is_file():
            _write(path, batches(), columns.arrow_schema)
    finally:
        lock.release()
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=columns), fingerprint=name)


def _write(path: Path, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
    partial = path.with_suffix(".partial")
    try:
        with contextlib.ExitStack() as stack:
            with _storing(path.parent):
                sink = stack.enter_context(pa.OSFile(str(partial), "wb"))
                writer = stack.enter_context(pa.ipc.new_stream(sink, schema))
            for batch in batches:  # what the source of the rows raises is its own
                with _storing(path.parent):
                    writer.write_batch(batch)
        with _storing(path.parent):
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: {(error.strerror or str(error)).lower()}; the tokenised data is kept there: make room or make it "
            "writable, or set HF_DATASETS_CACHE to another folder"
        ) from error
