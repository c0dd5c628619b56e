"""Data files, valid ones that are damaged: `qlora data` shows them or names file and line, and changes nothing."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

ROWS = 24
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda n: {"text": f"Line {n} of a text.", "source": "here"},
    "pairs": lambda n: {"prompt": f"What is {n}?", "completion": f"It is {n}.", "system": "Be short."},
    "alpaca": lambda n: {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n % 5 + 1)))},
    "chat": lambda n: {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": "Well."},
        ]
    },
    "calls": lambda n: {
        "messages": [
            {"role": "user", "content": f"Add {n} and 2"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [TOOL],
    },
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Yes?"}]},
    "turns": lambda n: {
        "prompt": [{"role": "user", "content": f"Hi {n}"}],
        "completion": [{"role": "assistant", "content": "Yes?"}],
    },
    "nested": lambda n: {"question": f"What is {n}?", "answer": {"text": "x"}, "context": "A number.", "instances": []},
    "tokens": lambda n: {"input_ids": [n, n + 1, n + 2, 3], "labels": [-100, n + 1, n + 2, 3], "attention_mask": [1, 1, 1, 1]},
    "ids": lambda n: {"input_ids": [n, n + 1, n + 2, 3]},
}
FLAT = ("text", "pairs", "alpaca", "ids")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".json.zst", ".csv.gz")
TEXTS = (".txt", ".md", ".txt.gz", ".txt.zst")
BINARY = (".parquet", ".arrow", ".gz", ".zst")  # there are no lines to name

ODD = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 10**9, 2**31, 2**63, 10**30, 0.5, 1e300, math.inf, math.nan, "", " ", "\n", "\x00"),
            *(
                "é",
                "🦙",
                "\ud800",
                "\u2028",
                "null",
                "[]",
                "{}",
                "[1, 2]",
                '{"a": 1}',
                "[[[[",
                "<eos>",
                "<|im_end|>",
                "x" * 3000,
            ),
            *("user", "assistant", "system", "tool", [], [[]], {}, [None], [1], [-1], [0.5], ["a"], [{}], {"role": "user"}),
            *(
                {"content": "x"},
                {"a": {"b": [1]}},
                [[1, 2], [3]],
                [2**31],
                [10**30],
                [True],
                "[" * 2000,
                {"": 1},
                [{"role": 1}],
            ),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-3, 500), max_size=6),
)
PIECES = [
    b"\x00",
    b"\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n\n",
    b" ",
    b"\t",
]
PIECES += [
    *(bytes([code]) for code in b"\"'{}[]:,\\-0e.nt/"),
    b"\\ud800",
    b"\\u00",
    b"NaN",
    b"null",
    b"\x1a",
    b"\xe2\x80\xa8",
    b"<eos>",
]


@dataclass(frozen=True)
class Case:
    """A file, what is wrong with it, and how it is read."""

    what: str
    name: str
    content: bytes
    settings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{self.name}: {self.what[:200]} {self.settings} {self.content[:1200]!r}"


def _written(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """Return the bytes of a file with *rows*; raise ValueError where its format can't hold them."""
    kind, _, packing = suffix.removeprefix(".").partition(".")
    if kind in ("jsonl", "ndjson"):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind == "json":
        content = json.dumps(rows, indent=1).encode()
    elif kind in ("csv", "tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(dict.fromkeys(key for row in rows for key in row)), dialect="excel-tab" if kind == "tsv" else "excel"
        )
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogatepass")
    else:
        content = _columns(rows, kind)
    return _packed(content, packing)


def _columns(rows: list[dict[str, Any]], kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    try:
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, sink, row_group_size=10)
        else:
            with (pa.ipc.new_file if len(rows) % 2 else pa.ipc.new_stream)(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(str(error)) from error
    return sink.getvalue()


def _packed(content: bytes, packing: str) -> bytes:
    if packing == "zst":
        import pyarrow as pa

        return bytes(pa.compress(content, "zstd", asbytes=True))
    return gzip.compress(content, mtime=0) if packing else content


def _leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*where, key)
        yield from _leaves(item, (*where, key))


SETTINGS = [
    *("data.on_problem=skip", "data.on_problem=warn", "data.truncate=true", "data.eval_fraction=0", "data.packing=false"),
    *("data.deduplicate=true", "data.train_on=last_turn", "data.train_on=all", "data.template=chatml", "data.template=none"),
    *("data.sequence_length=8", "dataset.format=chat", "dataset.format=text", "dataset.format=instruction"),
    *("dataset.format=tokenized", "dataset.roles={human: assistant}"),
]
STREAM = ("data.streaming=true", "data.eval_fraction=0", "training.max_steps=1", "data.gate_rows=10")


