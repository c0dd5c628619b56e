"""The configuration as JSON Schema and as a commented file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic.fields import FieldInfo

from qlora_core import yaml_file
from qlora_core.config import RunConfig
from qlora_core.parts import resolve
from qlora_core.registry import Registry
from qlora_core.schema import config_schema, default_text, starter_config, type_text


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return config_schema(Registry())


def choice(schema: dict[str, Any], section: str, name: str) -> dict[str, Any]:
    """Return the long form of provider *name* in *section*."""
    place = schema["properties"][section]
    choices = place["items"]["anyOf"] if "items" in place else place["anyOf"]
    return next(c for c in choices if c.get("type") == "object" and name in c["properties"]["name"]["enum"])


def test_the_schema_has_every_section_and_says_which_are_required(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["required"] == ["model", "dataset"]
    assert schema["additionalProperties"] is False
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_schema_is_plain_json_and_all_its_references_resolve(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    assert json.loads(text) == schema

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if "$ref" in node else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    assert references(schema) == {f"#/$defs/{name}" for name in schema["$defs"]}


def test_the_schema_holds_the_options_of_installed_plugins(schema: dict[str, Any]) -> None:
    lora = choice(schema, "adapter", "lora")
    assert lora["properties"]["name"]["enum"] == ["lora", "peft:lora"]
    assert lora["properties"]["r"]["minimum"] == 1
    assert lora["properties"]["r"]["default"] == 16
    assert lora["additionalProperties"] is False
    assert choice(schema, "dataset", "text")["required"] == ["name", "path"]
    assert choice(schema, "callbacks", "early_stopping")["properties"]["patience"]["default"] == 3


def test_the_schema_allows_short_forms(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    assert {"type": "string"} in properties["model"]["anyOf"]
    assert {"enum": ["nf4", "bitsandbytes:nf4"]} in properties["quantizer"]["anyOf"]
    assert {"enum": ["auto"]} in properties["kernels"]["anyOf"]
    assert {"enum": ["progress", "console:progress"]} in properties["callbacks"]["items"]["anyOf"]


def test_every_key_of_the_schema_is_described(schema: dict[str, Any]) -> None:
    for section in ("DataConfig", "ModelConfig", "TokensConfig", "TrainingConfig"):
        assert all(field.get("description") for field in schema["$defs"][section]["properties"].values())
    assert all(place.get("description") or "anyOf" in place for place in schema["properties"].values())


def test_the_schema_follows_what_is_installed(write_module: Callable[[str, str], str]) -> None:
    name = write_module(
        "schema_plugin",
        """
        from typing import Literal
        from pydantic import BaseModel
        import qlora_core

        class Part(BaseModel):
            depth: int = 1

        class Bell(qlora_core.CallbackFactory):
            name = "bell"
            class Options(qlora_core.ProviderOptions):
                part: Part = Part()
            def build(self, run): return None

        @qlora_core.hookimpl
        def qlora_callbacks(): return [Bell]
        """,
    )
    schema = config_schema(Registry(modules=[name], disable=["peft"]))
    assert choice(schema, "callbacks", "bell")["properties"]["name"]["enum"] == ["bell", "schema_plugin:bell"]
    assert schema["$defs"]["Part"]["properties"]["depth"]["default"] == 1
    assert not any("lora" in json.dumps(c) for c in schema["properties"]["adapter"]["anyOf"])


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    text = starter_config(Registry(), model="owner/model", data="my corpus.txt", output="runs/first")
    path.write_text(text, encoding="utf-8")
    return path


def test_the_starter_file_is_a_valid_configuration_with_the_defaults(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = RunConfig.parse(
        {"model": "owner/model", "dataset": {"name": "text", "path": "my corpus.txt"}, "output": "runs/first"}
    )
    assert resolve(RunConfig.read(starter), Registry())[0] == resolve(plain, Registry())[0]


def test_the_starter_file_explains_every_key(starter: Path) -> None:
    lines = [line for line in starter.read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    assert len(lines) > 30
    assert all("# " in line or line.startswith("  name: ") for line in lines)


def test_the_starter_file_names_what_else_is_installed(starter: Path) -> None:
    text = starter.read_text(encoding="utf-8")
    assert "# how the frozen base model is stored; installed: ao_int8, fp4, int8, nf4, none" in text


@pytest.mark.parametrize(
    "word",
    ["123", "1e5", "true", "null", "no", "a: b", "# x", "2020-01-01", "été", "🦙", ".", "-x", "../a b", "C:\\texts", "~"],
)
def test_the_starter_file_quotes_what_yaml_would_read_as_something_else(word: str) -> None:
    data, _ = yaml_file.parse(starter_config(Registry(), model=word, data=word, output=word), "run.yaml")
    assert (data["model"], data["dataset"]["path"], data["output"]) == (word, word, word)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "whole number"),
        (float, "number"),
        (bool, "true or false"),
        (str, "text"),
        (Any, "anything"),
        (Literal["a", "b"], "a | b"),
        (str | None, "text | nothing"),
        (tuple[str, ...], "list of text"),
        (list[int], "list of whole number"),
        (str | tuple[str, ...] | None, "text | list of text | nothing"),
        (dict[str, Any], "mapping"),
        (Path, "Path"),
    ],
)
def test_types_read_as_people_say_them(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


@pytest.mark.parametrize(
    ("default", "text"),
    [
        (16, "16"),
        (32.0, "32.0"),
        (True, "true"),
        (None, "null"),
        ("all-linear", "all-linear"),
        ("\n", '"\\n"'),
        ((), "[]"),
        ({}, "{}"),
    ],
)
def test_defaults_read_as_they_would_be_written(default: Any, text: str) -> None:
    assert default_text(FieldInfo(default=default)) == text


def test_a_field_without_a_default_is_required() -> None:
    assert default_text(FieldInfo(annotation=int)) == "required"


ODD = """
    import threading
    from pydantic import ConfigDict
    from qlora_core import CallbackFactory, ProviderOptions, hookimpl

    class Odd(CallbackFactory):
        "Options that no JSON Schema can describe."
        name = "odd"

        class Options(ProviderOptions):
            model_config = ConfigDict(arbitrary_types_allowed=True)
            lock: threading.Thread | None = None
            "a thread"

        def build(self, run): return None

    @hookimpl
    def qlora_callbacks(): return [Odd]
"""


def test_options_without_a_json_schema_are_let_be_and_the_rest_is_described(write_module: Callable[[str, str], str]) -> None:
    schema = config_schema(Registry(modules=[write_module("odd_options", ODD)]))
    choices = schema["properties"]["callbacks"]["items"]["anyOf"]
    described = {choice["properties"]["name"]["enum"][0]: choice for choice in choices if choice.get("type") == "object"}
    assert described["odd"]["additionalProperties"] is True
    assert described["odd"]["description"].startswith("odd: no JSON Schema, ")
    assert described["early_stopping"]["additionalProperties"] is False
    assert "patience" in described["early_stopping"]["properties"]
