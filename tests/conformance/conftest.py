"""Plugins that a test writes for itself, from the scaffold, and runs the conformance kit on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.scaffold import new_plugin


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep prepared data out of the user's cache."""


@pytest.fixture
def kit_of(site: Path) -> Callable[..., type[Any]]:
    """Return a function that writes the plugin `mine` of a kind, with changes of its source, and returns its kit.

    A change is (old, new); the old text stands exactly once in the two modules of the scaffold together.
    """
    from qlora_core import testing

    kits = {kit.kind: kit for kit in vars(testing).values() if isinstance(kit, type) and hasattr(kit, "kind")}

    def make(kind: str, *changes: tuple[str, str]) -> type[Any]:
        new_plugin("mine", kind, site)
        modules = [site / "mine" / "__init__.py", site / "mine" / "implementation.py"]
        for old, new in changes:
            holding = [module for module in modules if old in module.read_text(encoding="utf-8")]
            assert len(holding) == 1, f"{old!r} stands in {len(holding)} modules of the scaffold for {kind}"
            text = holding[0].read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {holding[0].name}"
            holding[0].write_text(text.replace(old, new), encoding="utf-8")
        importlib.invalidate_caches()
        return type("Checked", (kits[kind],), {"name": "mine", "plugins": ("mine",)})

    return make
