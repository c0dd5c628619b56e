"""Finding, opening and digesting the files of a data set."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from qlora_core import ConfigError, DataError
from qlora_core.data.files import absolute, digest, files_in, hold_rows, is_hub_name, opened, plain_suffix

CONTENT = "".join(f"line {n} of a file\n" for n in range(50_000)).encode()


def compressed(path: Path, content: bytes = CONTENT) -> Path:
    """Write *content* to *path*, compressed as its suffix says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content, mtime=0))
    elif path.suffix in (".zst", ".zstd"):
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


def test_the_suffix_of_a_compressed_file_is_that_of_its_content() -> None:
    assert plain_suffix("a/B.TXT.gz") == plain_suffix(Path("b.txt.zstd")) == plain_suffix("c.txt") == ".txt"
    assert plain_suffix("README") == plain_suffix("noise.gz") == ""


def test_a_folder_gives_its_files_with_a_suffix_compressed_or_not_without_those_ignored_or_hidden(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("b.txt.gz", "a.txt", "deep/c.md", "d.png", "deep/state.md", "._a.txt", ".ipynb_checkpoints/a.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = files_in("path", str(tmp_path), (".txt", ".md"), ignored=("state.md",))
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a.txt", "b.txt.gz", "deep/c.md"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing.txt", "path: no file '"), ("*.txt", "path: no file '"), ("", "holds no .txt, .md or .rst file; name the files")],
)
def test_paths_without_a_file_are_refused_with_what_was_looked_for(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        files_in("path", str(tmp_path / path), (".txt", ".md", ".rst"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "path", "rows"),
    [
        (["R.JSONL"], "R.JSONL", True),
        (["r.jsonl.zstd"], "r.jsonl.zstd", True),
        (["r.Json.GZ"], "r.Json.GZ", True),
        (["t.txt"], "t.txt", False),
        (["t.log"], "t.log", False),
        ([], "missing.csv", True),
        ([], "missing.txt", False),
        (["a.jsonl", "deep/b.csv.gz"], "", True),
        (["data/a.parquet", "README.md"], "", True),
        (["a.txt", "about.json"], "", False),
        (["a.md.gz", "about.json"], "", False),
        (["a.png"], "", False),
        ([], "", False),
        (["UP.CSV", "UP.JSONL"], "UP.*", True),
        (["a.txt", "b.txt"], "*.txt", False),
        (["a.txt", "b.jsonl"], "*", True),
        (["deep/b.jsonl"], "**/*.jsonl", True),
        ([], "*.jsonl", True),
        (["[a].txt", "a.jsonl"], "[a].txt", False),
    ],
)
def test_files_hold_rows_or_text(tmp_path: Path, names: list[str], path: str, rows: bool) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert hold_rows(str(tmp_path / path)) is rows


def test_the_name_of_a_dataset_on_the_hub_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["openai/gsm8k", "teknium/OpenHermes-2.5", "a/b.jsonl", "a/b.txt", "a/B.MD", "a/b.csv.zst", "a/b.gz", "a", "a/b/c"]
    assert [name for name in [*names, "./a/b", "/a/b", "a/*", "", ("a/b",)] if is_hub_name(name)] == names[:2]
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert not is_hub_name("openai/gsm8k")


def test_paths_become_absolute_and_empty_ones_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(("a.txt", "/b.txt")) == (str(tmp_path / "a.txt"), "/b.txt")
    for value, message in (("", "the path is empty"), ((), "the list is empty"), (("a", ""), "a path in the list is empty")):
        with pytest.raises(ValueError, match=message):
            absolute(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
@pytest.mark.parametrize("offset", [0, 7, 700_000])
def test_a_file_is_read_from_any_offset_whatever_its_compression(tmp_path: Path, suffix: str, offset: int) -> None:
    with opened(compressed(tmp_path / f"lines.txt{suffix}"), offset) as stream:
        assert stream.read() == CONTENT[offset:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_text_in_compressed_files_can_be_told_and_sought(tmp_path: Path, suffix: str) -> None:
    with io.TextIOWrapper(opened(compressed(tmp_path / f"lines.txt{suffix}")), encoding="utf-8") as stream:
        stream.read(300_000)
        place, after = stream.tell(), stream.read(50)
        stream.read()
        stream.seek(place)
        assert stream.read(50) == after == CONTENT.decode()[300_000:300_050]


@pytest.mark.parametrize(("suffix", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_data_that_is_cut_off_or_is_none_names_the_file(tmp_path: Path, suffix: str, kind: str) -> None:
    file = compressed(tmp_path / f"lines.txt{suffix}")
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"no compressed data at all"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="fetch it again") as caught, opened(file) as stream:
            stream.read()
        assert str(caught.value).startswith(f"{file}: damaged {kind} data after ")


def test_a_file_that_is_not_there_or_is_a_folder_says_so(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.txt", "no such file or directory"), (tmp_path, "is a directory")):
        for attempt in (lambda path=path: opened(path), lambda path=path: digest([path])):
            with pytest.raises(DataError, match=f"{reason}; make the file readable"):
                attempt()


def test_the_digest_changes_with_content_and_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    before = digest([one, two])
    assert before == digest([str(one), str(two)])
    assert before != digest([two, one])
    two.write_bytes(b"3")
    assert before != digest([one, two])


def test_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, qlora_core.data.files; print([n for n in ('torch', 'datasets', 'pyarrow', 'numpy') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("path", ["a" * 5_000, "a\x00b", "~no-such-user/x.txt", "[", "/proc/self/mem/x"])
def test_what_no_file_can_be_called_is_no_file(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        files_in("path", path, (".txt",))
    assert str(caught.value).startswith(f"path: no file {path!r}; paths are relative to the working directory ")
