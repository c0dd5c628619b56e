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

# What the parser raises beside its own errors: for 2020-13-45, !!bool x, !!timestamp x, and a thousand brackets.
_ODD = (ValueError, KeyError, AttributeError, RecursionError)

DEPTH = 100  # sections and lists within each other
REPEATED = 10_000  # values that aliases repeat: ten lines can stand for more than any memory holds

NO_KEYS = {"null": "nothing", "bool": "true or false", "int": "a number", "float": "a number", "timestamp": "a date"}
"""The types of keys that are no text, in words: YAML reads on, no and 1 so."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number, as YAML 1.2 and everybody's expectation do."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of *node*; what is none of its type is refused with its place."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("it does not fit into 64 bits")
            if isinstance(value, bytes):
                raise ValueError("a configuration holds text; write it as such")
        except _ODD as error:
            kind = node.tag.rpartition(":")[2]
            shown = repr(node.value)[:60] if isinstance(node, yaml.ScalarNode) else "this"
            what = f"{shown} is no valid {kind} ({error})"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error
        return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text 2e-4, so that it stays text."""


_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in the file at *path* and the line of each key; raise ConfigError with line and column."""
    try:
        content = path.read_bytes()
        text = content.decode()
    except (OSError, ValueError) as error:  # ValueError: no file has a name with NUL in it
        if isinstance(error, UnicodeDecodeError):
            line = content[: error.start].count(b"\n") + 1
            raise ConfigError(f"{path}:{line}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: {why.lower()}; name an existing YAML file") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in *text* and the line of each key, 1-based; *name* stands in messages."""
    walk, reached = _Walk(name), 1
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            reached = loader.line + 1
        if root is not None:
            walk(root)
        data = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{name}{at}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = len(f"{text[: error.position]}.".splitlines())
        raise ConfigError(f"{name}:{line}: not valid YAML: the character U+{error.character:04X} can't stand in it") from error
    except ConfigError:  # what the walk refuses; it is a ValueError too
        raise
    except (yaml.YAMLError, *_ODD) as error:
        why = "too many brackets within each other" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{name}:{reached}: not valid YAML: {why}") from error
    if data is None:
        return {}, {}
    if not isinstance(data, Mapping):
        line = root.start_mark.line + 1 if root is not None else 1
        raise ConfigError(f"{name}:{line}: must be a mapping of sections such as 'model:' (got {type(data).__name__})")
    return dict(data), walk.lines


def scalar(text: str) -> Any:
    """Return the value that *text* has in YAML: 3, 1e-4, true, [a, b], text."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _Walk("")(root)
        return loader.construct_document(root)
    except (yaml.YAMLError, *_ODD):
        return text


def dump(data: Mapping[str, Any]) -> str:
    """Return *data* as YAML, in its own order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Walk:
    """Notes the line of every key under a node, and refuses what is endless or far larger than it is written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: Lines = {}
        self._sizes: dict[int, int] = {}  # values that a node stands for, by its id; 0 while it is walked

    def __call__(self, node: yaml.Node, where: tuple[str | int, ...] = ()) -> int:
        """Return the number of values that *node* stands for. An alias is not walked again; one within itself is refused."""
        if id(node) in self._sizes:
            if not self._sizes[id(node)]:
                raise self._refusal(node, "an alias stands within what it repeats")
            return self._sizes[id(node)]
        if len(where) > DEPTH:
            raise self._refusal(node, f"more than {DEPTH} sections and lists within each other")
        self._sizes[id(node)] = 0
        size = 1
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[(*where, index)] = item.start_mark.line + 1
                size += self(item, (*where, index))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                size += self(value, self._key(key, where))
        if size - len(self._sizes) > REPEATED:
            raise self._refusal(node, f"aliases repeat more than {REPEATED:,} values; write what is meant")
        self._sizes[id(node)] = size
        return size

    def _key(self, key: yaml.Node, where: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Return the place of *key*, its line noted; raise ConfigError for one that stands there twice."""
        if not isinstance(key, yaml.ScalarNode):
            raise self._refusal(key, "a key must be one word")
        if key.tag.rpartition(":")[2] in NO_KEYS:
            raise self._refusal(
                key, f"the key {key.value} is read as {NO_KEYS[key.tag.rpartition(':')[2]]}; put it into quotes"
            )
        place = (*where, str(key.value))
        if place in self.lines:
            raise ConfigError(
                f"{self.name}:{key.start_mark.line + 1}:{key.start_mark.column + 1}: duplicate key {key.value!r}, "
                f"first on line {self.lines[place]}; remove one of them"
            )
        self.lines[place] = key.start_mark.line + 1
        return place

    def _refusal(self, node: yaml.Node, what: str) -> ConfigError:
        at = f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        return ConfigError(f"{self.name}:{at}: not valid YAML: {what}")
