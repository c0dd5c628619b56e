"""Every hook provides something that is found through it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pluggy
import pytest

from qlora_core.hooks import PROJECT, ProviderHooks, hookimpl
from qlora_core.registry import KINDS, Registry, hook_name

PROVIDERS = {
    "qlora_quantizers": """
        class Mine(qlora_core.Quantizer):
            name = "mine"
            def load_kwargs(self, skeleton): return {}
            def is_quantized(self, module): return False
            def dequantize(self, module): return module.weight
            def stored_bytes(self, shape): return 0
    """,
    "qlora_adapters": """
        class Mine(qlora_core.Adapter):
            name = "mine"
            def inject(self, model, new_token_ids=()): return model
            def save(self, model, folder): pass
            def load(self, model, folder): return model
    """,
    "qlora_datasets": """
        class Mine(qlora_core.DatasetSource):
            name = "mine"
            def examples(self, split): return None
    """,
    "qlora_kernels": """
        class Mine(qlora_core.Kernels):
            name = "mine"
            def apply(self, model): return model
    """,
    "qlora_callbacks": """
        class Mine(qlora_core.CallbackFactory):
            name = "mine"
            def build(self, run): return None
    """,
    "qlora_exporters": """
        class Mine(qlora_core.Exporter):
            name = "mine"
            def export(self, saved, folder): pass
    """,
}


def specified_hooks() -> set[str]:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(ProviderHooks)
    return {name for name in vars(manager.hook) if not name.startswith("_")}


def test_every_specified_hook_is_tested_here() -> None:
    assert set(PROVIDERS) == specified_hooks()


def test_every_kind_has_its_hook_and_every_hook_its_kind() -> None:
    assert {hook_name(kind) for kind in KINDS} == specified_hooks()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plugin_returns_from_a_hook_is_found_by_kind_and_name(
    kind: str, write_module: Callable[[str, str], str]
) -> None:
    hook = hook_name(kind)
    head = "import qlora_core\n"
    body = textwrap.dedent(PROVIDERS[hook])
    tail = f"\n@qlora_core.hookimpl\ndef {hook}():\n    return [Mine]\n"
    name = write_module(f"mine_through_{hook}", head + body + tail)
    found = Registry(modules=[name]).find(kind, "mine")
    assert (found.kind, found.qualified) == (kind, f"{name}:mine")
    assert issubclass(found.provider, KINDS[kind])
    assert found.provider().name == "mine"


@pytest.mark.parametrize("hook", sorted(PROVIDERS))
def test_every_hook_says_what_it_is_for_in_one_line(hook: str) -> None:
    documentation = getattr(ProviderHooks, hook).__doc__
    assert documentation.endswith(".")
    assert "\n" not in documentation


def test_the_marker_for_plugins_is_the_one_the_registry_listens_to() -> None:
    assert hookimpl.project_name == PROJECT == "qlora_core"
