"""The configuration as JSON Schema and as a commented file, with the options of the installed plugins. Imports no torch."""

from __future__ import annotations

import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from qlora_core.config import RunConfig
from qlora_core.providers import Provider
from qlora_core.registry import Registry
from qlora_core.yaml_file import scalar

__all__ = ["config_schema", "default_of", "default_text", "starter_config", "type_text"]

SECTIONS = {
    "quantizer": "quantizer",
    "adapter": "adapter",
    "dataset": "dataset",
    "kernels": "kernels",
    "callbacks": "callback",
    "exports": "exporter",
}
LISTS = ("callbacks", "exports")

_AUTO: list[dict[str, Any]] = [
    {"enum": ["auto"]},
    {"type": "object", "properties": {"name": {"enum": ["auto"]}}, "required": ["name"], "additionalProperties": False},
]


def config_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file; each provider's options are the installed ones."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    weight = definitions.pop("SourceConfig")["properties"]["weight"]
    definitions.pop("ProviderConfig", None)
    properties = schema["properties"]
    for section, kind in SECTIONS.items():
        choices: list[dict[str, Any]] = [*_AUTO] if section == "kernels" else []
        for found in registry.provided(kind):
            options = _options_schema(found.provider)
            definitions |= options.pop("$defs", {})
            names = {"enum": [found.provider.name, found.qualified]}
            choices += [
                names,
                {
                    "type": "object",
                    "description": options.get("description", ""),
                    "properties": {"name": names, **options["properties"]} if "properties" in options else {"name": names},
                    "required": ["name", *options.get("required", [])],
                    "additionalProperties": "properties" not in options,  # False but where the options are not known
                },
            ]
        described = {"description": properties[section]["description"]}
        one: dict[str, Any] = {"anyOf": choices}
        properties[section] = {"type": "array", "items": one, **described} if section in LISTS else {**one, **described}
        if section == "dataset":
            several = {"type": "array", "minItems": 1, "items": {"anyOf": [_weighted(choice, weight) for choice in choices]}}
            properties[section] = {"anyOf": [*choices, several], **described}
    properties["model"] = {"anyOf": [{"type": "string"}, properties["model"]]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _weighted(choice: dict[str, Any], weight: dict[str, Any]) -> dict[str, Any]:
    """Return the schema *choice* of a provider with the key `weight` beside its options."""
    return {**choice, "properties": {**choice["properties"], "weight": weight}} if "properties" in choice else choice


def _options_schema(provider: type[Provider]) -> dict[str, Any]:
    """Return the JSON Schema of the options of *provider*; that of any mapping where pydantic can't write one."""
    try:
        return provider.Options.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        return {"description": f"{provider.name}: no JSON Schema, {error.message}"}


def starter_config(registry: Registry, *, model: str, data: str, output: str) -> str:
    """Return a commented configuration to start from: every key with its default and what it does."""
    lines = ["# A run of qlora-core. `qlora train FILE` runs it; `qlora config show FILE` shows it resolved.", ""]
    providers = {"quantizer": "nf4", "adapter": "lora", "dataset": "text"}
    for section, field in RunConfig.model_fields.items():
        if section == "model":
            lines += [f"# {field.description}", f"model: {_yaml(model)}", ""]
        elif section == "output":
            lines += [f"# {field.description}", f"output: {_yaml(output)}", ""]
        elif section in providers:
            name = providers[section]
            kind = registry.find(SECTIONS[section], name).provider
            others = ", ".join(found.provider.name for found in registry.provided(SECTIONS[section]))
            lines += [f"# {field.description}; installed: {others}", f"{section}:", f"  name: {name}"]
            lines += [*_fields(kind.Options, {"path": data}), ""]
        elif section == "callbacks":
            lines += [f"# {field.description}", "callbacks: [progress]", ""]
        elif section == "exports":
            lines += [f"# {field.description}", "exports: []", ""]
        elif section == "kernels":
            lines += [f"# {field.description}", "kernels: auto", ""]
        elif isinstance(field.default, BaseModel):
            lines += [f"# {field.description}", f"{section}:", *_fields(type(field.default), {}), ""]
        else:
            lines += [f"# {field.description}", f"{section}: {_yaml(list(field.default))}", ""]
    return "\n".join(lines)


def type_text(annotation: Any) -> str:
    """Return *annotation* as people read it: "nf4 | fp4", "list of text", "whole number"."""
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        type(None): "nothing",
        Any: "anything",
    }
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin in (list, tuple, set, frozenset):
        return f"list of {type_text(arguments[0])}" if arguments else "list"
    if origin is dict:
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def default_text(field: FieldInfo) -> str:
    """Return the default of *field* as it would be written, or "required"."""
    return "required" if field.is_required() else _yaml(default_of(field))


def default_of(field: FieldInfo) -> Any:
    """Return the default of *field*, JSON-ready; what JSON has no form for, and a stranger's may be anything, as text."""
    try:
        return to_jsonable_python(field.get_default(call_default_factory=True), fallback=repr)
    except Exception:  # a default that can't be copied, or a factory that raises
        return f"a {type(field.default).__name__}"


def _fields(model: type[BaseModel], values: dict[str, Any]) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        value = values.get(name, None if field.is_required() else default_of(field))
        lines.append(f"  {f'{name}: {_yaml(value)}':<34} # {field.description or ''}")
    return lines


def _yaml(value: Any) -> str:
    """Return *value* on one line; JSON is YAML, and plain words need no quotes."""
    if isinstance(value, str) and re.fullmatch(r"\w[\w./-]*", value) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
