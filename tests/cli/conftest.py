"""Running commands inside this process, which imports the libraries once, and seeing what they left on disk."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(autouse=True)
def _surroundings(plain_surroundings: None) -> None:
    """Run each test in a folder of its own."""


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
