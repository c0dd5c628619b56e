"""`qlora plugins`: what is installed, where from, what it accepts, and which plugins failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

BELL = """
    import qlora_core

    class Bell(qlora_core.CallbackFactory):
        "Rings [/loudly] at the [end]."
        name = "bell"
        class Options(qlora_core.ProviderOptions):
            volume: int = 3
            "between [low] and [/high]"
        def build(self, run): return None

    @qlora_core.hookimpl
    def qlora_callbacks(): return [Bell]
"""


def listed(qlora: Callable[..., Any], *arguments: str) -> dict[str, Any]:
    result = qlora("plugins", "list", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return {plugin["name"]: plugin for plugin in json.loads(result.out)["plugins"]}


def test_the_list_has_plugin_provider_origin_and_status(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "list")
    assert (result.code, result.err) == (0, "")
    assert f"qlora-core {version('qlora-core')}" in result.out
    assert all(name in result.out for name in ("quantizer nf4", "adapter lora", "dataset text", "callback progress"))
    assert "\x1b" not in result.out


def test_the_list_as_json_has_the_same(qlora: Callable[..., Any]) -> None:
    assert listed(qlora)["peft"] == {
        "name": "peft",
        "status": "ok",
        "failure": None,
        "distribution": "qlora-core",
        "version": version("qlora-core"),
        "module": "qlora_peft",
        "provides": [
            {"kind": "adapter", "name": name, "qualified": f"peft:{name}", "ambiguous": False} for name in ("lora", "peft")
        ],
    }


def test_a_module_beside_the_caller_is_listed(qlora: Callable[..., Any], write_module: Callable[[str, str], str]) -> None:
    name = write_module("bell_in_list", BELL)
    plugin = listed(qlora, "-p", name)[name]
    assert (plugin["status"], plugin["distribution"]) == ("ok", None)
    assert plugin["provides"] == [{"kind": "callback", "name": "bell", "qualified": f"{name}:bell", "ambiguous": False}]
    assert f"module {name}" in qlora("plugins", "list", "--plugin", name).out


@pytest.mark.parametrize("separator", [",", " ", ", "])
def test_plugins_are_disabled_by_option_and_by_environment(
    qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    monkeypatch.setenv("QLORA_DISABLE_PLUGINS", separator.join(["peft", "plain"]))
    plugins = listed(qlora, "--disable-plugin", "text")
    assert {name for name, plugin in plugins.items() if plugin["status"] == "blocked"} == {"peft", "plain", "text"}
    assert plugins["text"]["provides"] == []
    assert "disabled" in qlora("plugins", "list").out


@pytest.mark.parametrize("text", ["no luck", "cannot read [/etc/plugin]", "[bold]odd", "key [a, b] is [missing]"])
def test_a_broken_plugin_is_listed_with_its_reason_as_it_is(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], text: str
) -> None:
    name = write_module(f"broken_{abs(hash(text))}", f"raise RuntimeError({text!r})")
    result = qlora("plugins", "list", "-p", name)
    assert result.code == 0
    assert f"failed: RuntimeError: {text}" in result.out
    assert listed(qlora, "-p", name)[name]["failure"] == f"RuntimeError: {text}"


def test_lines_are_not_wrapped_where_there_is_no_terminal(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    reason = "a reason of many words " * 20
    name = write_module("broken_at_length", f"raise RuntimeError({reason.strip()!r})")
    assert f"failed: RuntimeError: {reason.strip()}" in qlora("plugins", "list", "-p", name).out
    assert "rank, typically 8 to 64; adds r * (d_in + d_out) parameters" in qlora("plugins", "show", "lora").out


def test_showing_a_provider_lists_its_options_with_type_default_and_description(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "show", "lora")
    assert (result.code, result.err) == (0, "")
    first = result.out.splitlines()[0]
    assert first == f"lora · adapter · plugin peft · qlora-core {version('qlora-core')}"
    row = next(line for line in result.out.splitlines() if "target_modules" in line)
    assert "text | list of text" in row
    assert "all-linear" in row
    assert "\x1b" not in result.out


def test_showing_a_provider_as_json_has_the_same(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "show", "peft:lora", "--json")
    (provider,) = json.loads(result.out)["providers"]
    assert (provider["name"], provider["kind"], provider["plugin"]) == ("lora", "adapter", "peft")
    assert provider["class"] == "qlora_peft.LoRA"
    options = {option["name"]: option for option in provider["options"]}
    assert (options["r"]["type"], options["r"]["default"], options["r"]["required"]) == ("whole number", 16, False)
    assert options["modules_to_save"]["default"] == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("nf4", {"quantizer nf4"}),
        ("bitsandbytes:nf4", {"quantizer nf4"}),
        ("bitsandbytes", {"quantizer nf4", "quantizer fp4", "quantizer int8"}),
        ("none", {"quantizer none", "adapter none"}),
    ],
)
def test_a_plugin_a_provider_or_both_can_be_named(qlora: Callable[..., Any], name: str, kinds: set[str]) -> None:
    providers = json.loads(qlora("plugins", "show", name, "--json").out)["providers"]
    assert {f"{provider['kind']} {provider['name']}" for provider in providers} == kinds
    text = qlora("plugins", "show", name).out
    assert all(f"{kind.split()[1]} · {kind.split()[0]} · " in text for kind in kinds)


def test_a_provider_without_options_says_so(qlora: Callable[..., Any]) -> None:
    assert "It has no options." in qlora("plugins", "show", "progress").out


def test_brackets_in_a_description_stay_what_they_are(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str]
) -> None:
    name = write_module("bell_with_brackets", BELL)
    result = qlora("plugins", "show", "bell", "-p", name)
    assert result.code == 0
    assert "Rings [/loudly] at the [end]." in result.out
    assert "between [low] and [/high]" in result.out


def test_an_unknown_name_gets_a_guess_and_what_is_installed(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "show", "lorra")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        "error: no plugin or provider 'lorra'; did you mean 'lora'?; installed: ao_int8, bitsandbytes, "
    )


def test_showing_a_broken_or_disabled_plugin_says_what_is_wrong_with_it(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str]
) -> None:
    name = write_module("broken_to_show", "raise RuntimeError('no luck')")
    result = qlora("plugins", "show", name, "-p", name)
    assert (result.code, result.err) == (2, f"error: plugin {name!r} failed to load: RuntimeError: no luck\n")
    result = qlora("plugins", "show", "text", "--disable-plugin", "text")
    assert (result.code, result.err) == (
        2,
        ("error: plugin 'text' is disabled; leave it out of --disable-plugin, disable_plugins and QLORA_DISABLE_PLUGINS\n"),
    )


def test_a_file_in_the_working_directory_shadows_no_library(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module("qlora_text", "raise AssertionError('shadowed')")
    monkeypatch.delitem(sys.modules, "qlora_text", raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert listed(qlora)["text"]["failure"] is None
