"""Read documents with SQL. Imported late."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import datasets
from qlora_core import DataError


def read(path: str, query: str, option: str) -> datasets.Dataset:
    """Return the rows that *query* gives as `text`; raise DataError, which names the *option*, where it can't."""
    where = f"dataset.{option}: {path}"
    try:
        # read-only: a query that writes fails, and a wrong path makes no new file
        with contextlib.closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)) as database:
            cursor = database.execute(query)
            columns = [column[0] for column in cursor.description or ()]
            if columns != ["text"]:
                got = ", ".join(columns) or "none"
                raise DataError(f"{where}: the query gives the columns {got}, not text alone; write SELECT ... AS text")
            texts = [row[0] for row in cursor]
    except (sqlite3.Error, sqlite3.Warning) as error:  # Python 3.11 warns of two statements, 3.12 raises
        raise DataError(f"{where}: {error}; try the query with `sqlite3 -readonly` until it gives the rows you want") from error
    if not texts:
        raise DataError(f"{where}: the query gives no row; loosen its WHERE, or name another database")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            remedy = "leave it out with WHERE, or CAST it AS TEXT"
            raise DataError(f"{where}: row {number} is no text but {type(text).__name__}; {remedy}")
    return datasets.Dataset.from_dict({"text": texts})


def write_example(path: Path) -> Path:
    """Write a database of 400 notes, `notes(id, body)`, and return its *path*."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT)")
        bodies = [(n, f"Note {n} is about the number {n}, which comes after {n - 1}.") for n in range(400)]
        database.executemany("INSERT INTO notes VALUES (?, ?)", bodies)
        database.commit()
    return path
