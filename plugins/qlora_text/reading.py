"""Read text files piece by piece into memory-mapped Arrow. Imported late."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets

from qlora_core.data.arrow import cached_dataset
from qlora_core.errors import DataError

PIECE = 2**16  # characters per row: enough for the tokenizer to be quick, little enough for any memory


def read_documents(files: list[Path], encoding: str, separator: str | None) -> datasets.Dataset:
    """Return the documents in *files* as rows of `text` and `continues`; raise DataError for bytes that don't decode."""
    settings = {"files": [str(file) for file in files], "encoding": encoding, "separator": separator}
    digest = hashlib.sha256(repr((encoding, separator, PIECE)).encode())
    for file in files:
        with _opened(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    features = {"text": datasets.Value("string"), "continues": datasets.Value("bool")}
    return cached_dataset(_pieces, features, digest.hexdigest(), **settings)


def split_documents(stream: TextIO, separator: str | None, piece: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Yield pieces of about *piece* characters, and whether each goes on the document of the one before.

    Pieces end at the end of a line where there is one, else at a space, else anywhere.
    """
    rest, continues = "", False
    while chunk := stream.read(piece):
        rest += chunk
        if separator is not None:
            *ended, rest = rest.split(separator)
            for document in ended:
                if document:
                    yield document, continues
                continues = False
        while len(rest) > piece + len(separator or ""):  # a separator may just have begun
            cut = (rest.rfind("\n", 0, piece) + 1) or (rest.rfind(" ", 0, piece) + 1) or piece
            yield rest[:cut], continues
            rest, continues = rest[cut:], True
    if rest:
        yield rest, continues


def _pieces(files: list[str], encoding: str, separator: str | None) -> Iterator[dict[str, Any]]:
    for file in files:
        codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
        try:
            with _opened(Path(file), "r", encoding=codec) as stream:
                for text, continues in split_documents(stream, separator):
                    yield {"text": text, "continues": continues}
        except UnicodeError as error:
            raise DataError(
                f"{file}: not {encoding}: {getattr(error, 'reason', error)} at byte {_offset(Path(file), codec)}; "
                "set dataset.encoding to the file's own, latin-1 for example"
            ) from error


def _opened(file: Path, mode: str, **options: Any) -> Any:
    try:
        return file.open(mode, **options)
    except OSError as error:
        raise DataError(f"{file}: {(error.strerror or str(error)).lower()}; make the file readable") from error


def _offset(file: Path, codec: str) -> int:
    """Return the position in bytes of the first one that does not decode; the error itself counts from its buffer."""
    decoder, read = codecs.getincrementaldecoder(codec)(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(PIECE):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeError as error:
                return read - pending + getattr(error, "start", 0)
            read += len(chunk)
    return read
