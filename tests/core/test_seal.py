"""A sealed folder: whatever is done to its files is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.seal import fault, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "inner" / "state.json").write_text("{}")
    seal(tmp_path)
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_folder_is_as_it_was_sealed(folder: Path) -> None:
    assert fault(folder) is None
    names = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert sorted(names) == ["inner/state.json", "weights"]
    assert all(len(digest) == 64 for digest in names.values())


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda folder: flip(folder / "weights"), "weights is not what was written"),
        (lambda folder: (folder / "weights").write_bytes(b""), "weights is not what was written"),
        (lambda folder: (folder / "inner" / "state.json").unlink(), "inner/state.json is missing"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"pickle"), "optimizer.pt does not belong to it"),
        (lambda folder: (folder / "inner" / "link").symlink_to("/etc/hostname"), "inner/link does not belong to it"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"sha256": {"weights"'), "manifest.json can't be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json can't be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"sha256": 3}'), "manifest.json can't be read"),
    ],
    ids=["bit", "cut", "missing", "foreign", "link", "no-manifest", "cut-manifest", "list", "number"],
)
def test_what_is_wrong_is_said(folder: Path, harm: Callable[[Path], object], what: str) -> None:
    harm(folder)
    assert fault(folder) == what


def test_a_folder_that_was_never_sealed_is_faulty(tmp_path: Path) -> None:
    assert fault(tmp_path) == "manifest.json is missing"
    assert fault(tmp_path / "nowhere") == "manifest.json is missing"
