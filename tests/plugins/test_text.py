"""Reading text: files, globs, folders, encodings, separators, and files larger than a piece."""

from __future__ import annotations

import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qlora_core import ConfigError, DataError
from qlora_text import TextFile
from qlora_text.reading import split_documents


def documents(source: TextFile, split: Any = "train") -> list[str]:
    """Return the documents that *source* gives, their pieces joined."""
    joined: list[str] = []
    for row in source.examples(split):
        if row["continues"]:
            joined[-1] += row["text"]
        else:
            joined.append(row["text"])
    return joined


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("second\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("third\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_a_file_a_list_a_glob_and_a_folder_give_their_files_in_order(corpus: Path) -> None:
    assert documents(TextFile(path=str(corpus / "a.txt"))) == ["first\n"]
    assert documents(TextFile(path=[str(corpus / "b.txt"), str(corpus / "a.txt")])) == ["second\n", "first\n"]
    assert documents(TextFile(path=str(corpus / "*.txt"))) == ["first\n", "second\n"]
    assert documents(TextFile(path=str(corpus))) == ["first\n", "second\n", "third\n"]
    assert documents(TextFile(path=[corpus / "b.txt"])) == documents(TextFile(path=corpus / "b.txt")) == ["second\n"]


def test_a_file_that_two_patterns_match_is_read_once(corpus: Path) -> None:
    assert documents(TextFile(path=[str(corpus / "a.txt"), str(corpus / "*.txt")])) == ["first\n", "second\n"]


def test_the_evaluation_file_is_a_split_of_its_own(corpus: Path) -> None:
    source = TextFile(path=str(corpus / "a.txt"), eval_path=str(corpus / "b.txt"))
    assert documents(source, "eval") == ["second\n"]
    assert TextFile(path=str(corpus / "a.txt")).examples("eval") is None


def test_a_separator_divides_documents(tmp_path: Path) -> None:
    file = tmp_path / "poems.txt"
    file.write_text("one\n\ntwo\nlines\n\nthree", encoding="utf-8")
    assert documents(TextFile(path=str(file), separator="\n\n")) == ["one", "two\nlines", "three"]


@pytest.mark.parametrize("separator", [None, "\n\n", "<end>"])
@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_pieces_join_to_the_same_documents_whatever_their_size(separator: str | None, piece: int) -> None:
    text = "alpha beta\ngamma<end>delta\n\nepsilon zeta eta theta\niota\n\n\nkappa<end>"
    expected = [part for part in (text.split(separator) if separator else [text]) if part]
    joined: list[str] = []
    for chunk, here, _ in split_documents(io.StringIO(text), separator, piece):
        assert chunk
        joined = [*joined[:-1], joined[-1] + chunk] if here.continues else [*joined, chunk]
    assert joined == expected


def test_a_long_file_comes_in_pieces_that_end_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a line of forty-one characters, I believe\n" * 10_000, encoding="utf-8")
    rows = list(TextFile(path=str(file)).examples("train"))
    assert len(rows) > 5
    assert [row["continues"] for row in rows] == [False] + [True] * (len(rows) - 1)
    assert all(row["text"].endswith("\n") for row in rows)
    assert "".join(row["text"] for row in rows) == file.read_text(encoding="utf-8")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("before", encoding="utf-8")
    assert documents(TextFile(path=str(file))) == ["before"]
    file.write_text("after!", encoding="utf-8")
    assert documents(TextFile(path=str(file))) == ["after!"]


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert documents(TextFile(path=str(file))) == ["one\ntwo\n"]


def test_other_encodings_are_read_as_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\xe9".encode("latin-1"))
    assert documents(TextFile(path=str(file), encoding="latin-1")) == ["caf\xe9"]


@pytest.mark.parametrize("before", [0, 10, 70_000, 200_000])
def test_bytes_that_do_not_decode_are_named_with_file_and_position(tmp_path: Path, before: int) -> None:
    file = tmp_path / "broken.txt"
    file.write_bytes(b"x" * before + b"\xff" + b"y" * 10)
    with pytest.raises(DataError) as caught:
        TextFile(path=str(file)).examples("train")
    assert f"{file}: not utf-8" in str(caught.value)
    assert f"at byte {before}" in str(caught.value)
    assert "set dataset.encoding" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "encoding", "where"),
    [
        (b"one\ntwo \xff", "utf-8", "line 2, at byte 8"),
        (b"\xef\xbb\xbfone\n\n\n\xe9\n", "utf-8", "line 4, at byte 9"),
        (b"line\n" * 30_000 + b"cut off: \xc3", "utf-8", "line 30001, at byte 150009"),
        ("one\ntwo\n".encode("utf-16") + b"\x00\xdc", "utf-16", "line 3, at byte 18"),
    ],
)
def test_bytes_that_do_not_decode_are_named_with_their_line(tmp_path: Path, content: bytes, encoding: str, where: str) -> None:
    file = tmp_path / "broken.txt"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        TextFile(path=str(file), encoding=encoding).examples("train")
    assert f" in {where}; set dataset.encoding" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "path: no file '"),
        ("*.csv", "path: no file '"),
        ("empty", "holds no .txt or .md file; name the files, or a glob"),
    ],
)
def test_paths_that_name_no_file_are_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        TextFile(path=str(tmp_path / path)).check(None, None)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_an_empty_list_and_an_unknown_encoding_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"path: the list is empty; name at least one file"):
        TextFile(path=[])
    with pytest.raises(ConfigError, match=r"encoding: unknown encoding 'utf8000'; utf-8 and latin-1 are usual"):
        TextFile(path="x", encoding="utf8000")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    content = "".join(f"line {n}\n" for n in range(30_000))
    file = tmp_path / f"lines.txt{suffix}"
    if suffix == ".gz":
        file.write_bytes(gzip.compress(content.encode(), mtime=0))
    else:
        with pa.CompressedOutputStream(pa.OSFile(str(file), "wb"), "zstd") as stream:
            stream.write(content.encode())
    assert documents(TextFile(path=str(tmp_path))) == [content]


def test_rows_say_the_line_at_which_they_begin(tmp_path: Path) -> None:
    file = tmp_path / "poems.txt"
    file.write_text("one\n\ntwo\nlines\n\nthree", encoding="utf-8")
    rows = TextFile(path=str(file), separator="\n\n").examples("train")
    assert rows is not None
    assert rows["origin"][:] == [f"{file}:1", f"{file}:3", f"{file}:6"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_a_stream_goes_on_from_every_position(tmp_path: Path, encoding: str, separator: str | None) -> None:
    line = "a caf\xe9 with some forty characters, I believe\r\n"
    (tmp_path / "a.txt").write_bytes((line * 9_000 + "\r\n" + line * 9_000).encode(encoding))
    (tmp_path / "b.txt").write_bytes("the end".encode(encoding))
    source = TextFile(path=str(tmp_path), encoding=encoding, separator=separator)
    rows = source.examples("train")
    assert rows is not None
    streamed = list(source.stream())
    assert [row for row, _ in streamed] == rows.to_list()
    assert len(streamed) > 10
    for index, (_, position) in enumerate(streamed):
        assert list(source.stream(json.loads(json.dumps(position)))) == streamed[index + 1 :]


def test_one_line_of_fifty_megabytes_comes_quickly_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_bytes(b"word " * 10_000_000)
    started = time.perf_counter()
    lengths = [len(row["text"]) for row, _ in TextFile(path=str(file)).stream()]
    assert sum(lengths) == 50_000_000
    assert max(lengths) <= 2**16
    assert time.perf_counter() - started < 20
