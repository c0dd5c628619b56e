"""Read files, or a hub dataset, row by row, each with its place. Light: pyarrow and datasets are imported where needed.

A reader yields `Row`s from a place on. Places are pairs of numbers: a byte offset and the lines before it, or twice the
rows before it where a file is not made of lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qlora_core.data.files import opened, plain_suffix
from qlora_core.errors import DataError
from qlora_records.json_text import json_objects, kind_of, parsed, taken

Place = tuple[int, int]

ROWS = 256  # of Parquet and Arrow at a time become Python objects
FIRST_LINE = 2**26  # bytes of a .json file in which its first line must end to be told from other forms


class Row(NamedTuple):
    """One row as it stands in the source."""

    origin: str
    values: dict[str, Any]
    before: Place
    after: Place


class Files(NamedTuple):
    """Rows of files, one after the other."""

    paths: tuple[str, ...]

    def rows(self, file: int, place: Place) -> Iterator[Row]:
        """Yield the rows of the file of this index, from *place* on."""
        path = self.paths[file]
        return READERS[plain_suffix(path)](path, place)


class Hub(NamedTuple):
    """Rows of a dataset on the hub, downloaded, or read while they are needed."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    streaming: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """One, as if the dataset were a file."""
        return (self.name,)

    def load(self) -> Any:
        """Return the datasets.Dataset, or with `streaming` the IterableDataset; raise DataError where it can't be had."""
        import datasets

        streaming = self.streaming and not {"[", "+"} & set(self.split)  # streams know nothing of slices and sums
        arguments = {"split": self.split, "revision": self.revision, "streaming": streaming}
        try:
            return datasets.load_dataset(self.name, self.subset, **arguments)
        except Exception as error:  # of the network, of the hub, of the data: whatever it is, the user has to act
            raise DataError(
                f"{self.name}: neither a file or folder here, nor to be had from the hub as a dataset ({_first_line(error)}); "
                "check the spelling, the network, and dataset.subset, split and revision"
            ) from error

    def rows(self, file: int, place: Place) -> Iterator[Row]:
        """Yield the rows from *place* on."""
        data, done = self.load(), place[1]
        for number, values in enumerate(data.skip(done) if done else data, done + 1):
            yield Row(f"{self.name}:{self.split}:row {number}", values, (number - 1, number - 1), (number, number))


def _json_lines(path: str, place: Place) -> Iterator[Row]:
    offset, line = place
    with opened(path, offset) as stream:
        while raw := taken(path, line, stream.readline):
            before = (offset, line)
            offset, line = offset + len(raw), line + 1
            text = _decoded(path, raw, before)
            if text.isspace() or not text:
                continue
            values = parsed(f"{path}:{line}", text)
            if not isinstance(values, dict):
                raise DataError(f"{path}:{line}: {kind_of(values)} is no object; each line must hold one")
            yield Row(f"{path}:{line}", values, before, (offset, line))


def _decoded(path: str, raw: bytes, before: Place) -> str:
    """Return one line as text, without a byte-order mark; *before* is where it begins."""
    if not before[0] and raw.startswith(b"\xef\xbb\xbf"):
        raw, before = raw[3:], (3, before[1])
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{before[1] + 1}: not UTF-8: {error.reason} at byte {before[0] + error.start} of the file; "
            "save the file as UTF-8"
        ) from error


def _separated(path: str, place: Place) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv file; its first row names the columns."""
    csv.field_size_limit(2**30)  # by default 128 KiB; the limit is the process's own, there is no other way
    with opened(path) as stream:
        lines = _Lines(path, stream)
        records = csv.reader(lines, delimiter="\t" if plain_suffix(path) == ".tsv" else ",", strict=True)
        before = lines.place
        try:
            header = next((record for record in records if record), None)
            if header is None:
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{path}:{lines.line}: two columns are called {twice[0]!r}; rename one")
            if place[0] > lines.offset:
                stream.seek(place[0])
                lines.offset, lines.line = place
            before = lines.place
            for record in records:
                if len(record) not in (0, len(header)):
                    raise DataError(
                        f"{path}:{before[1] + 1}: {len(record)} fields, and the first row names {len(header)} "
                        f"({', '.join(header)}); quote fields that hold the separator"
                    )
                if record:
                    values = dict(zip(header, record, strict=True))
                    yield Row(f"{path}:{before[1] + 1}", values, before, lines.place)
                before = lines.place
        except csv.Error as error:
            raise DataError(f"{path}:{before[1] + 1}: malformed CSV: {error}; quote the field") from error


class _Lines:
    """The lines of a stream as text, and how far they have been taken: the csv module takes those of one record at a time."""

    def __init__(self, path: str, stream: Any) -> None:
        self._path = path
        self._stream = stream
        self.offset = 0
        self.line = 0

    @property
    def place(self) -> Place:
        return self.offset, self.line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = taken(self._path, self.line, self._stream.readline)
        if not raw:
            raise StopIteration
        text = _decoded(self._path, raw, self.place)
        self.offset, self.line = self.offset + len(raw), self.line + 1
        return text


def _parquet(path: str, place: Place) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = place[1]
    try:
        with pq.ParquetFile(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if first + size > done:
                    for batch in file.iter_batches(ROWS, row_groups=[group]):
                        yield from _batch(path, batch, first, done)
                        first += len(batch)
                else:
                    first += size
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: can't be read as Parquet: {_first_line(error)}; write it again, or fetch it again") from error


def _arrow(path: str, place: Place) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            try:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            except pa.ArrowInvalid:  # the other of the two forms, the one that `datasets` writes
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            first = 0
            for batch in batches:
                yield from _batch(path, batch, first, place[1])
                first += len(batch)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: can't be read as Arrow: {_first_line(error)}; write it again, or fetch it again") from error


def _batch(path: str, batch: Any, first: int, done: int) -> Iterator[Row]:
    """Yield the rows of a record batch beyond the first *done* of the file, *first* of which came before the batch."""
    if first + len(batch) <= done:
        return
    batch.validate(full=True)  # damaged offsets would read any memory
    for start in range(max(0, done - first), len(batch), ROWS):
        for number, values in enumerate(batch.slice(start, ROWS).to_pylist(), first + start + 1):
            yield Row(f"{path}:row {number}", values, (number - 1, number - 1), (number, number))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _json(path: str, place: Place) -> Iterator[Row]:
    if _has_lines(path):
        yield from _json_lines(path, place)
        return
    before = place
    for line, values, after in json_objects(path, place):
        yield Row(f"{path}:{line}", values, before, after)
        before = after


def _has_lines(path: str) -> bool:
    """Return whether a .json file has one object per line: its first line is an object, and another one begins after it."""
    with opened(path) as stream:
        first = second = b""
        while not first.strip() and (first := taken(path, 0, stream.readline, FIRST_LINE)):
            pass
        while first.endswith(b"\n") and not second.strip() and (second := taken(path, 1, stream.readline, 2)):
            pass
    if not second.strip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


READERS: dict[str, Callable[[str, Place], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
