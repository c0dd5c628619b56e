"""Reading records: every kind of file, every form of row, and what is said about each way in which they can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core import ConfigError, DataError
from qlora_core.data.chat import checked, checked_tools
from qlora_core.data.files import ROWS
from qlora_core.data.findings import BadRow
from qlora_records import Records
from qlora_records.forms import recognise
from qlora_records.rows import READERS, Hub

DATA = Path(__file__).parents[3] / "shared" / "data"
PAIR = {"prompt": "2 + 2?", "completion": "4"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep prepared data out of the user's cache."""


def lines(path: Path, *rows: Any) -> Path:
    """Write each of *rows*, text as it is and else as JSON, on a line of its own."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def zstd(content: bytes) -> bytes:
    """Return *content* compressed."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def rows_of(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Return the rows, which the stream gives, too, without those keys that are None."""
    source = Records(path=path, **options)
    examples = source.examples("train")
    assert examples is not None
    rows: list[dict[str, Any]] = list(examples)  # not to_list, in which `datasets` parses JSON in its own way
    streamed = [{key: value for key, value in row.items() if value is not None} for row, _ in source.stream()]
    assert streamed == [{key: value for key, value in row.items() if value is not None} for row in rows]
    return rows


def contents(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Return the rows without their origin."""
    return [{key: value for key, value in row.items() if key != "origin"} for row in rows_of(path, **options)]


def refusal(path: Path | str, **options: Any) -> str:
    """Return what the DataError says that stored and streamed rows raise."""
    source = Records(path=path, **options)
    with pytest.raises(DataError) as stored:
        source.examples("train")
    with pytest.raises(DataError) as streamed:
        list(source.stream())
    assert str(stored.value) == str(streamed.value)
    return str(stored.value)


def refused_options(**options: Any) -> str:
    """Return what the ConfigError says that making or checking the source raises."""
    with pytest.raises(ConfigError) as caught:
        Records(**options).check(None, None)  # type: ignore[arg-type]
    return str(caught.value)


# Kinds of files

THREE = [{"prompt": f"caf\xe9 {n}", "completion": f"line\n{n}"} for n in range(3)]


def _csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(THREE)


def _arrow(path: Path, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(THREE)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)


FILES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "jsonl": ("r.jsonl", lambda path: lines(path, *THREE), ["1", "2", "3"]),
    "ndjson with gaps": ("r.ndjson", lambda path: lines(path, "", THREE[0], " ", "", *THREE[1:]), ["2", "5", "6"]),
    "json array": ("r.json", lambda path: path.write_text(json.dumps(THREE)), ["1", "1", "1"]),
    "json array, indented": ("r.json", lambda path: path.write_text(json.dumps(THREE, indent=1)), ["2", "6", "10"]),
    "json lines": ("r.json", lambda path: lines(path, *THREE), ["1", "2", "3"]),
    "json wrapper": (
        "r.json",
        lambda path: path.write_text(json.dumps({"version": 1, "data": THREE, "more": [1]}, indent=1)),
        ["4", "8", "12"],
    ),
    "csv": ("r.csv", _csv, ["2", "4", "6"]),
    "tsv": ("r.tsv", lambda path: _csv(path, "\t"), ["2", "4", "6"]),
    "parquet": (
        "r.parquet",
        lambda path: pq.write_table(pa.Table.from_pylist(THREE), path, row_group_size=2),
        ["row 1", "row 2", "row 3"],
    ),
    "arrow file": ("r.arrow", lambda path: _arrow(path, pa.ipc.new_file), ["row 1", "row 2", "row 3"]),
    "arrow stream": ("r.arrow", lambda path: _arrow(path, pa.ipc.new_stream), ["row 1", "row 2", "row 3"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_its_rows_with_their_origin(tmp_path: Path, kind: str) -> None:
    name, write, origins = FILES[kind]
    file = tmp_path / name
    write(file)
    assert rows_of(file) == [{**row, "origin": f"{file}:{origin}"} for row, origin in zip(THREE, origins, strict=True)]


@pytest.mark.parametrize("kind", FILES)
def test_a_stream_goes_on_from_every_position(tmp_path: Path, kind: str) -> None:
    name, write, _ = FILES[kind]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name)
    source = Records(path=tmp_path)
    streamed = list(source.stream())
    assert [row["prompt"] for row, _ in streamed] == [row["prompt"] for row in THREE * 2]
    for index, (_, position) in enumerate(streamed):
        assert list(source.stream(json.loads(json.dumps(position)))) == streamed[index + 1 :]


@pytest.mark.parametrize("kind", ["jsonl", "json array, indented", "csv"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_and_resumed_like_plain_ones(tmp_path: Path, kind: str, suffix: str) -> None:
    name, write, origins = FILES[kind]
    plain, file = tmp_path / name, tmp_path / (name + suffix)
    write(plain)
    file.write_bytes((gzip.compress if suffix == ".gz" else zstd)(plain.read_bytes()))
    assert [row["origin"] for row in rows_of(file)] == [f"{file}:{origin}" for origin in origins]
    source = Records(path=file)
    streamed = list(source.stream())
    assert list(source.stream(streamed[1][1])) == streamed[2:]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    text = "prompt,completion\r\na,b\r\n" if name == "r.csv" else json.dumps([PAIR, PAIR][: 2 if name == "r.json" else 0])
    if name == "r.jsonl":
        text = f"{json.dumps(PAIR)}\r\n{json.dumps(PAIR)}\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("}, {", "},\r\n{").encode())
    assert contents(file)[0] == ({"prompt": "a", "completion": "b"} if name == "r.csv" else PAIR)
    source = Records(path=file)
    streamed = list(source.stream())
    assert list(source.stream(streamed[0][1])) == streamed[1:]


def test_there_is_a_reader_for_each_suffix_of_rows() -> None:
    assert tuple(READERS) == ROWS


def test_a_file_a_list_a_glob_and_a_folder_give_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        lines(tmp_path / name, {"text": name})
    (tmp_path / "notes.txt").write_text("not read")
    assert [row["text"] for row in rows_of(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [row["text"] for row in rows_of(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert [row["text"] for row in rows_of([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")])] == ["b.jsonl", "a.jsonl"]


def test_the_folder_that_save_to_disk_writes_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(THREE).save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved") == THREE


def test_the_evaluation_file_is_a_split_of_its_own(tmp_path: Path) -> None:
    train, held = lines(tmp_path / "t.jsonl", PAIR), lines(tmp_path / "e.jsonl", {"prompt": "1", "completion": "2"})
    split = Records(path=train, eval_path=held).examples("eval")
    assert split is not None
    assert split["completion"][:] == ["2"]
    assert Records(path=train).examples("eval") is None


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", {"text": "before"})
    assert contents(file) == [{"text": "before"}]
    lines(file, {"text": "after!"})
    assert contents(file) == [{"text": "after!"}]


# Forms of rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, PAIR),
        ({"question": "2 + 2?", "answer": "4"}, PAIR),
        ({"query": "2 + 2?", "response": "4"}, PAIR),
        ({"instruction": "2 + 2?", "response": "4"}, PAIR),
        ({"instruction": "Add", "input": "2 + 2", "output": "4"}, {"prompt": "Add\n\n2 + 2", "completion": "4"}),
        ({"instruction": "Add", "input": "", "output": "4", "text": "x"}, {"prompt": "Add", "completion": "4"}),
        ({"instruction": "Add", "context": "2 + 2", "response": "4"}, {"prompt": "Add\n\n2 + 2", "completion": "4"}),
        ({"system_prompt": "S", "question": "Q", "response": "R"}, {"prompt": "Q", "completion": "R", "system": "S"}),
        ({"question": "2 + 2?", "context": "Maths", "answer": "4"}, {"prompt": "2 + 2?\n\nMaths", "completion": "4"}),
        (
            {"question": "2 + 2?", "input": "", "context": "Maths", "answer": "4"},
            {"prompt": "2 + 2?\n\nMaths", "completion": "4"},
        ),
        ({"input": "2 + 2?", "context": "Maths", "output": "4"}, {"prompt": "2 + 2?\n\nMaths", "completion": "4"}),
        ({"question": "2 + 2?", "context": {"sentences": ["Maths"]}, "answer": "4"}, PAIR),
        ({"prompt": 2, "completion": 4.5}, {"prompt": "2", "completion": "4.5"}),
        ({"text": "once", "meta": {"a": 1}}, {"text": "once"}),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 2]}),
        ({"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [1, 2]}),
        (
            {"input_ids": [0, 1, 2, 0], "labels": [-100, -100, 2, -100], "attention_mask": "[0, 1, 1, 0]"},
            {"input_ids": [1, 2], "labels": [-100, 2]},
        ),
        ({"input_ids": [0, 0], "attention_mask": [0, 0]}, {"input_ids": []}),
        ({"input_ids": [1, 2], "attention_mask": None}, {"input_ids": [1, 2]}),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}),
        ({"messages": CHAT}, {"messages": CHAT}),
        ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
        ({"messages": CHAT, "system": "S"}, {"messages": [{"role": "system", "content": "S"}, *CHAT]}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"messages": CHAT}),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"messages": [{"role": "system", "content": "S"}, *CHAT]},
        ),
    ],
)
def test_the_form_of_rows_is_recognised(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert contents(lines(tmp_path / "r.jsonl", row, row)) == [expected] * 2


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("at", [0, 1])
def test_null_in_place_of_token_ids_is_left_to_the_gate_in_whatever_row_it_stands(tmp_path: Path, column: str, at: int) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [1, 2], "labels": [-100, 2]} for _ in range(2)]
    rows[at][column] = None
    assert contents(lines(tmp_path / "r.jsonl", *rows)) == rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT}, "records: chats (OpenAI messages) from the column messages"),
        (
            {"conversations": [{"from": "human", "value": ""}]},
            "records: chats (ShareGPT conversations) from the column conversations",
        ),
        ({"question": "", "answer": ""}, "records: prompts and completions from the columns question and answer"),
        (
            {"instruction": "", "context": "", "response": ""},
            "records: prompts and completions from the columns instruction, response and context (input)",
        ),
        ({"text": ""}, "records: texts from the column text"),
        ({"input_ids": [1], "labels": [1]}, "records: token ids from the columns input_ids and labels"),
        (
            {"input_ids": [1], "attention_mask": [1], "token_type_ids": [0]},
            "records: token ids from the columns input_ids and attention_mask; not used: token_type_ids",
        ),
        (
            {"id": 1, "name": "n", "question": "", "context": "c", "answer": "", "meta": {"a": 1}},
            "records: prompts and completions from the columns question, answer and context (input); not used: id, name, meta",
        ),
        (
            {"instruction": "", "system_prompt": "", "instances": [{"input": "", "output": "", "id": 1}]},
            "records: prompts and completions from the columns instruction, instances[].output, system_prompt (system) and "
            "instances[].input (input); not used: instances[].id",
        ),
        (
            {"text": "", **{f"c{n}": n for n in range(10)}},
            "records: texts from the column text; not used: c0, c1, c2, c3, c4, c5, c6, c7 and 2 more",
        ),
    ],
)
def test_auto_says_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], said: str) -> None:
    with caplog.at_level(logging.INFO, "qlora_core"):
        next(Records(path=lines(tmp_path / "r.jsonl", row)).stream())
    assert caplog.messages == [said]


def test_self_instruct_gives_a_row_per_instance_and_resumes_between_them(tmp_path: Path) -> None:
    task = {"instruction": "Add", "instances": [{"input": "1 + 1", "output": "2"}, {"input": "", "output": "0"}]}
    file = lines(tmp_path / "r.jsonl", task, {**task, "instances": []}, task)
    two = [{"prompt": "Add\n\n1 + 1", "completion": "2"}, {"prompt": "Add", "completion": "0"}]
    assert contents(file) == two * 2
    source = Records(path=file)
    streamed = list(source.stream())
    for index, (_, position) in enumerate(streamed):
        assert list(source.stream(position)) == streamed[index + 1 :]


def test_columns_may_be_paths_into_nested_data_and_lists(tmp_path: Path) -> None:
    row = {"task": {"name": "Add"}, "cases": [{"in": "1", "out": {"text": "2"}}, {"in": "3", "out": {"text": "4"}}], "a.b": "S"}
    options = {"prompt": "task.name", "input": "cases[].in", "completion": "cases[].out.text", "system": "a.b"}
    expected = [{"prompt": f"Add\n\n{i}", "completion": o, "system": "S"} for i, o in (("1", "2"), ("3", "4"))]
    assert contents(lines(tmp_path / "r.jsonl", row), **options) == expected
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "r.parquet")
    assert contents(tmp_path / "r.parquet", **options) == expected


def test_one_named_column_is_completed_by_the_usual_other(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", {"ask": "2 + 2?", "answer": "4", "text": "x"})
    assert contents(file, prompt="ask") == [PAIR]
    assert contents(lines(file, {"question": "2 + 2?", "reply": "4"}), completion="reply") == [PAIR]


def test_a_format_decides_where_several_fit(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", {**PAIR, "text": "T", "messages": CHAT})
    assert contents(file) == [{"messages": CHAT}]
    assert contents(file, format="text") == contents(file, text="text") == [{"text": "T"}]
    assert contents(file, format="instruction") == [PAIR]


def test_optional_parts_may_be_missing_from_any_row(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", PAIR, {**PAIR, "system": "S"}, {**PAIR, "system": None})
    assert [row["system"] for row in contents(file)] == [None, "S", None]
    late = lines(tmp_path / "i.jsonl", {"instruction": "A", "output": "B"}, {"instruction": "A", "input": "C", "output": "B"})
    assert [row["prompt"] for row in contents(late)] == ["A", "A\n\nC"]


def test_each_row_may_have_another_of_the_usual_columns(tmp_path: Path) -> None:
    pairs = [PAIR, {**PAIR, "system_prompt": "S"}, {**PAIR, "system": "T"}, {**PAIR, "system": "", "system_prompt": "U"}]
    assert [row["system"] for row in contents(lines(tmp_path / "p.jsonl", *pairs))] == [None, "S", "T", "U"]
    chats = [{"messages": CHAT}, {"messages": CHAT, "system_prompt": "S"}, {"messages": CHAT, "tools": [{"name": "f"}]}]
    rows = contents(lines(tmp_path / "c.jsonl", *chats))
    assert [row["messages"] for row in rows] == [CHAT, [{"role": "system", "content": "S"}, *CHAT], CHAT]
    assert [row["tools"] for row in rows] == [None, None, [{"name": "f"}]]
    asked = [{"question": "2 + 2?", "answer": "4"}, {"question": "2 + 2?", "answer": "4", "context": "Maths"}]
    assert [row["prompt"] for row in contents(lines(tmp_path / "q.jsonl", *asked))] == ["2 + 2?", "2 + 2?\n\nMaths"]
    named = contents(lines(tmp_path / "n.jsonl", {**PAIR, "system": "T", "rules": "S"}), system="rules")
    assert named == [{**PAIR, "system": "S"}]


# Turns


def test_weights_that_change_nothing_are_dropped(tmp_path: Path) -> None:
    weighted = [{**CHAT[0], "weight": 0}, {**CHAT[1], "weight": 1}, {**CHAT[0], "weight": None}, {**CHAT[1], "weight": None}]
    assert contents(lines(tmp_path / "r.jsonl", {"messages": weighted})) == [{"messages": CHAT * 2}]


@pytest.mark.parametrize(
    ("row", "given", "found"),
    [
        ({"messages": "Hi"}, {"messages": ["Hi"]}, "role: turn 1: str, not an object with role and content"),
        ({"messages": None}, {"messages": [None]}, "role: turn 1: nothing, not an object with role and content"),
        ({"messages": {"a": 1}}, {"messages": [{"a": 1}]}, "role: turn 1: no role; its keys are a"),
        ({"messages": [{}, 1]}, {"messages": [{}, 1]}, "role: turn 1: no role; its keys are none"),
        ({"messages": [3]}, {"messages": [3]}, "role: turn 1: int, not an object with role and content"),
        ({"messages": CHAT, "tools": 3}, {"messages": CHAT, "tools": 3}, "call: tools: int, not a list"),
        ({"messages": CHAT, "tools": {"a": 1}}, {"messages": CHAT, "tools": {"a": 1}}, "call: tools: dict, not a list"),
        ({"messages": CHAT, "tools": [3]}, {"messages": CHAT, "tools": [3]}, "call: tool 1: int, not an object"),
        ({"messages": CHAT, "tools": "[{]"}, {"messages": CHAT, "tools": "[{]"}, "call: tools: no JSON ("),
        ({"messages": CHAT, "tools": ["f"]}, {"messages": CHAT, "tools": ["f"]}, "call: tool 1: no JSON ("),
    ],
)
def test_chats_that_are_none_are_left_to_the_gate(
    tmp_path: Path, row: dict[str, Any], given: dict[str, Any], found: str
) -> None:
    made = contents(lines(tmp_path / "r.jsonl", {"messages": CHAT}, row))[1]
    assert {key: value for key, value in made.items() if value is not None} == given
    with pytest.raises(BadRow) as caught:
        _ = checked(made["messages"]), checked_tools(made["tools"])
    assert str(caught.value).startswith(found)


def test_tool_calls_and_tools_survive_whatever_their_shapes(tmp_path: Path) -> None:
    arguments = [{"x": 1 / 3, "t": 0.7, "n": 10**30, "deep": {"list": [1, None, "caf\xe9"]}}, {"y": "5"}, '{"z": 1}']
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": a}} for n, a in enumerate(arguments)]
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c0", "name": "f", "content": "7"},
        CHAT[1],
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
    file = lines(tmp_path / "r.jsonl", {"messages": CHAT}, {"messages": messages, "tools": tools})
    assert contents(file) == [{"messages": CHAT, "tools": None}, {"messages": messages, "tools": tools}]
    examples = Records(path=file).examples("train")
    assert examples is not None
    assert next(examples.iter(batch_size=2))["messages"] == [CHAT, messages]
    assert contents(lines(file, {"messages": messages, "tools": json.dumps(tools)})) == [{"messages": messages, "tools": tools}]


def test_sharegpt_turns_become_openai_s(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    said = [
        ("system", "S"),
        ("human", "Q"),
        ("function_call", json.dumps(call)),
        ("observation", "3"),
        ("gpt", "A"),
        ("narrator", "N"),
    ]
    row = {"conversations": [{"from": name, "value": value} for name, value in said]}
    assert contents(lines(tmp_path / "r.jsonl", row))[0]["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "A"},
        {"role": "narrator", "content": "N"},
    ]


def test_what_a_function_says_tells_a_call_from_an_answer(tmp_path: Path) -> None:
    turns = [{"from": "function", "value": '{"name": "f", "arguments": "{}"}'}, {"from": "function", "value": '{"sum": 3}'}]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert contents(lines(tmp_path / "r.jsonl", {"conversations": turns}))[0]["messages"] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"sum": 3}'},
    ]


def test_roles_are_mapped_as_the_options_say_before_the_usual_names(tmp_path: Path) -> None:
    turns = [{"role": "Client", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "developer", "content": "c"}]
    file = lines(tmp_path / "r.jsonl", {"messages": turns})
    roles = [turn["role"] for turn in contents(file, roles={"Client": "user", "bot": "tool"})[0]["messages"]]
    assert roles == ["user", "tool", "system"]
    assert [turn["role"] for turn in contents(file)[0]["messages"]] == ["Client", "assistant", "system"]


def test_chats_in_parquet_lose_the_keys_that_are_null(tmp_path: Path) -> None:
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "r.parquet")
    assert contents(tmp_path / "r.parquet") == [{"messages": turns}]


def test_chats_that_datasets_wrote_as_json_are_read_again(tmp_path: Path) -> None:
    examples = Records(path=lines(tmp_path / "r.jsonl", {"messages": CHAT})).examples("train")
    assert examples is not None
    examples.to_parquet(tmp_path / "again.parquet")
    assert contents(tmp_path / "again.parquet") == [{"messages": CHAT}]


# What can be wrong with a file

BAD_UTF8 = json.dumps(PAIR).encode().replace(b"2 + 2?", b"\xff")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            b'{"text": "a"}\n' * 39_999 + b'{"text": "a" 3}\n',
            ":40000: malformed JSON at column 14: expecting ',' del",
        ),
        ("r.jsonl", b'{"text": "a"}\n\n[1]\n', ":3: a list is no object; each line must hold one"),
        ("r.jsonl", b'{"text": "a"}\n{"text": "b"', ":2: malformed JSON at column 13: "),
        (
            "r.jsonl",
            b'{"text": "a"} {"text": "b"}\n',
            ":1: malformed JSON at column 15: extra data; each line must hold one whole",
        ),
        (
            "r.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            ":2: no column 'text'; the row has body, the first row has text; every row",
        ),
        (
            "r.jsonl",
            b'{"text": "a"}\n' + BAD_UTF8,
            ":2: not UTF-8: invalid start byte at byte 26 of the file; save the file as UTF-8",
        ),
        ("r.jsonl", '{"text": "a"}'.encode("utf-16"), ":1: not UTF-8: invalid start byte at byte 0 of the file"),
        (
            "r.jsonl",
            b'{"text": "a"}\n{"text": "\\ud83d"}\n',
            ":2: \\ud83d is half of a surrogate pair, no character; take it out",
        ),
        ("r.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', ":2: text is a list, and the text must be text; mend the row"),
        ("r.jsonl", b'{"text": "a"}\n{"text": null}\n', ":2: text is null, and the text must be text"),
        ("r.jsonl", b'{"text": "a"}\n{"text": true}\n', ":2: text is true or false, and the text must be text"),
        ("r.jsonl", b'{"text": "a"}\n{"text": NaN}\n', ":2: text is null, and the text must be text"),
        ("r.jsonl", b"[" * 100_000, ":1: JSON that can't be read: "),
        ("r.jsonl", b'{"input_ids": [1]}\n{"input_ids": ["a"]}', ":2: input_ids must be a list of token ids ("),
        ("r.jsonl", b'{"input_ids": [1]}\n{"input_ids": [9999999999]}', ":2: input_ids must be a list of token ids ("),
        (
            "r.jsonl",
            b'{"input_ids": [1]}\n{"input_ids": 1}',
            ":2: input_ids must be a list of token ids (a number, not a list)",
        ),
        (
            "r.jsonl",
            b'{"input_ids": [1]}\n{"input_ids": [1], "labels": [1]}',
            ":2: a column 'labels'; the row has input_ids, labels",
        ),
        (
            "r.jsonl",
            b'{"input_ids": [1]}\n{"input_ids": [1, 2], "attention_mask": [1]}',
            ":2: attention_mask has 1 entries, input_ids has 2; mend the row",
        ),
        (
            "r.jsonl",
            b'{"input_ids": [1, 2], "labels": [1], "attention_mask": [1, 0]}',
            ":1: attention_mask has 2 entries, labels has 1; mend the row",
        ),
        (
            "r.jsonl",
            b'{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}',
            ":1: attention_mask must be 1 for tokens that belong together and 0 for padding around them; mend the row",
        ),
        ("r.jsonl", b'{"input_ids": [1, 2], "attention_mask": [1, 2]}', ":1: attention_mask must be 1 for tokens that belong"),
        (
            "r.jsonl",
            b'{"input_ids": [1], "attention_mask": "x"}',
            ":1: attention_mask is a text that is no list; write [1, 2, 3]",
        ),
        (
            "r.jsonl",
            b'{"messages": []}\n{"messages": [{"role": "user"}, {"role": "assistant", "content": "a", "weight": 0}]}',
            ":2: messages[1] has the weight 0, and every answer of a chat is trained alike; leave the chat out, end it before",
        ),
        (
            "r.jsonl",
            b'{"conversations": [{"from": "gpt", "value": "a", "weight": 0.5}]}',
            ":1: conversations[0] has the weight 0.5, and every answer",
        ),
        ("r.jsonl", b"", ": holds no rows; leave the file out, or put rows into it"),
        ("r.jsonl", b"\n \r\n\n", ": holds no rows"),
        ("r.json", b"", ": holds no rows"),
        ("r.json", b" [ ]\n", ": holds no rows"),
        ("r.json", b'[\n{"text": "a"},\n{"text": "b" 3}\n]', ":3: column 14: malformed JSON: expecting ',' delimiter"),
        (
            "r.json",
            b'[\n{"text": "a"},\n{"text": "b"}\n',
            ":4: column 1: the file ends where a comma or the end of the list was expec",
        ),
        ("r.json", b'[\n{"text": "a"},\n{"text": "b', ":3: column 10: malformed JSON: unterminated string"),
        ("r.json", b'[{"text": "a"},\n]', ":2: column 1: an object was expected here; each element"),
        (
            "r.json",
            b'[{"text": "a"}\n{"text": "b"}]',
            ":2: column 1: malformed JSON: '{' instead of a comma or the end of the list",
        ),
        ("r.json", b'[{"text": "a"},\n 3]', ":2: column 2: an object was expected here; each element of the list must be one"),
        ("r.json", b'[{"text": "a"}]\n[]', ":2: column 1: there is more after the list; the file must hold one"),
        ("r.json", b'"text"', ":1: column 1: malformed JSON: '\"' instead of a list of objects, or an object"),
        (
            "r.json",
            b'{"train": [{"text": "a"}],\n"test": [{"text": "b"}]}',
            ":2: column 9: another list of objects, 'test'; put the rows",
        ),
        (
            "r.json",
            b'{\n"text": "a"\n}\n{\n"text": "b"\n}\n',
            ":4: column 1: there is more after the object; put each object on a line",
        ),
        ("r.json", b'[{"text": "a"},\n{"text": "\xff"}]', ":2: not UTF-8: invalid start byte at byte 26 of the file"),
        ("r.json", b'[{"text": "a"},\n{"text": "\\udc00"}]', ":2: \\udc00 is half of a surrogate pair"),
        ("r.csv", b"", ": holds no rows"),
        ("r.csv", b"prompt,completion\n", ": holds no rows"),
        ("r.csv", b'"te"xt,b\na,b\n', ":1: malformed CSV: "),
        ("r.csv", b"text,text\na,b\n", ":1: two columns are called 'text'; rename one"),
        (
            "r.csv",
            b'prompt,completion\n"a\nb",c\nd\n',
            ":4: 1 fields, and the first row names 2 (prompt, completion); quote fields",
        ),
        ("r.csv", b"prompt,completion\na,b\nc,d,e\n", ":3: 3 fields, and the first row names 2 (prompt, completion)"),
        ("r.csv", b'prompt,completion\na,b\n"c" x,d\n', ":3: malformed CSV: "),
        ("r.csv", b'prompt,completion\na,b\n"c,d\n', ":3: malformed CSV: unexpected end of data"),
        ("r.csv", b"prompt,completion\na,b\n\xe9,d\n", ":3: not UTF-8: invalid continuation byte at byte 22 of the file"),
        ("r.parquet", b"no parquet at all", ": can't be read as Parquet: "),
        ("r.arrow", b"no arrow at all, but long enough", ": can't be read as Arrow: "),
        ("r.jsonl.gz", gzip.compress(3 * b'{"text": "a"}\n', mtime=0)[:-9], ":4: damaged gzip data after 42 bytes of content"),
        ("r.jsonl.zst", b"no zstandard data", ":1: damaged zstd data after 0 bytes of content ("),
        ("r.json.gz", b"no gzip data", ":1: damaged gzip data after 0 bytes of content (not a gzipped file"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file}{message}")


def test_a_named_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", {"question": "Q", "answer": "A", "cases": [{"out": 1}]})
    assert refusal(file, prompt="questoin") == (
        f"{file}:1: no column 'questoin', which dataset.prompt names; the columns are question, answer, cases[].out"
        "; did you mean 'question'?"
    )
    assert "did you mean 'cases[].out'?" in refusal(file, completion="cases[].oot")


def test_rows_that_are_nothing_are_answered_with_what_is_recognised(tmp_path: Path) -> None:
    file = lines(tmp_path / "r.jsonl", {"title": "T", "meta": {"body": "B"}})
    said = refusal(file)
    assert said.startswith(
        f"{file}:1: nothing to train on is recognised; the columns are title, meta.body; recognised are messages"
    )
    assert said.endswith("; name the columns: prompt and completion, or messages, or text")
    assert refusal(file, format="chat").startswith(f"{file}:1: no chat is recognised; the columns are title, meta.body")
    assert refusal(file, prompt="title").startswith(f"{file}:1: dataset.prompt can't be completed to rows of one form")


def test_an_empty_file_among_others_and_files_that_are_gone_are_said(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", PAIR)
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.jsonl'}: holds no rows")
    with pytest.raises(DataError, match="fewer files than when the run was interrupted"):
        list(Records(path=tmp_path).stream([2, 0, 0, 0]))


@pytest.mark.parametrize("form", ["lines", "array"])
def test_one_row_of_fifty_megabytes_is_read_quickly(tmp_path: Path, form: str) -> None:
    text = json.dumps({"text": "word " * 10_000_000})
    file = tmp_path / ("r.jsonl" if form == "lines" else "r.json")
    file.write_text(text if form == "lines" else f"[{text}, {text}]")
    started = time.perf_counter()
    assert [len(row["text"]) for row, _ in Records(path=file).stream()] == [50_000_000] * (1 if form == "lines" else 2)
    assert time.perf_counter() - started < 20


def test_an_array_larger_than_the_window_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} caf\xe9", "completion": "x" * (n % 5000)} for n in range(2_000)]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"about": {"n": 1}, "rows": rows}, ensure_ascii=False), encoding="utf-8")
    assert file.stat().st_size > 2**20
    assert contents(file) == rows
    source = Records(path=file)
    streamed = list(source.stream())
    assert list(source.stream(streamed[1499][1])) == streamed[1500:]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_gives_the_same_rows_whatever_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = [
        {"prompt": '\U0001f600\\"\n' * n, "completion": f"caf\xe9 {n}", "score": -1.5e-3, "more": [{"a": None}]}
        for n in range(8)
    ]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"about": "caf\xe9", "rows": rows, "rest": []}, ensure_ascii=False, indent=1), encoding="utf-8")
    source = Records(path=file)
    expected = list(source.stream())
    assert [row["prompt"] for row, _ in expected] == [row["prompt"] for row in rows]
    monkeypatch.setattr("qlora_records.json_text.CHUNK", chunk)
    assert list(source.stream()) == expected
    for index, (_, position) in enumerate(expected):
        assert list(source.stream(position)) == expected[index + 1 :]


@pytest.mark.parametrize("kind", FILES)
def test_damage_anywhere_is_a_data_error_or_harmless(tmp_path: Path, kind: str) -> None:
    name, write, _ = FILES[kind]
    file = tmp_path / name
    write(file)
    content, random = file.read_bytes(), Random(0)
    for _ in range(100):
        damaged = bytearray(content[: random.randrange(len(content)) if random.random() < 0.5 else None])
        for _ in range(2 if damaged else 0):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        file.write_bytes(damaged)
        said = ""
        try:
            list(Records(path=file).stream())
        except DataError as error:
            said = str(error)
        assert not said or said.startswith(f"{file}:")


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "missing.jsonl"}, "path: no file '"),
        ({"path": "no such/*.csv"}, "path: no file '"),
        ({"path": ""}, "path: the path is empty"),
        ({"path": __file__}, "which is not read; known: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
        ({"path": "a.jsonl", "subset": "main"}, "subset: only a dataset on the hub has one, and '"),
        ({"path": "a.jsonl", "eval_split": "test"}, "eval_split: only a dataset on the hub has one, and '"),
        ({"path": "a.jsonl", "split": "test"}, "split: only a dataset on the hub has one, and '"),
        (
            {"path": "a.jsonl", "format": "text", "prompt": "p"},
            "prompt: the format text does not use it; it uses text; leave it out, or",
        ),
        (
            {"path": "a.jsonl", "format": "tokenized", "text": "t"},
            "text: the format tokenized does not use it; it uses no column names",
        ),
        ({"path": "a.jsonl", "format": "instruction", "roles": {"a": "user"}}, "roles: the format instruction does not use it"),
        ({"path": "a.jsonl", "format": "chta"}, "did you mean 'chat'?"),
        ({"path": "a.jsonl", "roles": {"a": "boss"}}, "roles.a: must be 'system', 'user', 'assistant' or 'tool' (got 'boss')"),
        ({"path": "a.jsonl", "prompt": "a[].b[].c"}, "prompt: 'a[].b[].c' is no path into a row; write a.b, or a[].b"),
        (
            {"path": "a.jsonl", "prompt": "a[].b", "completion": "c[].d"},
            "completion: the columns walk through several lists (a, c)",
        ),
        ({"path": "a.jsonl", "text": " "}, "text: the name of the column is empty"),
        (
            {"path": "a.jsonl", "text": "t", "tools": "u"},
            "tools: no one format uses it together with text: text uses text; instruction uses",
        ),
        ({"path": "a.jsonl", "text": "t", "prompt": "u"}, "prompt: no one format uses it together with text"),
        (
            {"path": "a.jsonl", "messages": "t", "prompt": "u"},
            "messages: a chat comes from messages, or from prompt and completion; name either",
        ),
    ],
)
def test_options_that_can_t_work_are_refused(options: dict[str, Any], message: str) -> None:
    assert message in refused_options(**options)


def test_files_of_another_kind_are_refused_with_those_that_are_read(tmp_path: Path) -> None:
    for name, message in (
        ("a.txt", "raw text is read by the dataset 'text'"),
        ("a.jsnl", "did you mean '.jsonl'?"),
        ("a", "has no suffix, which is not read"),
        ("a.parquet.gz", ".parquet files are compressed inside; decompress it"),
    ):
        (tmp_path / name).write_bytes(b"x")
        assert message in refused_options(path=tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert "holds no .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file" in refused_options(path=tmp_path / "empty")


# The hub


def test_a_name_that_is_no_file_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Records(path="nobody/nothing", subset="main", eval_split="test", revision="v1")
    source.check(None, None)  # type: ignore[arg-type]
    assert source._source("train") == Hub("nobody/nothing", "main", "train", "v1")
    assert source._source("eval") == Hub("nobody/nothing", "main", "test", "v1")
    with pytest.raises(DataError, match=r"^nobody/nothing: neither a file or folder here, nor to be had from the hub"):
        source.examples("train")
    (tmp_path / "nobody").mkdir()
    lines(tmp_path / "nobody" / "nothing.jsonl", PAIR)
    assert Records(path="nobody/nothing.jsonl").options.path == str(tmp_path / "nobody" / "nothing.jsonl")


def test_rows_of_a_hub_dataset_are_stored_and_streamed(tmp_path: Path) -> None:
    from qlora_records.reading import read_records, stream_records

    lines(tmp_path / "train.jsonl", *({"question": f"{n}?", "answer": str(n)} for n in range(5)))
    hub, asked = Hub(str(tmp_path), None, "train", None), Records(path="owner/name").options.model_dump()
    rows = read_records(hub, asked, print).to_list()
    assert rows[4] == {"prompt": "4?", "completion": "4", "origin": f"{tmp_path}:train:row 5"}
    streamed = list(stream_records(hub, asked, print))
    assert [row | {"system": None} for row in rows] == [row for row, _ in streamed]
    assert list(stream_records(hub, asked, print, streamed[2][1])) == streamed[3:]
    sliced = Hub(str(tmp_path), None, "train[:2]", None)
    assert [row["prompt"] for row, _ in stream_records(sliced, asked, print)] == ["0?", "1?"]
    with pytest.raises(DataError, match='Unknown split "test"'):
        read_records(Hub(str(tmp_path), None, "test", None), asked, print)


# Real data


def real(name: str) -> Path:
    """Return the file of real data, or skip."""
    if not (DATA / name).is_file():
        pytest.skip(f"the real data {name} is not here")
    return DATA / name


def test_gsm8k() -> None:
    rows = rows_of(real("instruct/gsm8k_test.jsonl"))
    assert len(rows) == 1319
    assert rows[0] == {
        "prompt": "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for "
        "her friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How "
        "much in dollars does she make every day at the farmers' market?",
        "completion": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day at "
        "the farmer\u2019s market.\n#### 18",
        "origin": f"{DATA / 'instruct/gsm8k_test.jsonl'}:1",
    }


def test_self_instruct() -> None:
    rows = rows_of(real("instruct/self_instruct_seed_tasks.jsonl"))
    assert len(rows) == 175
    assert rows[0]["prompt"] == (
        "Is there anything I can eat for a breakfast that doesn't include eggs, yet includes protein, and has roughly 700-1000 "
        "calories?"
    )
    assert rows[1]["prompt"] == "What is the relation between the given pairs?\n\nNight : Day :: Right : Left"


def test_openassistant() -> None:
    rows = rows_of(real("chat/openassistant_messages.jsonl"))
    assert len(rows) == 100
    assert sum(len(row["messages"]) for row in rows) == 284
    assert rows[0]["messages"][0] == {"role": "user", "content": "How can I find the best 401k plan for my needs?"}


def test_sharegpt() -> None:
    rows = rows_of(real("chat/sharegpt_dummy.json"))
    assert len(rows) == 500
    vicuna = "I am Vicuna, a language model trained by researchers from Large Model Systems Organization (LMSYS)."
    said = [("user", "Who are you?"), ("assistant", vicuna), ("user", "Have a nice day!"), ("assistant", "You too!")]
    assert rows[0] == {
        "messages": [{"role": role, "content": content} for role, content in said],
        "origin": f"{DATA / 'chat/sharegpt_dummy.json'}:2",
    }


def test_importing_the_plugin_and_recognising_rows_imports_nothing_heavy() -> None:
    heavy = ("torch", "datasets", "pyarrow", "numpy")
    code = (
        f"import sys, qlora_records, qlora_records.rows, qlora_records.reading; print([n for n in {heavy} if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert recognise({"text": ""}, Records(path="owner/name").options.model_dump(), "here").columns == {"text": "text"}


def test_the_form_is_said_once_however_often_the_rows_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    source = Records(path=str(path))
    with caplog.at_level(logging.INFO, "qlora_core"):
        for _ in range(3):  # a stream is opened for every pass
            assert len(list(source.stream())) == 1
        source.examples("train")
    assert caplog.messages == ["records: prompts and completions from the columns prompt and completion"]
