"""`qlora plugins check` and `new`, ambiguous names in the list, and the trace of calls into plugins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[str, str], str]
OTHERS = ("bitsandbytes", "console", "fused", "merged", "peft", "records", "text", "torchao")

KERNELS = """
    import qlora_core

    class Same(qlora_core.Kernels):
        "Leaves the model [as it is]."
        name = "same"
        def apply(self, model): return model

    @qlora_core.hookimpl
    def qlora_kernels(): return [Same]
"""


def disabled(*names: str) -> list[str]:
    return [word for name in names for word in ("--disable-plugin", name)]


# check


def test_a_sound_provider_passes_as_json(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "check", "nf4", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert set(report) == {"passed", "providers", "failed_plugins"}
    assert (report["passed"], report["failed_plugins"]) == (True, {})
    (provider,) = report["providers"]
    assert (provider["provider"], provider["kind"]) == ("bitsandbytes:nf4", "quantizer")
    assert all(set(check) == {"check", "status", "detail", "seconds"} for check in provider["checks"])
    assert {check["status"] for check in provider["checks"]} == {"passed"}
    assert "no parameter of the base requires a gradient" in {check["check"] for check in provider["checks"]}
    assert len(provider["checks"]) > 12


def test_the_table_has_the_words_of_every_check_and_no_escape_codes(qlora: Callable[..., Any], write_module: Write) -> None:
    name = write_module("sound_kernels", KERNELS)
    result = qlora("plugins", "check", "same", "-p", name)
    assert (result.code, result.err) == (0, "")
    assert f"kernels {name}:same" in result.out
    checks = json.loads(qlora("plugins", "check", "same", "-p", name, "--json").out)["providers"][0]["checks"]
    for check in checks:
        row = next(line for line in result.out.splitlines() if check["check"] in line)
        assert "passed" in row
    assert "importing its plugin imports none of torch" in result.out
    assert "\x1b" not in result.out


def test_a_failing_check_exits_with_2_and_shows_why(qlora: Callable[..., Any], write_module: Write) -> None:
    source = KERNELS.replace("return model", "model.lm_head.weight.data.mul_(2); return model")
    name = write_module("broken_kernels", source)
    result = qlora("plugins", "check", name, "-p", name)
    assert (result.code, result.err) == (2, "")
    row = next(line for line in result.out.splitlines() if "logits are those of the model" in line)
    assert "failed" in row
    assert "logits: 1 from the reference, relative to it; at most 0.001" in row
    report = json.loads(qlora("plugins", "check", name, "-p", name, "--json").out)
    assert report["passed"] is False
    failed = [check for check in report["providers"][0]["checks"] if check["status"] == "failed"]
    assert failed[0]["detail"].startswith("logits: 1 from the reference")


def test_brackets_in_a_reason_stay_what_they_are(qlora: Callable[..., Any], write_module: Write) -> None:
    name = write_module("odd_kernels", KERNELS.replace("return model", "raise ValueError('no [/such] [red]thing')"))
    result = qlora("plugins", "check", name, "-p", name)
    assert result.code == 2
    assert "ValueError: no [/such] [red]thing" in result.out


def test_what_this_machine_lacks_is_shown_as_skipped_and_is_no_failure(qlora: Callable[..., Any], write_module: Write) -> None:
    lacking = "a CUDA device with compute capability 9"
    source = KERNELS.replace("        def apply", f"        def missing(self): return {lacking!r}\n        def apply")
    name = write_module("lacking_kernels", source)
    result = qlora("plugins", "check", "same", "-p", name)
    assert (result.code, result.err) == (0, "")
    rows = [line for line in result.out.splitlines() if "skipped" in line]
    assert len(rows) == 2
    assert all(f"needs {lacking}" in row for row in rows)
    report = json.loads(qlora("plugins", "check", "same", "-p", name, "--json").out)
    assert report["passed"] is True
    assert {c["detail"] for c in report["providers"][0]["checks"] if c["status"] == "skipped"} == {f"needs {lacking}"}


def test_without_a_name_all_are_checked_and_a_plugin_that_failed_to_load_is_named(
    qlora: Callable[..., Any], write_module: Write
) -> None:
    name = write_module("broken_at_import", "raise RuntimeError('no [luck]')")
    few = disabled(*OTHERS)
    result = qlora("plugins", "check", "-p", name, *few)
    assert (result.code, result.err) == (2, "")
    assert f"failed plugin {name}: RuntimeError: no [luck]" in result.out.splitlines()
    report = json.loads(qlora("plugins", "check", "--json", "-p", name, *few).out)
    assert report["passed"] is False
    assert report["failed_plugins"] == {name: "RuntimeError: no [luck]"}
    assert {p["provider"] for p in report["providers"]} == {"plain:none", "plain:reference"}
    assert not [c for p in report["providers"] for c in p["checks"] if c["status"] == "failed"]


def test_another_plugin_s_failure_does_not_fail_the_one_that_is_named(qlora: Callable[..., Any], write_module: Write) -> None:
    broken, sound = write_module("broken_beside", "raise RuntimeError('no luck')"), write_module("sound_beside", KERNELS)
    result = qlora("plugins", "check", "same", "-p", sound, "-p", broken)
    assert (result.code, result.err) == (0, "")
    assert broken not in result.out


def test_the_module_of_a_provider_is_checked_whatever_the_order_of_the_options(
    qlora: Callable[..., Any], write_module: Write
) -> None:
    heavy = write_module("first_and_heavy", "import torch\n" + KERNELS.replace("\n    ", "\n").replace('"same"', '"other"'))
    light = write_module("second_and_light", KERNELS)
    result = qlora("plugins", "check", "same", "-p", heavy, "-p", light)
    assert result.code == 0, result.out
    result = qlora("plugins", "check", "other", "-p", light, "-p", heavy)
    assert result.code == 2
    assert f"importing {heavy} imports torch" in result.out


def test_what_a_plugin_prints_is_kept_off_standard_output(qlora: Callable[..., Any], write_module: Write) -> None:
    name = write_module("chatty_kernels", KERNELS.replace("return model", "print('hello'); return model"))
    result = qlora("plugins", "check", "same", "-p", name, "--json")
    assert json.loads(result.out)["passed"] is True
    assert set(result.err.splitlines()) == {"hello"}


def test_an_unknown_name_is_refused_with_a_guess(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "check", "nf44")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: no plugin or provider 'nf44'; did you mean 'nf4'?; installed: ")


def test_a_plugin_that_can_t_be_loaded_is_refused_by_name(qlora: Callable[..., Any], write_module: Write) -> None:
    name = write_module("broken_by_name", "raise RuntimeError('no luck')")
    result = qlora("plugins", "check", name, "-p", name)
    assert (result.code, result.out) == (2, "")
    assert "RuntimeError: no luck" in result.err


# new


def test_a_new_plugin_is_written_beside_the_caller_with_what_to_do_next(qlora: Callable[..., Any], here: Path) -> None:
    result = qlora("plugins", "new", "my-thing", "--kind", "quantizer")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    written = {str(path.relative_to(here)) for path in (here / "my-thing").rglob("*") if path.is_file()}
    assert set(lines[: len(written)]) == written
    assert "my-thing/my_thing/__init__.py" in written
    assert lines[len(written) :] == [
        "",
        "Next:",
        "  pip install -e 'my-thing[test]'",
        "  qlora plugins check my-thing",
        "  pytest my-thing",
    ]


def test_a_new_plugin_is_written_where_output_says(qlora: Callable[..., Any], here: Path) -> None:
    result = qlora("plugins", "new", "my-thing", "--kind", "callback", "--output", "elsewhere/deep")
    assert result.code == 0
    assert (here / "elsewhere" / "deep" / "my_thing" / "__init__.py").is_file()
    assert "pytest elsewhere/deep" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my-thing", "--kind", "quantiser"), "error: --kind quantiser: no such kind; one of quantizer, adapter, "),
        (("My Thing", "--kind", "adapter"), "error: 'My Thing' can't be a plugin's name; use lower-case letters, "),
        (("full", "--kind", "adapter"), "error: full exists already; name another folder with --output"),
    ],
)
def test_what_can_t_be_written_exits_with_2(
    qlora: Callable[..., Any], here: Path, arguments: tuple[str, ...], message: str
) -> None:
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    result = qlora("plugins", "new", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(message)
    assert {str(path.relative_to(here)) for path in here.rglob("*")} == {"full", "full/file"}


def test_a_kind_must_be_named(qlora: Callable[..., Any]) -> None:
    result = qlora("plugins", "new", "my-thing")
    assert (result.code, result.out) == (2, "")
    assert "--kind" in result.err


# list


def test_a_name_that_two_plugins_provide_is_marked(qlora: Callable[..., Any], write_module: Write) -> None:
    one, two = write_module("one_same", KERNELS), write_module("two_same", KERNELS)
    result = qlora("plugins", "list", "-p", one, "-p", two)
    assert (result.code, result.err) == (0, "")
    for name in (one, two):
        row = next(line for line in result.out.splitlines() if f"module {name}" in line)
        assert f"kernels same (ambiguous: write {name}:same)" in row
    assert result.out.count("ambiguous") == 2
    plugins = {p["name"]: p for p in json.loads(qlora("plugins", "list", "--json", "-p", one, "-p", two).out)["plugins"]}
    marked = {item["qualified"] for plugin in plugins.values() for item in plugin["provides"] if item["ambiguous"]}
    assert marked == {f"{one}:same", f"{two}:same"}


def test_one_name_in_two_kinds_is_not_ambiguous(qlora: Callable[..., Any]) -> None:
    assert "ambiguous" not in qlora("plugins", "list").out  # none is a quantizer and an adapter


# trace

CALL = re.compile(r"trace: (\S+(?: \S+)?) +plugin '(\w+)' +\d+\.\d\d ms *(.*)")


@pytest.mark.parametrize("by", ["option", "environment"])
def test_the_trace_has_each_hook_call_with_plugin_time_and_answer_on_stderr(
    qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("QLORA_TRACE", "1" if by == "environment" else "0")  # --trace sets it: put back afterwards
    result = qlora("plugins", "list", "--json", *(["--trace"] if by == "option" else []))
    assert result.code == 0
    provided: dict[tuple[str, str], list[str]] = {}
    for plugin in json.loads(result.out)["plugins"]:  # nothing of the trace on stdout
        for item in plugin["provides"]:
            hook = f"qlora_{item['kind'].removesuffix('s')}s"
            provided.setdefault((hook, plugin["name"]), []).append(item["name"])
    lines = [CALL.fullmatch(line) for line in result.err.splitlines()]
    assert all(lines), result.err
    calls = {(match[1], match[2]): match[3] for match in lines if match and match[1].startswith("qlora_")}
    assert {key: sorted(answer.split(", ")) for key, answer in calls.items()} == {k: sorted(v) for k, v in provided.items()}
    assert ("import qlora_peft", "peft") in {(match[1], match[2]) for match in lines if match}


def test_a_call_that_fails_is_traced_as_failed(
    qlora: Callable[..., Any], write_module: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRACE", "0")
    name = write_module("broken_in_trace", KERNELS.replace("return [Same]", "return [1 / 0]"))
    result = qlora("plugins", "list", "-p", name, "--trace")
    (line,) = [line for line in result.err.splitlines() if line.startswith("trace: qlora_kernels") and name in line]
    assert line.endswith("failed")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_it_nothing_is_traced(qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setenv("QLORA_TRACE", value or "")
    if value is None:
        monkeypatch.delenv("QLORA_TRACE")
    assert qlora("plugins", "list").err == ""
