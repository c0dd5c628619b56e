"""YAML as people write it: numbers, lines, duplicate keys, and what is no YAML at all."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_core import yaml_file
from qlora_core.errors import ConfigError


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        yaml_file.parse(text, "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("-1e3", -1000.0),
        ("+1.e3", 1000.0),
        ("2.0e-4", 2e-4),
        ("1e3", 1000.0),
        ("0.5", 0.5),
        ("3", 3),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("[a, 1e-4]", ["a", 1e-4]),
        ("{a: 1}", {"a": 1}),
        ("text", "text"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1e-4x", "1e-4x"),
        ("'2e-4'", "2e-4"),
    ],
)
def test_values_are_read_as_everybody_expects(text: str, value: Any) -> None:
    assert yaml_file.scalar(text) == value
    assert type(yaml_file.scalar(text)) is type(value)
    assert yaml_file.parse(f"key: {text}", "run.yaml")[0] == {"key": value}


@pytest.mark.parametrize(
    "text", ["[", "a: b: c", "2020-13-45", "!!timestamp x", "!!bool x", "!!int x", "!unknown x", "'x", "*a"]
)
def test_a_value_that_is_no_yaml_stays_the_text_that_it_is(text: str) -> None:
    assert yaml_file.scalar(text) == text


def test_every_key_has_the_line_that_it_stands_on() -> None:
    data, lines = yaml_file.parse("model: a\n\n# a comment\ncallbacks:\n  - progress\n  - name: x\n    y: 2\n", "run.yaml")
    assert data == {"model": "a", "callbacks": ["progress", {"name": "x", "y": 2}]}
    assert lines == {
        ("model",): 1,
        ("callbacks",): 4,
        ("callbacks", 0): 5,
        ("callbacks", 1): 6,
        ("callbacks", 1, "name"): 6,
        ("callbacks", 1, "y"): 7,
    }


def test_a_duplicate_key_names_line_and_column_and_where_the_first_one_is() -> None:
    assert refusal("model: a\ndata:\n  packing: true\n  packing: false\n") == (
        "run.yaml:4:3: duplicate key 'packing', first on line 3; remove one of them"
    )


def test_a_duplicate_section_is_refused_too() -> None:
    assert refusal("model: a\noutput: x\nmodel: b\n") == (
        "run.yaml:3:1: duplicate key 'model', first on line 1; remove one of them"
    )


def test_the_same_key_in_two_sections_is_no_duplicate() -> None:
    assert yaml_file.parse("a: {name: x}\nb: [{name: y}, {name: z}]", "run.yaml")[0] == {
        "a": {"name": "x"},
        "b": [{"name": "y"}, {"name": "z"}],
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: a\n  data: b", "run.yaml:2:7"),
        ("model: 'a", "run.yaml:1:10"),
        ("model: [a", "run.yaml:1:10"),
        ("model: a\n\tdata: b", "run.yaml:2:1"),
        ("a: 1\n---\nb: 2", "run.yaml:2:1"),
        ("? [a]\n: b", "run.yaml:1:3"),
        ("a: !!python/object/apply:os.system [x]", "run.yaml:1:4"),
        ("a: !unknown x", "run.yaml:1:4"),
        ("a: *nowhere", "run.yaml:1:4"),
        ("<<: 1", "run.yaml:1:5"),
    ],
)
def test_what_is_no_yaml_is_refused_with_line_and_column(text: str, place: str) -> None:
    assert refusal(text).startswith(f"{place}: not valid YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "&a {a: *a}",
        "a: \x00",
        "a: 2020-13-45",
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!binary x",
        "a: " + "1" * 5000,
        "[" * 3000,
        "{" * 3000,
    ],
)
def test_odd_yaml_is_refused_by_name_and_never_crashes(text: str) -> None:
    assert refusal(text).startswith("run.yaml")
    assert "not valid YAML: " in refusal(text)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("!!int x", "3:6: not valid YAML: 'x' is no valid int (invalid literal for int() with base 10: 'x')"),
        ("!!bool x", "3:6: not valid YAML: 'x' is no valid bool ('x')"),
        ("2020-13-45", "3:6: not valid YAML: '2020-13-45' is no valid timestamp (month must be in 1..12)"),
        ("\x00", "3: not valid YAML: the character U+0000 can't stand in it"),
        ("[" * 1500, "3: not valid YAML: too many brackets within each other"),
        ("[" * 101 + "]" * 101, "3:105: not valid YAML: more than 100 sections and lists within each other"),
    ],
)
def test_odd_yaml_is_refused_with_its_line(value: str, what: str) -> None:
    assert refusal(f"a: 1\nb:\n  c: {value}\n") == f"run.yaml:{what}"


def test_a_file_name_that_no_system_takes_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_file.read(Path("a\x00"))
    assert str(caught.value) == "a\x00: embedded null byte; name an existing YAML file"


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("word", "str"), ("3", "int"), ("!!set {a}", "set")])
def test_a_document_that_is_no_mapping_says_what_it_is(text: str, kind: str) -> None:
    assert refusal(f"# one\n{text}") == f"run.yaml:2: must be a mapping of sections such as 'model:' (got {kind})"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_document_is_an_empty_mapping(text: str) -> None:
    assert yaml_file.parse(text, "run.yaml")[0] == {}


def test_anchors_and_merge_keys_are_followed() -> None:
    data, _ = yaml_file.parse("base: &b {r: 8, alpha: 16}\nadapter: {<<: *b, alpha: 32}\nsame: *b", "run.yaml")
    assert data["adapter"] == {"r": 8, "alpha": 32}
    assert data["same"] == {"r": 8, "alpha": 16}


def test_aliases_of_aliases_take_no_longer_than_the_file_is_long() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert len(yaml_file.parse("\n".join(lines[:3]), "run.yaml")[0]["a2"]) == 10
    started = time.perf_counter()
    assert refusal("\n".join(lines)) == (
        "run.yaml:4:5: not valid YAML: aliases repeat more than 10,000 values; write what is meant"
    ), "what they stand for could not be shown in a message, or written"
    assert yaml_file.scalar(f"{{{', '.join(lines)}}}").startswith("{a0: &a0 ["), "of --set, too"
    assert time.perf_counter() - started < 1


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("model: a\n".encode("utf-8-sig"))
    assert yaml_file.read(path)[0] == {"model": "a"}


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_file.read(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: no such file or directory; name an existing YAML file"


def test_a_folder_in_place_of_a_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_file.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory; name an existing YAML file"


def test_a_file_in_another_encoding_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("# one\nmodel: é".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        yaml_file.read(path)
    assert str(caught.value) == f"{path}:2: not UTF-8 at byte 13; save the file as UTF-8"


@pytest.mark.parametrize(
    "value",
    [
        "2e4",
        "1e-4",
        "1_000",
        "=",
        "~",
        "on",
        "null",
        "2020-01-01",
        "0o7",
        "1:30",
        "a: b",
        "é",
        "- x",
        "# x",
        "",
        " x ",
        "a\nb",
        "\n\n",
        "\t",
        "\u2028",
        "\x00",
        "🦙",
        "'",
        '"',
        "%",
        "<<",
        "x" * 500,
        "word " * 60,
        2e-4,
        1e-30,
        1e30,
        0.1,
        3,
        True,
        None,
        [],
        ["a", ["b"]],
        {"a": {"b": None}},
    ],
)
def test_what_is_dumped_reads_back_as_the_same(value: Any) -> None:
    read, _ = yaml_file.parse(yaml_file.dump({"key": value}), "run.yaml")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


def test_infinity_and_nan_are_dumped_so_that_they_read_back() -> None:
    read, _ = yaml_file.parse(yaml_file.dump({"a": math.inf, "b": math.nan}), "run.yaml")
    assert read["a"] == math.inf
    assert math.isnan(read["b"])


def test_the_order_of_keys_is_kept() -> None:
    assert yaml_file.dump({"b": 1, "a": 2}) == "b: 1\na: 2\n"