def _settings() -> Any:
    few = st.lists(st.sampled_from(SETTINGS), max_size=2, unique_by=lambda text: text.partition("=")[0]).map(tuple)
    return st.one_of(st.just(()), few, st.just(STREAM))


@st.composite
def wrong_rows(draw: Callable[..., Any]) -> Case:
    """Return a file of rows, one of which has a value of another type, a column too few or turns in another order."""
    form = draw(st.sampled_from(sorted(FORMS)))
    suffix = draw(st.sampled_from([s for s in SUFFIXES if form in FLAT or (".csv" not in s and ".tsv" not in s)]))
    rows = [copy.deepcopy(FORMS[form](n)) for n in range(ROWS + draw(st.integers(0, 1)))]
    row = draw(st.sampled_from([0, 1, ROWS // 2, ROWS - 1]))
    where = draw(st.sampled_from(list(_leaves(rows[row]))))
    kind = draw(st.sampled_from(["value"] * 5 + ["delete", "add", "double", "reverse", "rename"]))
    value = draw(ODD)
    whole = suffix in (".parquet", ".arrow") and draw(st.booleans())  # else such a file could not be written
    for number in range(len(rows)) if whole else [row]:
        _change(rows[number], where, kind, value)
    try:
        content = _written(rows, suffix)
    except ValueError:
        rows = [rows[row]] * 3
        try:
            content = _written(rows, suffix)
        except ValueError:
            content = b""
    what = f"{kind} at {'.'.join(map(str, where))} of row {row + 1} of {form}, {value!r:.60}"
    return Case(what, f"rows{suffix}", content, draw(_settings()))


def _change(row: dict[str, Any], where: tuple[Any, ...], kind: str, value: Any) -> None:
    parent: Any = row
    for key in where[:-1]:
        parent = parent[key]
    key = where[-1]
    if kind == "value":
        parent[key] = copy.deepcopy(value)
    elif kind == "delete":
        del parent[key]
    elif kind in ("add", "double", "rename") and isinstance(parent, dict):
        parent["more" if kind == "add" else f"{key}s"] = value if kind == "add" else parent[key]
        if kind == "rename":
            del parent[key]
    elif isinstance(parent, list):
        parent.reverse() if kind == "reverse" else parent.insert(key, copy.deepcopy(parent[key]) if kind == "double" else value)


@st.composite
def damaged_files(draw: Callable[..., Any]) -> Case:
    """Return a file that is cut off, or whose bytes have been changed."""
    suffix = draw(st.sampled_from(SUFFIXES + TEXTS))
    if suffix in TEXTS:
        text = "".join(f"Line {n} of a text, é and more.\n" for n in range(60)).encode()
        content, packing = text, suffix.removeprefix(".").partition(".")[2]
    else:
        forms = FLAT if ".csv" in suffix or ".tsv" in suffix else sorted(FORMS)
        form = draw(st.sampled_from(forms))
        rows = [FORMS[form](n) for n in range(ROWS + draw(st.integers(0, 1)))]
        kind, _, packing = suffix.removeprefix(".").partition(".")
        content = _written(rows, f".{kind}")
    if packing and draw(st.booleans()):
        what, content = _damage(draw, content)
        content = _packed(content, packing)
    else:
        what, content = _damage(draw, _packed(content, packing))
    other = draw(st.sampled_from([suffix] * 12 + [*SUFFIXES, *TEXTS]))
    return Case(what if other == suffix else f"{what}, was {suffix}", f"rows{other}", content, draw(_settings()))


def _damage(draw: Callable[..., Any], content: bytes) -> tuple[str, bytes]:
    """Return what was done to *content*, in a word, and what came of it."""
    kind = draw(st.sampled_from(["cut"] * 3 + ["flip"] * 4 + ["insert"] * 4 + ["remove", "repeat", "whole", "ends", "noise"]))
    at = draw(st.integers(0, len(content)))
    size = draw(st.integers(1, 60))
    if kind == "cut":
        return f"cut at {at}", content[:at]
    if kind == "flip":
        changed = bytearray(content)
        for place in [at, *draw(st.lists(st.integers(0, len(content)), max_size=3))]:
            if place < len(changed):
                changed[place] ^= draw(st.integers(1, 255))
        return f"flip at {at}", bytes(changed)
    if kind == "insert":
        return f"insert at {at}", content[:at] + draw(st.sampled_from(PIECES)) + content[at:]
    if kind == "remove":
        return f"remove {size} at {at}", content[:at] + content[at + size :]
    if kind == "repeat":
        return f"repeat {size} at {at}", content[:at] + content[at : at + size] * 3 + content[at + size :]
    if kind == "noise":
        return "noise", random.Random(at).randbytes(size * 20)
    if kind == "ends":
        old, new = draw(
            st.sampled_from([(b"\n", b"\r\n"), (b"\n", b"\r"), (b"\n", b""), (b'"', b"'"), (b",", b";"), (b"e", b"\xe9")])
        )
        return f"{old!r} is {new!r}", content.replace(old, new)
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "a line end": lambda: b"\n",
        "white space": lambda: b" \t\r\n  \n",
        "a mark only": lambda: b"\xef\xbb\xbf",
        "a mark": lambda: b"\xef\xbb\xbf" + content,
        "UTF-16": lambda: content.decode("latin-1").encode("utf-16"),
        "UTF-16 without mark": lambda: content.decode("latin-1").encode("utf-16-le"),
        "NUL": lambda: b"\x00" * 5000,
        "a long line": lambda: content + b"x" * 300_000,
        "a long row": lambda: content + b'{"text": "' + b"long " * 60_000 + b'"}\n',
        "brackets": lambda: b"[" * 100_000,
        "braces": lambda: b'{"a":' * 50_000,
        "twice": lambda: content + content,
        "header only": lambda: content.splitlines(keepends=True)[0] if content else b"",
        "null": lambda: b"null",
        "number": lambda: b"1e999\n" * 3,
        "digits": lambda: b"1" * 6000,
    }
    name = draw(st.sampled_from(sorted(ways)))
    return name, ways[name]()


@pytest.fixture
def put(here: Path, snapshot: Callable[[Path], dict[str, bytes]]) -> Callable[..., Any]:
    """Return a function that writes a case's file into an empty folder, runs a command on it and compares the folder."""

    def run(case: Case, command: Callable[..., Any], *arguments: object) -> Any:
        folder = here / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / case.name).write_bytes(case.content)
        sets = [argument for text in ("data.sequence_length=64", *case.settings) for argument in ("--set", text)]
        result = command(*arguments, "--data", folder / case.name, *sets, "-q")
        if snapshot(folder) != {case.name: case.content}:
            raise AssertionError(f"the file has changed, or others stand beside it: {', '.join(snapshot(folder))}")
        return result

    return run


def _judged(case: Case, result: Any) -> str:
    """Return "shown" or how *result* names what is wrong; fail where it does not."""
    message = result.err[max(0, result.err.find("error: ")) :]
    if result.code not in (0, 2) or "Traceback" in result.err or "this is a defect" in result.err:
        raise AssertionError(f"gives {result.code}: {result.out[-100:]}{result.err[-2500:]}")
    if result.code == 0:
        return "shown"
    if re.search(rf"{re.escape(case.name)}(:\d+|:row \d+|.*\bempty|.* no rows|.*\bline \d+)", message, re.DOTALL):
        return "refused by line"
    if case.name in message and case.name.endswith(BINARY):
        return "refused by file"
    if re.search(r"\b(data|dataset)\.\w+", message) or "it is empty" in message:
        return "refused by key"
    raise AssertionError(f"names no line: {message[-1500:]}")


@pytest.fixture
def shown(put: Callable[..., Any], forked: Callable[..., Any], tiny_model: Path) -> Callable[[Case], str]:
    """Return a function that says how `qlora data` ends with a case, or fails."""
    return lambda case: _judged(case, put(case, forked, "data", "--model", tiny_model, "--sample", "1", "--json"))


@pytest.fixture
def trained(put: Callable[..., Any], qlora: Callable[..., Any], tiny_model: Path, here: Path) -> Callable[[Case], str]:
    """Return a function that says how a training step with a case ends, or fails."""
    quick = ["training.max_steps=1", "training.batch_size=1", "adapter.r=2", "callbacks=[]", "quantizer=none"]
    sets = [argument for text in quick for argument in ("--set", text)]

    def run(case: Case) -> str:
        result = put(case, qlora, "train", "--model", tiny_model, "--output", here / "out", *sets)
        shutil.rmtree(here / "out", ignore_errors=True)
        return _judged(case, result)

    return run


class TestDamaged:
    def test_rows(self, explore: Any, shown: Callable[[Case], str]) -> None:
        explore(wrong_rows(), shown, short=15, long=900)

    def test_files(self, explore: Any, shown: Callable[[Case], str]) -> None:
        explore(damaged_files(), shown, short=18, long=1_200)

    @pytest.mark.usefixtures("_warm")
    def test_files_that_are_trained_on(self, explore: Any, trained: Callable[[Case], str]) -> None:
        explore(st.one_of(damaged_files(), wrong_rows()), trained, short=3, long=150)


@pytest.fixture(scope="module")
def _warm(qlora: Callable[..., Any], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what the first case would otherwise wait for."""
    path = tmp_path_factory.mktemp("warm") / "text.txt"
    path.write_text("Some words. " * 500, encoding="utf-8")
    assert qlora("data", "--model", tiny_model, "--data", path, "--json", "-q", "--set", "data.sequence_length=32").code == 0
