"""Running commands inside this process, which imports the libraries once, and seeing what they left on disk."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(autouse=True)
def _plain_surroundings(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder of its own, without colours forced by the environment, with a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "QLORA_DISABLE_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here() -> Path:
    """The working directory of this test."""
    return Path(os.getcwd())


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that gives every path under a folder with its content."""

    def take(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}

    return take


@pytest.fixture
def write_config(here: Path, tiny_model: Path, text_file: Path) -> Callable[..., Path]:
    """Return a function that writes a configuration for two quick steps, with the given changes of sections."""

    def write(name: str = "run.yaml", **changes: Any) -> Path:
        config: dict[str, Any] = {
            "model": str(tiny_model),
            "adapter": {"name": "lora", "r": 2},
            "dataset": {"name": "text", "path": str(text_file)},
            "data": {"sequence_length": 32},
            "callbacks": [],
            "training": {"max_steps": 2, "batch_size": 1, "logging_steps": 1},
            "output": str(here / "out"),
        }
        for section, value in changes.items():
            both = isinstance(value, dict) and isinstance(config.get(section), dict)
            config[section] = {**config[section], **value} if both else value
        path = here / name
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_module(here: Path) -> Iterator[Callable[[str, str], str]]:
    """Return a function that writes a module into the working directory and returns its name; forgotten afterwards."""
    written: list[str] = []

    def write(name: str, source: str) -> str:
        (here / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)
