"""Read records into memory-mapped Arrow, or as a stream: rows of the source in, rows of a dataset source out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora_core.data.files import digest
from qlora_core.errors import DataError
from qlora_records.forms import Form, recognise
from qlora_records.mapping import Mapper
from qlora_records.rows import Files, Hub

if TYPE_CHECKING:
    import datasets

FORMAT = 2  # raise it when the same files would give other rows than before


def read_records(source: Files | Hub, asked: Mapping[str, Any], say: Callable[[str], None]) -> datasets.Dataset:
    """Return the rows of *source* as the options *asked* say, with their origin; raise DataError for the first bad one.

    *say* is told which form they have, where nobody asked for it.
    """
    from qlora_core.data.arrow import cached_dataset

    form = form_of(source, asked, say)
    content = digest(source.paths) if isinstance(source, Files) else source.load()._fingerprint
    key = hashlib.sha256(repr((FORMAT, source, content, form, sorted(asked["roles"].items()))).encode()).hexdigest()
    rows = cached_dataset(_stored, _features(form), key, source=source, form=form, roles=dict(asked["roles"]))
    unused = [name for name in ("system", "tools") if name in rows.column_names]
    return rows.remove_columns([name for name in unused if rows.data.column(name).null_count == len(rows)])


def stream_records(
    source: Files | Hub, asked: Mapping[str, Any], say: Callable[[str], None], position: list[int] | None = None
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield the rows of `read_records` from *position* on, each with the position after it.

    A position is the file, the place in it (bytes and lines, or rows) where the row begins that comes next, and how many
    rows of that row are done. A system text or tools that a row lacks are None, even where no row has them.
    """
    if isinstance(source, Hub):
        source = source._replace(streaming=True)
    return _mapped(source, form_of(source, asked, say), asked["roles"], position)


def form_of(source: Files | Hub, asked: Mapping[str, Any], say: Callable[[str], None]) -> Form:
    """Return the form of the rows, which the first one shows; *say* it where nobody asked for it."""
    first = next(source.rows(0, (0, 0)), None)
    if first is None:
        raise _empty(source.paths[0])
    form = recognise(first.values, asked, first.origin)
    if asked["format"] == "auto":
        say(f"records: {form}")
    return form


def _mapped(
    source: Files | Hub, form: Form, roles: Mapping[str, str], position: list[int] | None = None
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    file, offset, line, done = position or (0, 0, 0, 0)
    if file >= len(source.paths):
        raise DataError(f"{source.paths[-1]}: there are fewer files than when the run was interrupted; put them back")
    mapper = Mapper(form, roles)
    for index in range(file, len(source.paths)):
        place = (offset, line) if index == file else (0, 0)
        read = None
        for read in source.rows(index, place):
            made = list(mapper.rows(read.values, read.origin))
            for count, row in enumerate(made, 1):
                if count > done:
                    yield row, [index, *read.after, 0] if count == len(made) else [index, *read.before, count]
            done = 0
        if read is None and place == (0, 0):
            raise _empty(source.paths[index])


def _stored(source: Files | Hub, form: Form, roles: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    return (row for row, _ in _mapped(source, form, roles))


def _features(form: Form) -> dict[str, Any]:
    import datasets

    from qlora_records.exact import ExactJson

    text, anything = datasets.Value("string"), ExactJson()  # any keys, where structs would have those of all rows
    columns: dict[str, Any]
    if form.kind == "tokenized":
        columns = {name: datasets.List(datasets.Value("int32")) for name in form.columns}
    elif form.kind == "text":
        columns = {"text": text}
    elif form.kind == "instruction":
        columns = {"prompt": text, "completion": text, "system": text}
    else:
        columns = {"messages": datasets.List(anything), "tools": anything}
    return {**columns, "origin": text}


def _empty(path: str) -> DataError:
    return DataError(f"{path}: holds no rows; leave the file out, or put rows into it")
