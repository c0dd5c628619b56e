"""Read YAML with the line of every key, refusing duplicate keys. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_core.errors import ConfigError

__all__ = ["dump", "parse", "read", "scalar"]

Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number, as YAML 1.2 and everybody's expectation do."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text 2e-4, so that it stays text."""


_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))

# What the parser raises beside its own errors: for 2020-13-45, !!bool x, !!timestamp x, and a thousand brackets.
_ODD = (ValueError, KeyError, AttributeError, RecursionError)


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in the file at *path* and the line of each key; raise ConfigError with line and column."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}; name an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in *text* and the line of each key, 1-based; *name* stands in messages."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines: Lines = {}
        if root is not None:
            _walk(root, (), lines, name, {})
        data = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{name}{at}: not valid YAML: {error.problem or error.context}") from error
    except ConfigError:  # a duplicate key; it is a ValueError too
        raise
    except (yaml.YAMLError, *_ODD) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if data is None:
        return {}, {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: must be a mapping of sections such as 'model:' (got {type(data).__name__})")
    return dict(data), lines


def scalar(text: str) -> Any:
    """Return the value that *text* has in YAML: 3, 1e-4, true, [a, b], text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, *_ODD):
        return text


def dump(data: Mapping[str, Any]) -> str:
    """Return *data* as YAML, in its own order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _walk(node: yaml.Node, where: tuple[str | int, ...], lines: Lines, name: str, inside: dict[int, bool]) -> None:
    """Note the lines of all keys under *node*. An alias is not walked again; one within itself is refused."""
    if inside.get(id(node)):
        at = f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        raise ConfigError(f"{name}:{at}: not valid YAML: an alias stands within what it repeats")
    if id(node) in inside:
        return
    inside[id(node)] = True
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*where, index)] = item.start_mark.line + 1
            _walk(item, (*where, index), lines, name, inside)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*where, str(key.value))
            if place in lines:
                raise ConfigError(
                    f"{name}:{key.start_mark.line + 1}:{key.start_mark.column + 1}: duplicate key {key.value!r}, "
                    f"first on line {lines[place]}; remove one of them"
                )
            lines[place] = key.start_mark.line + 1
            _walk(value, place, lines, name, inside)
    inside[id(node)] = False
