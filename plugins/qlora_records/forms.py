"""Recognise what rows are from the columns of the first one. Light."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_core.errors import DataError
from qlora_core.validation import did_you_mean
from qlora_records import COLUMNS

Kind = Literal["text", "instruction", "chat", "turns", "tokenized"]

CHATS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("instruction", "instances[].output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
    ("inputs", "targets"),
    ("source", "target"),
)
"""The columns that are a prompt and its completion, the first that fit are taken."""

SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools",)
INPUTS = ("input", "context")
"""The columns of optional parts; each row may have another one of them."""

SHOWN = 8  # columns that are not used, in what is said of the form
KNOWN = (
    "recognised are messages or conversations, input_ids, text, and the pairs "
    + ", ".join(f"{prompt}/{completion}" for prompt, completion in PAIRS)
    + "; name the columns: prompt and completion, or messages, or text"
)

ABSENT = object()
"""What stands at a path that a row does not have."""


@dataclass(frozen=True)
class Form:
    """What a row is, and which column each part of it is taken from."""

    kind: Kind
    columns: Mapping[str, str]
    """The parts that every row must have."""
    optional: Mapping[str, tuple[str, ...]]
    """The parts that a row may lack, and the columns that each may stand in; the first that holds something is taken."""
    first: tuple[str, ...]
    """The columns of the first row."""
    seen: Mapping[str, str]
    """The optional parts that the first row has, and where."""
    unused: tuple[str, ...]
    """The columns of the first row that no part is taken from."""
    detail: str = ""
    """What more there is to say of it."""

    def __str__(self) -> str:
        what = {
            "text": "texts",
            "instruction": "prompts and completions",
            "chat": f"chats{self.detail}",
            "turns": "chats (prompts and completions that are lists of messages)",
            "tokenized": "token ids",
        }[self.kind]
        parts = list(self.columns.values())
        parts += [path if path == name else f"{path} ({name})" for name, path in self.seen.items()]
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
        more = f" and {len(self.unused) - SHOWN} more" if len(self.unused) > SHOWN else ""
        unused = f"; not used: {', '.join(self.unused[:SHOWN])}{more}" if self.unused else ""
        return f"{what} from the column{'s' if parts[1:] else ''} {listed}{unused}"


def recognise(row: Mapping[str, Any], asked: Mapping[str, Any], origin: str) -> Form:
    """Return the form of the rows of which *row*, from *origin*, is the first; *asked* are the options of `records`.

    Raises DataError where a column that is named is not there, and where no form fits.
    """
    named = {name: asked[name] for name in COLUMNS if asked[name] is not None}
    columns = columns_of(row)
    for name, path in named.items():
        if not _has(row, path):
            guess = did_you_mean(path, [*columns, *row])
            raise DataError(
                f"{origin}: no column {path!r}, which dataset.{name} names; the columns are {', '.join(columns)}{guess}"
            )
    finders: dict[str, Callable[..., Form | None]] = {
        "chat": _chat,
        "tokenized": _tokenized,
        "instruction": _instruction,
        "text": _text,
    }
    wanted = [asked["format"]] if asked["format"] != "auto" else list(finders)
    for kind in wanted:
        form = finders[kind](row, named)
        if form is not None and set(named) <= {*form.columns, *form.optional}:
            return form
    if named and asked["format"] == "auto":
        what = f"dataset.{' and dataset.'.join(named)} can't be completed to rows of one form"
    else:
        what = "nothing to train on is recognised" if asked["format"] == "auto" else f"no {asked['format']} is recognised"
    raise DataError(f"{origin}: {what}; the columns are {', '.join(columns)}; {KNOWN}")


def columns_of(values: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row, for objects (a.b) and lists of objects (a[].b) those inside."""
    found: list[str] = []
    for name, value in values.items():
        item = value[0] if isinstance(value, list) and value else value
        inner = [f"{name}{'[]' if item is not value else ''}.{key}" for key in item] if isinstance(item, dict) else []
        found += inner or [name]
    return found


def _form(
    kind: Kind, row: Mapping[str, Any], columns: Mapping[str, str], optional: Mapping[str, tuple[str, ...]] | None = None
) -> Form:
    given = optional or {}
    found = {name: first_of(paths, lambda path: _first_value(row, path)) for name, paths in given.items()}
    seen = {name: path for name, (path, value) in found.items() if value is not ABSENT}
    return Form(kind, dict(columns), dict(given), tuple(row), seen, _unused(row, {*columns.values(), *seen.values()}))


def _unused(row: Mapping[str, Any], used: set[str]) -> tuple[str, ...]:
    """Return the columns of *row* beside those *used*; of one that is used in part, those inside."""
    unused: list[str] = []
    for name, value in row.items():
        if name not in used:
            inner = columns_of({name: value}) if any(_within(path, name) for path in used) else [name]
            unused += [path for path in inner if not any(_within(path, one) or _within(one, path) for one in used)]
    return tuple(unused)


