"""Parse JSON: a value on a line, or the objects of an array that may be larger than memory. Light."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from qlora_core.data.files import opened
from qlora_core.errors import DataError

CHUNK = 2**20  # bytes per read, doubled for an object that does not fit
ROW_LISTS = ("messages", "conversations", "conversation", "tools", "instances", "prompt", "completion")
"""Names of lists that belong to a row; a list of another name holds the rows of a file."""

_DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # pandas writes NaN for what is missing
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def parsed(where: str, text: str) -> Any:
    """Return the JSON value in *text*, one line; raise DataError that names *where*."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON at column {error.pos + 1}: {_lowered(error.msg)}; each line must hold one whole object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that can't be read: {error}; leave the row out") from error
    _refuse_halves(where, value, _SURROGATE.search(text))
    return value


def from_text(value: Any) -> Any:
    """Return what *value* holds where it is JSON text, or such a text of a text; else *value* itself."""
    while isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value


def taken(path: str, line: int, read: Callable[..., bytes], *size: int) -> bytes:
    """Return `read(*size)`; where compressed data is damaged, the DataError says that *line* lines came before."""
    try:
        return read(*size)
    except DataError as error:
        raise DataError(f"{path}:{line + 1}: {str(error).removeprefix(f'{path}: ')}") from error


def kind_of(value: Any) -> str:
    """Return what a JSON *value* is, in words."""
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def json_objects(path: str, place: tuple[int, int]) -> Iterator[tuple[int, dict[str, Any], tuple[int, int]]]:
    """Yield the objects of the file at *path*, each with its line and the place after it, from *place* on.

    The file is an array of objects, an object with one list of objects in it, or one object, which is the only row.
    """
    with opened(path, place[0]) as stream:
        window = _Window(path, stream, place)
        if place[0] == 0:
            alone = _open_list(window)
            if alone is not None:
                if alone:
                    yield 1, alone, window.place()
                return
        following = place[0] > 0
        while (char := window.peek()) != "]":
            if following:
                window.take(",", "a comma or the end of the list")
                char = window.peek()
            if char != "{":
                window.fail("an object was expected here; each element of the list must be one", window.at)
            line = window.place()[1] + 1
            value = window.value()
            yield line, value, window.place()
            following = True
        window.take("]", "the end of the list")
        _close(window)


def _open_list(window: _Window) -> dict[str, Any] | None:
    """Return None once the list of rows has been entered, or the one row that the file is: empty where there is nothing."""
    char = window.peek()
    if char == "":
        return {}
    if char == "[":
        window.at += 1
        return None
    window.take("{", "a list of objects, or an object")
    values: dict[str, Any] = {}
    while window.peek() != "}":
        if values:
            window.take(",", "a comma or the end of the object")
            window.peek()
        key = window.value()
        window.peek()
        window.take(":", "a colon after the name")
        if window.peek() == "[" and key not in ROW_LISTS and window.peek_in_list() == "{":
            window.at += 1
            return None
        values[str(key)] = window.value()
    window.at += 1
    if window.peek():
        window.fail("there is more after the object; put each object on a line of its own, or all into a list", window.at)
    return values


def _close(window: _Window) -> None:
    """Read on to the end after the list of rows; raise DataError where another list of objects follows."""
    while (char := window.peek()) == ",":
        window.at += 1
        window.peek()
        key = window.value()
        window.peek()
        window.take(":", "a colon after the name")
        if window.peek() == "[" and key not in ROW_LISTS and window.peek_in_list() == "{":
            window.fail(f"another list of objects, {key!r}; put the rows to read into a file of their own", window.at)
        window.value()
    if char == "}":
        window.at += 1
        char = window.peek()
    if char:
        window.fail("there is more after the list; the file must hold one", window.at)


class _Window:
    """The text around the point that parsing has come to. It grows to hold the value that is parsed, and no further."""

    def __init__(self, path: str, stream: Any, place: tuple[int, int]) -> None:
        self._path = path
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read, self._line = place  # bytes that were read; lines before the mark
        self._offset = self._read  # bytes before the mark
        self._column = 0
        self._mark = 0
        self.text = ""
        self.at = 0

    def place(self) -> tuple[int, int]:
        """Return the bytes and the lines before the point."""
        passed = self.text[self._mark : self.at]
        lines = passed.count("\n")
        self._offset += len(passed) if passed.isascii() else len(passed.encode())
        self._line += lines
        self._column = len(passed) - passed.rfind("\n") - 1 if lines else self._column + len(passed)
        self._mark = self.at
        return self._offset, self._line

    def peek(self) -> str:
        """Return the next character that is not a space, or an empty text at the end; the point is before it."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def peek_in_list(self) -> str:
        """Return the first character in the list at the point, which stays where it is."""
        while True:
            match = _SPACE.match(self.text, self.at + 1)
            if match is not None and match.end() < len(self.text):
                return self.text[match.end()]
            if not self._more():
                return ""

    def take(self, char: str, expected: str) -> None:
        """Go past *char*; raise DataError where another one stands."""
        if self.at >= len(self.text):
            self.fail(f"the file ends where {expected} was expected; it is cut off: write it or fetch it again", self.at)
        if self.text[self.at] != char:
            self.fail(f"malformed JSON: {self.text[self.at]!r} instead of {expected}", self.at)
        self.at += 1

    def value(self) -> Any:
        """Return the JSON value at the point, and go past it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # what is cut off by the end of the window fails at its end, or says that a text does not end
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                further = error.pos - self.at  # the point moves when the window does
                if not cut or not self._more():
                    self.fail(f"malformed JSON: {_lowered(error.msg)}", self.at + further)
            except (ValueError, RecursionError) as error:
                self.fail(f"JSON that can't be read: {error}; leave the row out", self.at)
            else:
                if end < len(self.text) or not self._more():
                    break
        _refuse_halves(f"{self._path}:{self.place()[1] + 1}", value, _SURROGATE.search(self.text, self.at, end))
        self.at = end
        return value

    def fail(self, what: str, at: int) -> NoReturn:
        """Raise DataError: *what*, in the line and column of the character *at*."""
        line = self._line + self.text.count("\n", self._mark, at) + 1
        newline = self.text.rfind("\n", self._mark, at)
        column = at - newline if newline >= 0 else self._column + at - self._mark + 1
        raise DataError(f"{self._path}:{line}: column {column}: {what}")

    def _more(self) -> bool:
        """Read on and return whether there was more; what is behind the point is dropped."""
        self.place()
        self.text, self.at, self._mark = self.text[self.at :], 0, 0
        line = self._line + self.text.count("\n")
        chunk = taken(self._path, line, self._stream.read, max(CHUNK, len(self.text)))
        if self._read == 0 and chunk.startswith(codecs.BOM_UTF8):
            chunk, self._read, self._offset = chunk[3:], 3, 3
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n") + 1
            raise DataError(
                f"{self._path}:{line}: not UTF-8: {error.reason} at byte {self._read - pending + error.start} of the file; "
                "save the file as UTF-8"
            ) from error
        self._read += len(chunk)
        return bool(chunk)


def _refuse_halves(where: str, value: Any, escape: re.Match[str] | None) -> None:
    """Raise DataError where *value*, whose JSON has an *escape* of a surrogate, holds half a character: no text can."""
    if escape is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: {half} is half of a surrogate pair, no character; take it out") from error


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
