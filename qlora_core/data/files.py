"""Find, open and digest the files that a dataset source reads. Light: imports no datasets, and pyarrow only for .zst."""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator

from qlora_core.errors import ConfigError, DataError, Problem

__all__ = [
    "COMPRESSED",
    "ROWS",
    "TEXTS",
    "Paths",
    "Unchanged",
    "absolute",
    "digest",
    "files_in",
    "hold_rows",
    "is_hub_name",
    "opened",
    "plain_suffix",
]

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
"""The suffixes of compressed files that `opened` reads."""

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""The suffixes of files that hold rows."""

TEXTS = (".txt", ".md")
"""The suffixes of files that hold raw text."""

Row = TypeVar("Row")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

BUFFER = 2**20  # bytes: long lines come in few pieces
PIECE = 2**16  # bytes that are decompressed at a time


def absolute(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return the path or paths absolute; raise ValueError where there is none.

    Paths are relative to the working directory; the resolved configuration must not depend on it.
    """
    if not value:
        raise ValueError(
            "the path is empty; name a file, a glob or a folder" if value == "" else "the list is empty; name at least one file"
        )
    if isinstance(value, str):
        return os.path.abspath(os.path.expanduser(value))
    if "" in value:
        raise ValueError("a path in the list is empty; name a file, a glob or a folder")
    return tuple(os.path.abspath(os.path.expanduser(item)) for item in value)


def _as_text(value: Any) -> Any:
    """Take pathlib's paths, too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [os.fspath(v) if isinstance(v, os.PathLike) else v for v in value] if isinstance(value, list | tuple) else value


AnyPaths = Annotated[str | tuple[str, ...], BeforeValidator(_as_text)]
"""The type of an option that holds a path, or several, as written."""

Paths = Annotated[AnyPaths, AfterValidator(absolute)]
"""The type of an option that holds a file, a glob, a folder or a list of these: text or pathlib's, made absolute."""


def files_in(option: str, paths: str | Sequence[str], suffixes: Sequence[str], ignored: Collection[str] = ()) -> list[Path]:
    """Return the files that *paths* name, each once, globs and folders sorted; raise ConfigError for one that has none.

    In a folder the files with one of *suffixes* count, compressed or not, unless they are hidden, as the checkpoints of
    notebooks are, or their name is one of *ignored*.
    """
    found: dict[Path, None] = {}
    for item in [paths] if isinstance(paths, str) else paths:
        path = Path(item)
        if os.path.isdir(item):  # os.path takes what can be no path, of 5,000 characters, for none that exists
            files = [file for file in _inside(path) if plain_suffix(file) in suffixes and file.name not in ignored]
            kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
            problem = f"the folder {item!r} holds no {kinds} file; name the files, or a glob"
        elif os.path.isfile(item):
            files, problem = [path], ""
        else:
            files = sorted(Path(p) for p in glob.glob(item, recursive=True) if os.path.isfile(p))
            problem = f"no file {item!r}; paths are relative to the working directory {os.getcwd()}"
        if not files:
            raise ConfigError([Problem((option,), problem)])
        found |= dict.fromkeys(files)
    return list(found)