def _within(path: str, outer: str) -> bool:
    return f"{path}.".startswith((f"{outer}.", f"{outer}[]"))


def _chat(row: Mapping[str, Any], named: Mapping[str, str]) -> Form | None:
    if "prompt" in named or "completion" in named:
        return _turns(row, named)
    candidates = [named["messages"]] if "messages" in named else [name for name in CHATS if _is_list(row.get(name))]
    if not candidates:
        return _turns(row, named)
    optional = {"system": _candidates("system", SYSTEMS, named), "tools": _candidates("tools", TOOLS, named)}
    turns = _first_value(row, candidates[0])
    sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") is not None
    detail = " (ShareGPT conversations)" if sharegpt else " (OpenAI messages)"
    return replace(_form("chat", row, {"messages": candidates[0]}, optional), detail=detail)


def _turns(row: Mapping[str, Any], named: Mapping[str, str]) -> Form | None:
    """Return the form of prompts and completions that are lists of messages."""
    pair = _pair(row, named)
    if pair is None or not all(isinstance(_first_value(row, path), list) for path in pair):
        return None
    optional = {"system": _candidates("system", SYSTEMS, named), "tools": _candidates("tools", TOOLS, named)}
    return _form("turns", row, {"prompt": pair[0], "completion": pair[1]}, optional)


def _instruction(row: Mapping[str, Any], named: Mapping[str, str]) -> Form | None:
    pair = _pair(row, named)
    if pair is None:
        return None
    if all(isinstance(_first_value(row, path), list) for path in pair):
        return _turns(row, named)
    walked = [f"{pair[1].partition('[]')[0]}[].input"] if "[]" in pair[1] else []
    # what is no text, such as the paragraphs of HotpotQA, is no input
    inputs = [path for path in (*walked, *INPUTS) if path not in pair and not isinstance(_first_value(row, path), list | dict)]
    optional = {"system": _candidates("system", SYSTEMS, named), "input": _candidates("input", inputs, named)}
    return _form("instruction", row, {"prompt": pair[0], "completion": pair[1]}, optional)


def _pair(row: Mapping[str, Any], named: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the columns of prompt and completion: those named, and for one that is not, what usually goes with the other."""
    if "prompt" in named and "completion" in named:
        return named["prompt"], named["completion"]
    if "prompt" in named:  # whatever its name, the usual names of an answer are tried
        pairs = [(named["prompt"], completion) for _, completion in PAIRS]
    elif "completion" in named:
        pairs = [(prompt, named["completion"]) for prompt, _ in PAIRS]
    else:
        pairs = list(PAIRS)
    taken = set(named.values())
    for prompt, completion in pairs:
        others = taken - {named.get("prompt"), named.get("completion")}
        if prompt != completion and not {prompt, completion} & others and _has(row, prompt) and _has(row, completion):
            return prompt, completion
    return None


def _tokenized(row: Mapping[str, Any], named: Mapping[str, str]) -> Form | None:
    if named or "input_ids" not in row:
        return None
    columns = {name: name for name in ("input_ids", "labels") if name in row}
    return _form("tokenized", row, columns, {"attention_mask": ("attention_mask",)})


def _text(row: Mapping[str, Any], named: Mapping[str, str]) -> Form | None:
    path = named.get("text", "text")
    return _form("text", row, {"text": path}) if _has(row, path) else None


def _candidates(part: str, known: Sequence[str], named: Mapping[str, str]) -> tuple[str, ...]:
    return (named[part],) if part in named else tuple(path for path in known if path not in named.values())


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def value_at(row: Any, path: str) -> Any:
    """Return what stands at *path* (a.b) in *row*, or ABSENT."""
    if path in row:
        return row[path]
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return ABSENT
        row = row[key]
    return row


def first_of(paths: Sequence[str], get: Callable[[str], Any]) -> tuple[str, Any]:
    """Return the first of *paths* at which *get* finds something, and what; else one that is empty, else ABSENT."""
    found = [(path, value) for path in paths if (value := get(path)) is not ABSENT]
    return next((one for one in found if one[1] not in (None, "", [])), found[0] if found else ("", ABSENT))


def _first_value(row: Mapping[str, Any], path: str) -> Any:
    """Return what stands at *path* (a.b or a[].b) in *row*, of a list its first item; None for an empty list, or ABSENT."""
    if "[]" not in path or path in row:
        return value_at(row, path)
    name, _, rest = path.partition("[]")
    items = value_at(row, name)
    if not isinstance(items, list):
        return ABSENT
    if not items:
        return None
    if not rest:
        return items[0]
    return value_at(items[0], rest[1:]) if isinstance(items[0], dict) else ABSENT


def _has(row: Mapping[str, Any], path: str) -> bool:
    return _first_value(row, path) is not ABSENT
