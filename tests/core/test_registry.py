"""Finding plugins and picking providers: what works, what is blocked, and that one broken plugin takes nothing down."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import PluginError
from qlora_core.hooks import ProviderHooks, hookspec
from qlora_core.providers import CallbackFactory
from qlora_core.registry import KINDS, Plugin, Registry, hook_name

OURS = {"bitsandbytes", "console", "merged", "peft", "plain", "records", "text", "torchao"}
Write = Callable[[str, str], str]
Install = Callable[..., None]

CALLBACK = """
    from qlora_core import CallbackFactory, hookimpl

    class Bell(CallbackFactory):
        name = "bell"

        def build(self, run):
            return None

    @hookimpl
    def qlora_callbacks():
        return [Bell]
"""


def plugin(registry: Registry, name: str) -> Plugin:
    return next(plugin for plugin in registry.plugins if plugin.name == name)


def refusal(registry: Registry, kind: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        registry.find(kind, name)
    return str(caught.value)


# Finding


def test_our_plugins_are_found_through_their_entry_points() -> None:
    registry = Registry()
    assert {plugin.name for plugin in registry.plugins} >= OURS
    assert {plugin(registry, name).status for name in OURS} == {"ok"}
    assert {plugin(registry, name).distribution for name in OURS} == {"qlora-core"}


@pytest.mark.parametrize(
    ("kind", "name", "qualified"),
    [
        ("quantizer", "nf4", "bitsandbytes:nf4"),
        ("quantizer", "fp4", "bitsandbytes:fp4"),
        ("quantizer", "int8", "bitsandbytes:int8"),
        ("quantizer", "none", "plain:none"),
        ("adapter", "lora", "peft:lora"),
        ("adapter", "none", "plain:none"),
        ("dataset", "text", "text:text"),
        ("kernels", "reference", "plain:reference"),
        ("callback", "progress", "console:progress"),
        ("callback", "early_stopping", "console:early_stopping"),
        ("callback", "transformers", "console:transformers"),
        ("quantizer", "ao_int8", "torchao:ao_int8"),
        ("exporter", "merged", "merged:merged"),
    ],
)
def test_each_of_our_providers_is_found_by_its_short_and_its_qualified_name(kind: str, name: str, qualified: str) -> None:
    registry = Registry()
    found = registry.find(kind, name)
    assert (found.kind, found.provider.name, found.qualified) == (kind, name, qualified)
    assert registry.find(kind, qualified) == found
    assert issubclass(found.provider, KINDS[kind])


def test_a_module_named_by_hand_is_a_plugin_without_being_installed(write_module: Write) -> None:
    name = write_module("bell_module", CALLBACK)
    registry = Registry(modules=[name])
    found = registry.find("callback", "bell")
    assert found.qualified == "bell_module:bell"
    assert (found.plugin.status, found.plugin.origin) == ("ok", "module bell_module")
    assert registry.find("callback", "bell_module:bell") == found


def test_a_module_named_twice_is_one_plugin(write_module: Write) -> None:
    name = write_module("bell_twice", CALLBACK)
    registry = Registry(modules=[name, name])
    assert [p.name for p in registry.plugins].count(name) == 1
    assert registry.find("callback", "bell").plugin.name == name


def test_a_module_inside_a_package_keeps_its_dotted_name(write_module: Write, site: Path) -> None:
    (site / "bells").mkdir()
    write_module("bells/__init__", "")
    write_module("bells/big", CALLBACK)
    registry = Registry(modules=["bells.big"])
    assert registry.find("callback", "bells.big:bell").provider.name == "bell"


def test_an_installed_distribution_is_found_with_its_version(install: Install) -> None:
    install("bell-plugin", "bell", "bell_installed", CALLBACK, version="3.1")
    registry = Registry()
    found = registry.find("callback", "bell:bell")
    assert (found.plugin.distribution, found.plugin.version) == ("bell-plugin", "3.1")
    assert found.plugin.origin == "bell-plugin 3.1"


def test_one_registry_knows_nothing_of_another(write_module: Write) -> None:
    name = write_module("bell_alone", CALLBACK)
    assert Registry(modules=[name]).find("callback", "bell").plugin.name == name
    assert refusal(Registry(), "callback", "bell").startswith("unknown callback 'bell'")


# Blocking


def test_a_blocked_plugin_is_listed_and_its_providers_are_unknown() -> None:
    registry = Registry(disable=["text", "records"])
    assert plugin(registry, "text").status == "blocked"
    assert registry.provided("dataset") == []
    assert refusal(registry, "dataset", "text") == (
        "unknown dataset 'text'; no plugin provides a dataset; plugin 'records' is disabled; plugin 'text' is disabled"
    )


def test_a_blocked_plugin_is_never_imported() -> None:
    code = (
        "import sys; from qlora_core.registry import Registry; Registry(disable=['text', 'peft']).plugins; "
        "print(sorted(n for n in sys.modules if n.startswith('qlora_') and '.' not in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "['qlora_bitsandbytes', 'qlora_console', 'qlora_core', 'qlora_fused', 'qlora_merged', 'qlora_plain', "
        "'qlora_records', 'qlora_torchao']"
    )


def test_a_module_named_by_hand_can_be_blocked_too(write_module: Write) -> None:
    name = write_module("blocked_by_hand", "raise AssertionError('imported')")
    registry = Registry(modules=[name], disable=[name])
    assert plugin(registry, name).status == "blocked"
    assert name not in sys.modules


def test_a_blocked_plugins_module_can_still_be_named_by_hand() -> None:
    registry = Registry(modules=["qlora_text"], disable=["text"])
    assert registry.find("dataset", "text").qualified == "qlora_text:text"


# Broken plugins

HEAD = "from qlora_core import CallbackFactory, Quantizer, hookimpl\n"
BROKEN = {
    "import_error": ("import a_library_nobody_has", "ModuleNotFoundError: No module named 'a_library_nobody_has'"),
    "exception": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "syntax_error": ("def f(:", "SyntaxError: "),
    "system_exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "no_hook": (
        "def callbacks(): return []",
        "no_hook_plugin implements no hook; mark one of qlora_quantizers, qlora_adapters, qlora_datasets, qlora_kernels, "
        "qlora_callbacks, qlora_exporters with qlora_core.hookimpl",
    ),
    "unmarked_hook": (
        HEAD + "def qlora_callbacks(): return []\n@hookimpl\ndef qlora_quantizers(): return []",
        "qlora_callbacks is not marked; put @qlora_core.hookimpl above it, or give it another name",
    ),
    "argument_with_default": (
        HEAD + "@hookimpl\ndef qlora_callbacks(sort=True): return []",
        "qlora_callbacks: the argument 'sort' has a default and would never be passed; leave the default out",
    ),
    "later_hook_api": (
        HEAD + "qlora_hook_api = 2\n@hookimpl\ndef qlora_callbacks(): return []",
        "later_hook_api_plugin was built for hook API 2 and this qlora-core has 1; upgrade qlora-core, "
        "or install an older version of the plugin",
    ),
    "options_of_another_kind": (
        HEAD + "class A(CallbackFactory):\n    name = 'a'\n    class Options: pass\n    def build(self, run): pass\n"
        "@hookimpl\ndef qlora_callbacks(): return [A]",
        "qlora_callbacks: A.Options must be a subclass of qlora_core.ProviderOptions",
    ),
    "misspelt_hook": (
        HEAD + "@hookimpl\ndef qlora_calbacks(): return []",
        "qlora_calbacks is no hook of this qlora-core (hook API 1); it has qlora_quantizers, qlora_adapters, qlora_datasets, "
        "qlora_kernels, qlora_callbacks, qlora_exporters; did you mean 'qlora_callbacks'?",
    ),
    "misspelt_beside_right": (
        HEAD + "@hookimpl\ndef qlora_calbacks(): return []\n@hookimpl\ndef qlora_quantizers(): return []",
        "qlora_calbacks",
    ),
    "unknown_argument": (
        HEAD + "@hookimpl\ndef qlora_callbacks(registry): return []",
        "qlora_callbacks: the argument 'registry' is unknown to hook API 1; upgrade qlora-core, or drop it",
    ),
    "returns_none": (
        HEAD + "@hookimpl\ndef qlora_callbacks(): pass",
        "qlora_callbacks: must return a list of CallbackFactory classes (got NoneType)",
    ),
    "returns_class": (
        HEAD + "@hookimpl\ndef qlora_callbacks(): return CallbackFactory",
        "qlora_callbacks: must return a list of CallbackFactory classes (got ABCMeta)",
    ),
    "returns_other_kind": (
        HEAD + "@hookimpl\ndef qlora_callbacks(): return [Quantizer]",
        "qlora_callbacks: must return CallbackFactory classes (got <class 'qlora_core.providers.Quantizer'>)",
    ),
    "returns_no_class": (
        HEAD + "@hookimpl\ndef qlora_callbacks(): return ['bell']",
        "qlora_callbacks: must return CallbackFactory classes (got 'bell')",
    ),
    "abstract": (
        HEAD + "class A(CallbackFactory):\n    name = 'a'\n@hookimpl\ndef qlora_callbacks(): return [A]",
        "qlora_callbacks: A does not implement build",
    ),
    "nameless": (
        HEAD + "class A(CallbackFactory):\n    def build(self, run): pass\n@hookimpl\ndef qlora_callbacks(): return [A]",
        'qlora_callbacks: A has no name; set `name = "..."`, what users write',
    ),
    "version_no_number": (
        HEAD + "qlora_hook_api = '1'\n@hookimpl\ndef qlora_callbacks(): return []",
        "version_no_number_plugin: qlora_hook_api must be a whole number (got '1')",
    ),
    "wrapper": (
        HEAD + "@hookimpl(wrapper=True)\ndef qlora_callbacks():\n    return (yield)",
        "qlora_callbacks is a wrapper, and a hook here only provides; leave out wrapper=True",
    ),
    "one_name_twice": (
        HEAD + "class A(CallbackFactory):\n    name = 'a'\n    def build(self, run): pass\n"
        "@hookimpl\ndef qlora_callbacks(): return [A, A]",
        "qlora_callbacks: it provides two called 'a'; rename one",
    ),
    "odd_name": (
        HEAD + "class A(CallbackFactory):\n    name = '../a b'\n    def build(self, run): pass\n"
        "@hookimpl\ndef qlora_callbacks(): return [A]",
        "qlora_callbacks: A is named '../a b'; use letters, digits, _, - and . only",
    ),
    "hook_raises": (
        HEAD + "@hookimpl\ndef qlora_callbacks(): return 1 / 0",
        "qlora_callbacks: ZeroDivisionError: division by zero",
    ),
    "hook_exits": (HEAD + "@hookimpl\ndef qlora_callbacks(): raise SystemExit(3)", "qlora_callbacks: SystemExit: 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_stands_in_the_list_with_the_reason_and_the_rest_works(case: str, write_module: Write) -> None:
    source, reason = BROKEN[case]
    name = write_module(f"{case}_plugin", source)
    bell = write_module(f"bell_beside_{case}", CALLBACK)
    registry = Registry(modules=[name, bell])
    failed = plugin(registry, name)
    assert failed.status == "failed"
    assert reason in failed.failure
    assert registry.find("callback", "bell").plugin.name == bell
    assert registry.find("quantizer", "nf4").qualified == "bitsandbytes:nf4"
    assert {plugin(registry, ours).status for ours in OURS} == {"ok"}


@pytest.mark.parametrize("case", ["import_error", "system_exit", "misspelt_hook", "nameless"])
def test_a_broken_installed_plugin_takes_no_other_down(case: str, install: Install) -> None:
    source, reason = BROKEN[case]
    install("broken-plugin", "broken", f"{case}_installed", source)
    registry = Registry()
    assert reason in plugin(registry, "broken").failure
    assert {plugin(registry, ours).status for ours in OURS} == {"ok"}


def test_a_good_hook_of_a_plugin_with_a_misspelt_one_is_not_used(write_module: Write) -> None:
    source = HEAD + "@hookimpl\ndef qlora_calbacks(): return []\n" + textwrap.dedent(CALLBACK)
    registry = Registry(modules=[write_module("half_right", source)])
    assert "half_right" not in {found.plugin.name for found in registry.provided("callback")}


@pytest.mark.parametrize("value", ["my-plugin", "123 4", "a.b:c d", ""])
def test_an_entry_point_that_names_no_module_is_a_failed_plugin(value: str, install: Install) -> None:
    install("odd-plugin", "odd", value or '""')
    registry = Registry()
    assert plugin(registry, "odd").status == "failed"
    assert plugin(registry, "odd").distribution == "odd-plugin"
    assert {plugin(registry, ours).status for ours in OURS} == {"ok"}


def test_two_distributions_with_one_entry_point_name_both_stand_as_failed_with_the_remedy(install: Install) -> None:
    install("first-bell", "bell", "first_bell", CALLBACK)
    install("second-bell", "bell", "second_bell", CALLBACK)
    registry = Registry()
    failure = plugin(registry, "bell").failure
    assert failure.startswith("two distributions use the entry-point name 'bell': ")
    assert "first-bell (first_bell)" in failure
    assert "second-bell (second_bell)" in failure
    assert failure.endswith("; uninstall one of them, or disable 'bell' and name the module to use with -p")
    assert "first_bell" not in sys.modules
    assert "second_bell" not in sys.modules
    assert "two distributions use the entry-point name 'bell'" in refusal(registry, "callback", "bell")


def test_the_remedy_for_one_entry_point_name_works(install: Install) -> None:
    install("first-bell", "bell", "first_bell_again", CALLBACK)
    install("second-bell", "bell", "second_bell_again", CALLBACK)
    registry = Registry(modules=["second_bell_again"], disable=["bell"])
    assert registry.find("callback", "bell").qualified == "second_bell_again:bell"


def test_a_module_that_is_installed_as_a_plugin_already_is_not_added_again() -> None:
    registry = Registry(modules=["qlora_text"])
    assert "qlora_text" not in {plugin.name for plugin in registry.plugins}
    assert registry.find("dataset", "text").qualified == "text:text"


def test_a_module_with_the_name_of_an_installed_plugin_is_told_so(write_module: Write) -> None:
    registry = Registry(modules=[write_module("text", CALLBACK)])
    assert plugin(registry, "module text").failure.endswith("is called 'text', too; give the module another name")
    assert registry.find("dataset", "text").qualified == "text:text"


def test_a_module_that_does_not_exist_is_a_failed_plugin() -> None:
    assert plugin(Registry(modules=["no_such_module"]), "no_such_module").failure == (
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


# Looking up


def test_same_name_from_two_plugins_asks_the_user_to_choose(write_module: Write) -> None:
    first, second = write_module("bell_one", CALLBACK), write_module("bell_two", CALLBACK)
    registry = Registry(modules=[first, second])
    assert refusal(registry, "callback", "bell") == (
        "callback 'bell' is provided by more than one plugin; write 'bell_one:bell' (from module bell_one) or "
        "'bell_two:bell' (from module bell_two), or disable one of them"
    )
    assert registry.find("callback", "bell_two:bell").plugin.name == second


def test_a_builtin_name_has_no_precedence(write_module: Write) -> None:
    name = write_module("own_progress", CALLBACK.replace('"bell"', '"progress"'))
    message = refusal(Registry(modules=[name]), "callback", "progress")
    assert "'console:progress' (from qlora-core " in message
    assert "'own_progress:progress' (from module own_progress)" in message
    assert Registry(modules=[name], disable=["console"]).find("callback", "progress").plugin.name == name


def test_an_unknown_name_gets_a_guess_and_what_is_installed() -> None:
    assert refusal(Registry(), "quantizer", "nf5").startswith(
        "unknown quantizer 'nf5'; did you mean 'nf4'?; installed: ao_int8, fp4, int8, nf4, none"
    )


@pytest.mark.parametrize("name", ["txet:nf4", "text:nf4", ":nf4x", "bitsandbytes:"])
def test_a_qualified_name_that_does_not_exist_is_unknown(name: str) -> None:
    assert refusal(Registry(), "quantizer", name).startswith(f"unknown quantizer {name!r}")


def test_an_unknown_name_names_failed_and_disabled_plugins(write_module: Write) -> None:
    name = write_module("failing_plugin", "raise RuntimeError('no luck')")
    message = refusal(Registry(modules=[name], disable=["bitsandbytes"]), "quantizer", "nf4")
    assert message.startswith("unknown quantizer 'nf4'")
    assert "installed: ao_int8, none" in message
    assert "; plugin 'failing_plugin' failed to load (RuntimeError: no luck)" in message
    assert "; plugin 'bitsandbytes' is disabled" in message


def test_providers_come_in_the_order_of_their_names() -> None:
    assert [found.provider.name for found in Registry(disable=[]).provided("quantizer")] == [
        "ao_int8",
        "fp4",
        "int8",
        "nf4",
        "none",
    ]


def test_every_hook_is_called_only_once(write_module: Write) -> None:
    name = write_module(
        "counting", "calls = []\n" + textwrap.dedent(CALLBACK).replace("return [Bell]", "calls.append(1); return [Bell]")
    )
    registry = Registry(modules=[name])
    assert registry.find("callback", "bell").provider is registry.find("callback", "bell").provider
    assert registry.plugins == registry.plugins
    assert sys.modules[name].calls == [1]
    assert issubclass(registry.find("callback", "bell").provider, CallbackFactory)


def test_hook_names_are_plurals_of_kinds() -> None:
    assert [hook_name(kind) for kind in KINDS] == [
        "qlora_quantizers",
        "qlora_adapters",
        "qlora_datasets",
        "qlora_kernels",
        "qlora_callbacks",
        "qlora_exporters",
    ]


# Versions of the hooks


class LaterHooks(ProviderHooks):
    """What a later version might be: one hook has got an argument."""

    @hookspec
    def qlora_callbacks(self, interactive: bool) -> list[type[CallbackFactory]]:
        """Callbacks this plugin provides."""


class LaterRegistry(Registry):
    hooks = LaterHooks

    def _arguments(self, kind: str) -> dict[str, Any]:
        return {"interactive": True} if kind == "callback" else {}


def test_a_plugin_goes_on_working_when_its_hook_gets_an_argument(write_module: Write) -> None:
    old = write_module("bell_of_today", CALLBACK)
    new = write_module("bell_of_tomorrow", CALLBACK.replace("qlora_callbacks()", "qlora_callbacks(interactive)"))
    registry = LaterRegistry(modules=[old, new])
    assert registry.find("callback", f"{old}:bell").plugin.status == "ok"
    assert registry.find("callback", f"{new}:bell").plugin.status == "ok"
    assert {plugin(registry, ours).status for ours in OURS} == {"ok"}
    today = Registry(modules=[old, new])
    assert today.find("callback", "bell").plugin.name == old
    assert plugin(today, new).failure.startswith(
        "qlora_callbacks: the argument 'interactive' is unknown to hook API 1; upgrade"
    )


def test_a_plugin_for_this_version_of_the_hooks_is_taken(write_module: Write) -> None:
    name = write_module("bell_that_says_its_version", "qlora_hook_api = 1\n" + textwrap.dedent(CALLBACK))
    assert Registry(modules=[name]).find("callback", "bell").plugin.name == name


@pytest.mark.parametrize("name", ["plugins/bell.py", "bell.py"])
def test_a_file_in_place_of_a_module_is_said_to_be_one(name: str) -> None:
    assert plugin(Registry(modules=[name]), name).failure == (
        f"{name!r} is a file; name the module, my_plugin for my_plugin.py, from the folder it lies in"
    )


@pytest.mark.parametrize("name", ["", "a b", "..", ".plugin", "a-b", "\x00"])
def test_what_can_be_no_module_says_so(name: str) -> None:
    assert plugin(Registry(modules=[name]), name).failure == (
        f"{name!r} is no name of a module; write it as in an import, my_package.my_plugin"
    )
