"""`qlora doctor`: what this machine can do, and what is wrong with the installation."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest


def test_a_sound_installation_has_no_problems(qlora: Callable[..., Any]) -> None:
    result = qlora("doctor", "--json")
    report = json.loads(result.out)
    assert (result.code, report["problems"]) == (0, [])
    assert report["python"]["version"] == platform.python_version()
    assert report["packages"]["torch"] == version("torch")
    assert report["packages"]["qlora-core"] == version("qlora-core")
    assert report["plugins"]["text"] == {"status": "ok", "from": f"qlora-core {version('qlora-core')}", "failure": None}
    assert report["bitsandbytes"]["problem"] is None
    assert 0 < report["bitsandbytes"]["nf4_mean_error"] < 0.1
    assert report["memory"]["total_bytes"] >= report["memory"]["free_bytes"] > 0
    assert isinstance(report["device"]["bf16"], bool)


def test_the_table_names_packages_device_memory_and_plugins(qlora: Callable[..., Any]) -> None:
    result = qlora("doctor")
    assert result.code == 0
    for words in ("Python", version("torch"), "bfloat16", "bitsandbytes backend", "memory", "plugin peft", "CUDA devices"):
        assert words in result.out
    assert "problem" not in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize("text", ["no luck", "cannot read [/etc/plugin]"])
def test_a_broken_plugin_is_a_problem(qlora: Callable[..., Any], write_module: Callable[[str, str], str], text: str) -> None:
    name = write_module(f"broken_for_doctor_{len(text)}", f"raise RuntimeError({text!r})")
    result = qlora("doctor", "-p", name, "--json")
    assert result.code == 2
    assert json.loads(result.out)["problems"] == [f"plugin {name}: RuntimeError: {text}"]
    table = qlora("doctor", "-p", name)
    assert table.code == 2
    assert f"RuntimeError: {text}" in table.out


def test_a_disabled_plugin_is_no_problem(qlora: Callable[..., Any]) -> None:
    result = qlora("doctor", "--disable-plugin", "text", "--json")
    report = json.loads(result.out)
    assert (result.code, report["problems"], report["plugins"]["text"]["status"]) == (0, [], "blocked")


def test_a_missing_package_is_a_problem(qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_core import provenance

    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "a-package-nobody-has"))
    result = qlora("doctor", "--json")
    assert result.code == 2
    assert json.loads(result.out)["problems"] == ["package a-package-nobody-has: not installed"]


def test_a_bitsandbytes_that_can_not_quantise_is_a_problem(qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no backend")

    monkeypatch.setattr(functional, "quantize_4bit", fail)
    result = qlora("doctor", "--json")
    assert result.code == 2
    assert json.loads(result.out)["problems"] == ["bitsandbytes can't quantise on this device: no backend"]
