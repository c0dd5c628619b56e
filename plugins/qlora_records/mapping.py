"""Take from each row what its form says, and refuse a row that does not have it. Light."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_core.errors import DataError
from qlora_records.forms import ABSENT, Form, columns_of, first_of, value_at
from qlora_records.json_text import kind_of
from qlora_records.turns import conversation, tools_of

Parts = dict[str, tuple[str, Any]]
"""What a row holds of each part of its form, and where."""


class Mapper:
    """Makes of each row what its form says: rows with the columns that a dataset source gives."""

    def __init__(self, form: Form, roles: Mapping[str, str]) -> None:
        self.form = form
        self._roles = roles
        paths = [*form.columns.values(), *(path for known in form.optional.values() for path in known)]
        walked = [path for path in paths if "[]" in path and path not in form.first]
        self._list = walked[0].partition("[]")[0] if walked else None
        # of a path into the list, what follows the brackets; the item itself where nothing does
        self._inner = {path: path.partition("[]")[2][1:] for path in walked}
        self._make = {
            "text": self._text,
            "instruction": self._instruction,
            "chat": self._chat,
            "turns": self._chat,
            "tokenized": self._tokens,
        }[form.kind]

    def rows(self, values: dict[str, Any], origin: str) -> Iterator[dict[str, Any]]:
        """Yield what *values*, a row from *origin*, gives: one row, or one per item of the list that is walked through."""
        for item in self._items(values, origin):

            def get(path: str, item: Any = item) -> Any:
                inner = self._inner.get(path)
                if inner is None:
                    return value_at(values, path)
                return item if inner == "" else value_at(item, inner) if isinstance(item, dict) else ABSENT

            found = {name: (path, get(path)) for name, path in self.form.columns.items()}
            for path, value in found.values():
                if value is ABSENT:
                    raise self._differs(path, values, origin)
            found |= {name: first_of(paths, get) for name, paths in self.form.optional.items()}
            found = {name: part for name, part in found.items() if part[1] is not ABSENT}
            if self.form.kind == "tokenized" and "labels" in values and "labels" not in found:
                raise self._differs("labels", values, origin)
            yield self._make(found, origin) | {"origin": origin}

    def _items(self, values: dict[str, Any], origin: str) -> Iterable[Any]:
        if self._list is None:
            return (None,)
        items = value_at(values, self._list)
        if items is ABSENT:
            raise self._differs(self._list, values, origin)
        if not isinstance(items, list):
            raise DataError(f"{origin}: {self._list} is {kind_of(items)}, not a list; the columns say {self._list}[]")
        return items

    def _differs(self, path: str, values: dict[str, Any], origin: str) -> DataError:
        has = ", ".join(columns_of(values) if set(values) == set(self.form.first) else values) or "none"
        what = f"no column {path!r}" if path not in values else f"a column {path!r}"
        first = ", ".join(self.form.first)
        return DataError(f"{origin}: {what}; the row has {has}, the first row has {first}; every row must have the same")

    def _text(self, found: Parts, origin: str) -> dict[str, Any]:
        return {"text": self._as_text(found, "text", origin)}

    def _instruction(self, found: Parts, origin: str) -> dict[str, Any]:
        prompt, added = self._as_text(found, "prompt", origin), self._as_text(found, "input", origin)
        return {
            "prompt": f"{prompt}\n\n{added}" if added else prompt,
            "completion": self._as_text(found, "completion", origin),
            "system": self._as_text(found, "system", origin) or None,
        }

    def _chat(self, found: Parts, origin: str) -> dict[str, Any]:
        messages: list[Any] = []
        system = self._as_text(found, "system", origin)
        if system:
            messages.append({"role": "system", "content": system})
        for name in self.form.columns:
            path, value = found[name]
            messages += conversation(value, self._roles, f"{origin}: {path}")
        return {"messages": messages, "tools": tools_of(found["tools"][1]) if "tools" in found else None}

    def _tokens(self, found: Parts, origin: str) -> dict[str, Any]:
        columns = {name: _numbers(value, f"{origin}: {name}") for name, (_, value) in found.items() if value is not None}
        mask = columns.pop("attention_mask", None)
        if mask is not None:
            columns = _unpadded(columns, mask, origin)
        return {name: columns.get(name) for name in self.form.columns}  # the gate says what null is: no tokens

    def _as_text(self, found: Parts, name: str, origin: str) -> str:
        """Return the part *name* as text; empty where it is optional and not there."""
        path, value = found.get(name, ("", None))
        if isinstance(value, str):
            return value
        if name not in self.form.columns and value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
        raise DataError(f"{origin}: {path} is {kind_of(value)}, and the {name} must be text; mend the row or leave it out")


def _unpadded(columns: dict[str, list[int]], mask: list[int], origin: str) -> dict[str, list[int]]:
    """Return *columns* without the padding that *mask* tells of."""
    for name, values in columns.items():
        if len(values) != len(mask):
            raise DataError(f"{origin}: attention_mask has {len(mask)} entries, {name} has {len(values)}; mend the row")
    start, count = mask.index(1) if 1 in mask else 0, mask.count(1)
    if count + mask.count(0) != len(mask) or 0 in mask[start : start + count]:
        raise DataError(
            f"{origin}: attention_mask must be 1 for tokens that belong together and 0 for padding around them; "
            "mend the row or leave it out"
        )
    return {name: values[start : start + count] for name, values in columns.items()}


def _numbers(value: Any, where: str) -> list[int]:
    """Return token ids as a list; raise DataError, beginning with *where*, for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where} is a text that is no list; write [1, 2, 3]") from error
    try:
        if not isinstance(value, list):
            raise TypeError(f"{kind_of(value)}, not a list")
        array("i", value)  # the quickest check that all are whole numbers of 32 bits
    except (TypeError, OverflowError) as error:
        raise DataError(f"{where} must be a list of token ids ({error}); tokenise the row anew, or leave it out") from error
    return value
