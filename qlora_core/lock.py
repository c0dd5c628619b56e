"""One process at a time writes to a folder. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qlora_core.errors import RunError

__all__ = ["check_free", "locked"]

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of *folder* while the block runs; raise RunError, which names the holder, where another process has it.

    The system gives the lock back when the process ends, however it ends. Without `fcntl` (Windows) there is no lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / NAME
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                raise _taken(folder, file) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # the holder before has just taken the file away
    with file:
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": platform.node()}))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now: the lock is free all the same
                path.unlink()


def check_free(folder: Path) -> None:
    """Raise RunError where another process holds the lock of *folder*. Touches nothing."""
    try:
        import fcntl

        file = (folder / NAME).open(encoding="utf-8")
    except (ImportError, OSError):
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise _taken(folder, file) from None


def _taken(folder: Path, file: IO[str]) -> RunError:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = f"process {holder['process']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return RunError(f"output: {folder} is being written to by {who}; wait until it is done, or name another folder")
