"""Seal a folder with a digest of each file, and find what has become of it since. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

__all__ = ["fault", "flush", "seal"]

SEAL = "manifest.json"


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file in *folder* to its manifest.json, and flush all of them to the disk."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digests[path.relative_to(folder).as_posix()] = _digest(path)
        flush(path)
    (folder / SEAL).write_text(json.dumps({"sha256": digests}, indent=1) + "\n", encoding="utf-8")
    flush(folder / SEAL)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        flush(inner)


def fault(folder: Path) -> str | None:
    """Return what is wrong with the sealed *folder*, the first file that differs; None if it is as it was sealed.

    A file that the manifest does not name is wrong, too: nobody knows what it holds, or who would read it.
    """
    try:
        digests = dict(json.loads((folder / SEAL).read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} can't be read"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {SEAL}
    for name, digest in digests.items():
        if name not in there:
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not what was written"
    extra = sorted(there - set(digests))
    return f"{extra[0]} does not belong to it" if extra else None


def flush(path: Path) -> None:
    """Have the system write *path*, a file or a folder, to the disk; some systems can't do so with folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
