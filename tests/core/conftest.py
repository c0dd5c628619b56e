"""Plugins and distributions that a test writes for itself, and a cache of its own for prepared data."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep prepared data out of the user's cache."""


@pytest.fixture
def write_module(site: Path) -> Callable[[str, str], str]:
    """Return a function that writes a module for `-p` and returns its name."""

    def write(name: str, source: str) -> str:
        (site / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()
        return name

    return write


@pytest.fixture
def install(site: Path, write_module: Callable[[str, str], str]) -> Callable[..., None]:
    """Return a function that installs a distribution with one entry point, `name = module`, and the module's source."""

    def add(distribution: str, name: str, module: str, source: str | None = None, *, version: str = "1.2") -> None:
        folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
        (folder / "entry_points.txt").write_text(f"[qlora_core]\n{name} = {module}\n", encoding="utf-8")
        if source is not None:
            write_module(module, source)
        importlib.invalidate_caches()

    return add
