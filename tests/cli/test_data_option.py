"""`--data`: rows are never trained as text, whatever names them, and what can't be read is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qlora_core.cli.train import source_of

ROWS = "".join(json.dumps({"question": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(20))


@pytest.fixture
def read(qlora: Callable[..., Any], tiny_model: Path) -> Callable[[object], dict[str, int]]:
    """Return a function that gives what `qlora data --data` says of the training data."""

    def run(path: object) -> dict[str, int]:
        arguments = ("--set", "data.eval_fraction=0", "--set", "data.sequence_length=64")
        result = qlora("data", "--model", tiny_model, "--data", path, *arguments, "--json")
        assert result.code == 0, result.err
        found: dict[str, int] = json.loads(result.out)["statistics"]["train"]
        return found

    return run


def test_rows_are_read_as_rows_whatever_names_them(here: Path, read: Callable[[object], dict[str, int]]) -> None:
    (here / "rows" / "deep").mkdir(parents=True)
    (here / "rows" / "README.md").write_text("What these rows are.")
    for path in (here / "R.JSONL", here / "rows" / "deep" / "a.jsonl"):
        path.write_text(ROWS)
    with pa.CompressedOutputStream(pa.OSFile(str(here / "x.jsonl.zstd"), "wb"), "zstd") as stream:
        stream.write(ROWS.encode())
    counts = [read(path) for path in ("R.JSONL", "x.jsonl.zstd", "rows", "*.JSONL", "ro*/**/*.jsonl")]
    assert [count["samples"] for count in counts] == [20] * 5
    assert all(count["supervised"] == counts[0]["supervised"] < count["tokens"] for count in counts)


def test_text_is_read_as_text(here: Path, text_file: Path, read: Callable[[object], dict[str, int]]) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text(text_file.read_text())
    (here / "texts" / "about.json").write_text('{"text": "about"}')
    assert read("texts") == read(text_file) == read("te*/*.txt")


def test_a_glob_of_rows_and_text_is_refused(qlora: Callable[..., Any], here: Path, tiny_model: Path) -> None:
    (here / "a.jsonl").write_text(ROWS)
    (here / "b.txt").write_text("text")
    result = qlora("data", "--model", tiny_model, "--data", here / "*")
    assert result.code == 2
    assert f"{str(here / 'b.txt')!r} has the suffix '.txt', which is not read; known: .jsonl, " in result.err
    assert result.err.endswith("; raw text is read by the dataset 'text'\n")


def test_a_name_of_the_hub_is_taken_for_rows(qlora: Callable[..., Any], here: Path, tiny_model: Path) -> None:
    assert source_of("openai/gsm8k") == {"name": "records", "path": "openai/gsm8k"}
    result = qlora("data", "--model", tiny_model, "--data", "nobody/nothing", "--set", "dataset.subset=main")
    assert result.code == 2
    assert "error: nobody/nothing: neither a file or folder here, nor to be had from the hub as a dataset" in result.err
    assert source_of("texts/corpus.txt") == {"name": "text", "path": "texts/corpus.txt"}


def test_a_list_without_a_dataset_is_refused(qlora: Callable[..., Any], here: Path) -> None:
    (here / "run.yaml").write_text("model: m\ndataset: []\n")
    result = qlora("data", "run.yaml")
    assert (result.code, result.err) == (
        2,
        "error: run.yaml:2: dataset: must have at least 1 item (got []); where examples come from; "
        "a list mixes several, each with a weight (1 by default)\n",
    )