def plain_suffix(path: str | Path) -> str:
    """Return the suffix of *path* in lower case, without that of a compression: ".txt" of "a.txt.gz"."""
    stem, suffix = os.path.splitext(os.fspath(path).lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def is_hub_name(path: Any) -> bool:
    """Return whether *path* is no file or folder here and looks like the name of a dataset on the hub: owner/name."""
    if not isinstance(path, str) or not HUB_NAME.fullmatch(path) or os.path.exists(path):
        return False
    return plain_suffix(path) not in (*ROWS, *TEXTS) and os.path.splitext(path)[1].lower() not in COMPRESSED


def hold_rows(path: str) -> bool:
    """Return whether the files that *path* names, one, those of a folder or of a glob, hold rows: then they are no raw text.

    A folder with both is one of text, but a README beside rows only tells what they are. Of a glob, which means each of
    its files, one with rows is enough: read as text, its syntax would be trained.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        kinds = {plain_suffix(file) for file in _inside(Path(path)) if file.stem.lower() != "readme"}
        return not kinds.isdisjoint(ROWS) and kinds.isdisjoint(TEXTS)
    matched = [] if os.path.isfile(path) else glob.glob(path, recursive=True)
    return any(plain_suffix(file) in ROWS for file in matched or [path])


def opened(path: str | Path, offset: int = 0) -> BinaryIO:
    """Return the bytes of the file at *path* from *offset* on, decompressed where its suffix says so.

    Raises DataError, now or while it is read, for a file that is not readable and for damaged compressed data. An
    offset counts decompressed bytes; in a compressed file all before it is decompressed again.
    """
    kind = COMPRESSED.get(os.path.splitext(path)[1].lower())
    try:
        stream = io.BufferedReader(io.FileIO(path) if kind is None else _Decompressed(path, kind), BUFFER)
        if offset:
            stream.seek(offset)
    except OSError as error:
        raise _unreadable(path, error) from error
    return stream


class Unchanged:
    """Watches files that are read over and over, as a stream's are: one that changes makes another run of it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def rows(self, files: Sequence[str | Path], rows: Iterable[tuple[Row, Any]]) -> Iterator[tuple[Row, Any]]:
        """Yield *rows* with their positions, whose first item is the index of the row's file in *files*.

        Raises DataError at the first row after one of them has changed since the first call, by size or time.
        """
        for file in files:
            self._look(file)
        for row, position in rows:
            self._look(files[position[0]])
            yield row, position

    def _look(self, file: str | Path) -> None:
        try:
            found = os.stat(file)
        except OSError as error:
            raise _unreadable(file, error) from error
        now = found.st_size, found.st_mtime_ns
        if self._seen.setdefault(os.fspath(file), now) != now:
            raise DataError(
                f"{file}: the file has changed while the run streams it; put it back as it was and go on with --resume, "
                "or begin again with --overwrite"
            )


def digest(files: Iterable[str | Path]) -> str:
    """Return a SHA-256 of the contents of *files*, in order; raise DataError for one that is not readable."""
    total = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise _unreadable(file, error) from error
    return total.hexdigest()


def _inside(folder: Path) -> list[Path]:
    """Return the files in *folder*, sorted, without hidden ones and those in hidden folders."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: {(error.strerror or str(error)).lower()}; make the file readable")


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file; it seeks, by reading, which lets a text wrapper tell and find positions."""

    def __init__(self, path: str | Path, kind: str) -> None:
        self._path = path
        self._kind = kind
        self._read = 0  # bytes that came out so far
        self._stream = self._open()

    def _open(self) -> IO[bytes]:
        if self._kind == "gzip":
            return cast("IO[bytes]", gzip.open(self._path, "rb"))
        import pyarrow as pa

        return cast("IO[bytes]", pa.CompressedInputStream(pa.OSFile(os.fspath(self._path), "rb"), self._kind))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._read
        elif whence == os.SEEK_END:
            raise OSError(errno.EINVAL, "the end of compressed data is not known")
        if offset < self._read:
            self._stream.close()
            self._stream, self._read = self._open(), 0
        while self._read < offset and self._next(min(BUFFER, offset - self._read)):
            pass
        return self._read

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        try:
            # in small pieces, so that what comes before the damage is seen
            data = cast(bytes, self._stream.read1(min(size, PIECE)))  # type: ignore[attr-defined]
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno not in (None, 0):
                raise  # of the disk, not of what is on it
            reason = str(error) or "damaged"
            raise DataError(
                f"{self._path}: damaged {self._kind} data after {self._read} bytes of content "
                f"({reason[0].lower()}{reason[1:]}); the file may be cut off: fetch it again"
            ) from error
        self._read += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
