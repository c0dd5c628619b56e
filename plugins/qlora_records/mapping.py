"""Take from each row what its form says, and refuse a row that does not have it. Light."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_core.errors import DataError
from qlora_records.forms import ABSENT, Form, columns_of, value_at
from qlora_records.json_text import kind_of
from qlora_records.turns import conversation, tools_of


class Mapper:
    """Makes of each row what its form says: rows with the columns that a dataset source gives."""

    def __init__(self, form: Form, roles: Mapping[str, str]) -> None:
        self.form = form
        self._roles = roles
        paths = {**form.columns, **form.optional}
        walked = [path for path in paths.values() if "[]" in path and path not in form.first]
        self._list = walked[0].partition("[]")[0] if walked else None
        # of a path into the list, what follows the brackets; the item itself where nothing does
        self._inner = {name: path.partition("[]")[2][1:] for name, path in paths.items() if path in walked}
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
            found = {}
            for parts, needed in ((self.form.columns, True), (self.form.optional, False)):
                for name, path in parts.items():
                    inner = self._inner.get(name)
                    if inner is None:
                        value = value_at(values, path)
                    else:
                        value = item if inner == "" else value_at(item, inner) if isinstance(item, dict) else ABSENT
                    if value is not ABSENT:
                        found[name] = value
                    elif needed:
                        raise self._differs(path, values, origin)
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

    def _text(self, found: dict[str, Any], origin: str) -> dict[str, Any]:
        return {"text": self._as_text(found, "text", origin)}

    def _instruction(self, found: dict[str, Any], origin: str) -> dict[str, Any]:
        prompt, added = self._as_text(found, "prompt", origin), self._as_text(found, "input", origin)
        return {
            "prompt": f"{prompt}\n\n{added}" if added else prompt,
            "completion": self._as_text(found, "completion", origin),
            "system": self._as_text(found, "system", origin) or None,
        }

    def _chat(self, found: dict[str, Any], origin: str) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        system = self._as_text(found, "system", origin)
        if system:
            messages.append({"role": "system", "content": system})
        for name, path in self.form.columns.items():
            messages += conversation(found[name], self._roles, f"{origin}: {path}")
        return {"messages": messages, "tools": tools_of(found.get("tools"), f"{origin}: tools")}

    def _tokens(self, found: dict[str, Any], origin: str) -> dict[str, Any]:
        return {name: _numbers(value, f"{origin}: {name}") for name, value in found.items()}

    def _as_text(self, found: dict[str, Any], name: str, origin: str) -> str:
        """Return the part *name* as text; empty where it is optional and not there."""
        value = found.get(name)
        if isinstance(value, str):
            return value
        if name not in self.form.columns and value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
        path = self.form.columns.get(name) or self.form.optional[name]
        raise DataError(f"{origin}: {path} is {kind_of(value)}, and the {name} must be text; mend the row or leave it out")


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
