"""Read text files piece by piece: into memory-mapped Arrow, or as a stream. Imported late."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from qlora_core.data.files import digest, opened
from qlora_core.errors import DataError

PIECE = 2**16  # characters per row: enough for the tokenizer to be quick, little enough for any memory


class Place(NamedTuple):
    """Where a piece begins. From a place the pieces are the same, however it was reached."""

    cookie: int = 0
    """What `TextIO.seek` takes."""
    skip: int = 0
    """Characters after it."""
    continues: bool = False
    """Whether the piece goes on the document of the one before."""
    line: int = 1


def read_documents(files: list[Path], encoding: str, separator: str | None) -> Any:
    """Return the documents in *files* as rows of `text`, `continues` and `origin`, a datasets.Dataset.

    Raises DataError for bytes that don't decode.
    """
    import datasets

    from qlora_core.data.arrow import cached_dataset

    names = [str(file) for file in files]
    key = hashlib.sha256(repr((names, digest(files), encoding, separator, PIECE)).encode()).hexdigest()
    features = {
        "text": datasets.Value("string"),
        "continues": datasets.Value("bool"),
        "origin": datasets.Value("string"),
    }
    return cached_dataset(_rows, features, key, files=names, encoding=encoding, separator=separator)


def stream_documents(
    files: list[Path], encoding: str, separator: str | None, position: list[Any] | None = None
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield the rows of `read_documents` from *position* on, each with the position after it."""
    first, *place = position or [0]
    for index, file in enumerate(files):
        if index < first:
            continue
        start = Place(*place) if index == first else Place()
        try:
            with io.TextIOWrapper(opened(file), encoding=_codec(encoding)) as stream:
                for text, here, after in split_documents(stream, separator, start=start):
                    row = {"text": text, "continues": here.continues, "origin": f"{file}:{here.line}"}
                    yield row, [index, *after]
        except UnicodeError as error:
            line, byte = _undecodable(file, _codec(encoding))
            raise DataError(
                f"{file}: not {encoding}: {getattr(error, 'reason', error)} in line {line}, at byte {byte}; "
                "set dataset.encoding to the file's own, latin-1 for example"
            ) from error


def split_documents(
    stream: TextIO, separator: str | None, piece: int = PIECE, start: Place | None = None
) -> Iterator[tuple[str, Place, Place]]:
    """Yield pieces of about *piece* characters, each with the place where it begins and the place after it.

    Pieces end at the end of a line where there is one, else at a space, else anywhere.
    """
    here = start or Place()
    reach = piece + len(separator or "")  # a separator that begins in the piece ends here at the latest
    window = _Window(stream, here, max(reach, piece * 4))
    while window.has(reach):
        text, at = window.text, window.at
        found = text.find(separator, at, at + reach) if separator else -1
        if found >= 0:
            end, after = found, found + len(separator or "")
        elif len(text) - at > reach:
            limit = at + piece
            end = after = (text.rfind("\n", at, limit) + 1) or (text.rfind(" ", at, limit) + 1) or limit
        else:
            end = after = len(text)
        cookie, skip = window.place(after)
        following = Place(cookie, skip, found < 0, here.line + text.count("\n", at, after))
        if end > at:
            yield text[at:end], here, following
        here, window.at = following, after


class _Window:
    """The text of a stream around the point that splitting has come to, with what finds each character of it again."""

    def __init__(self, stream: TextIO, start: Place, size: int) -> None:
        self._stream = stream
        self._size = size  # characters per read
        self._chunks: list[tuple[int, int]] = []  # where each begins in the text, and what seeks to it
        self._ended = False
        self.text = ""
        self.at = start.skip
        if start.cookie:
            stream.seek(start.cookie)

    def has(self, reach: int) -> bool:
        """Return whether there is text left, after reading on until there are more than *reach* characters, or the end."""
        while not self._ended and len(self.text) - self.at <= reach:
            cookie = self._stream.tell()
            chunk = self._stream.read(self._size)
            self._ended = not chunk
            if chunk:
                self._forget()
                self._chunks.append((len(self.text), cookie))
                self.text += chunk
        return self.at < len(self.text)

    def place(self, index: int) -> tuple[int, int]:
        """Return what seeks to the chunk that holds the character at *index* of the text, and how far into it that is."""
        begin, cookie = next(chunk for chunk in reversed(self._chunks) if chunk[0] <= index)
        return cookie, index - begin

    def _forget(self) -> None:
        """Drop the chunks that splitting has left behind."""
        while len(self._chunks) > 1 and self._chunks[1][0] <= self.at:
            cut = self._chunks[1][0]
            self.text, self.at = self.text[cut:], self.at - cut
            self._chunks = [(begin - cut, cookie) for begin, cookie in self._chunks[1:]]


def _rows(files: list[str], encoding: str, separator: str | None) -> Iterator[dict[str, Any]]:
    for row, _ in stream_documents([Path(file) for file in files], encoding, separator):
        yield row


def _codec(encoding: str) -> str:
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _undecodable(file: Path, codec: str) -> tuple[int, int]:
    """Return line and byte of the first byte that does not decode; the error itself counts from its buffer."""
    decoder, read, lines = codecs.getincrementaldecoder(codec)(), 0, 1
    with opened(file) as stream:
        while True:
            chunk = stream.read(PIECE)
            pending = len(decoder.getstate()[0])
            try:
                lines += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeError as error:
                given = decoder.getstate()[0] + chunk  # of which a byte-order mark is not in the error
                mark = len(given) - len(getattr(error, "object", given))
                good = mark + getattr(error, "start", 0)
                return lines + given[:good].count(b"\n"), read - pending + good
            if not chunk:
                return lines, read
            read += len(chunk)
