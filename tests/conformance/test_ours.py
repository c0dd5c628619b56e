"""Our own plugins pass the conformance kit, and pytest collects the kit as a plugin author would write it."""

from __future__ import annotations

import unittest
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from qlora_core.registry import KINDS, Provided, Registry
from qlora_core.testing import AdapterConformance, QuantizerConformance, conformance_of


def _ours() -> list[Any]:
    registry = Registry()
    found = [item for kind in KINDS for item in registry.provided(kind) if item.plugin.distribution == "qlora-core"]
    return [
        pytest.param(item, check, id=f"{item.kind}-{item.provider.name}-{check.removeprefix('test_')}")
        for item in found
        for check in dir(conformance_of(item))
        if check.startswith("test_")
    ]


@pytest.mark.parametrize(("found", "check"), _ours())
def test_our_plugins_conform(found: Provided, check: str) -> None:
    try:
        getattr(conformance_of(found)(), check)()
    except unittest.SkipTest as skipped:
        pytest.skip(str(skipped))


class TestNF4Single(QuantizerConformance):
    name = "nf4"
    options: ClassVar[Mapping[str, Any]] = {"double_quant": False}


class TestDoRA(AdapterConformance):
    name = "peft:lora"
    options: ClassVar[Mapping[str, Any]] = {"r": 4, "use_dora": True}
    packed_layers = False  # DoRA takes the norm of W


class TestRsLoRA(AdapterConformance):
    name = "lora"
    options: ClassVar[Mapping[str, Any]] = {"r": 4, "use_rslora": True}
