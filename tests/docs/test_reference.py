"""The reference is what the code says: generated regions are up to date, and nothing is missing."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from qlora_core.cli.main import app
from qlora_core.config import RunConfig
from qlora_core.hooks import ProviderHooks
from qlora_core.providers import Provider
from qlora_core.registry import KINDS, Provided, Registry, hook_name
from qlora_core.run import KEYS

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
PAGES = sorted((DOCS / "reference").glob("*.md"))


def page(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_regions_are_up_to_date(path: Path, generator: ModuleType) -> None:
    text = path.read_text(encoding="utf-8")
    assert generator.generated(text) == text, "run: python docs/generate_reference.py"


def test_every_region_is_used(generator: ModuleType) -> None:
    used = {match["name"] for path in PAGES for match in generator.REGION.finditer(path.read_text(encoding="utf-8"))}
    assert used == set(generator.REGIONS)


def test_every_hook_is_documented() -> None:
    names = [name for name in vars(ProviderHooks) if name.startswith("qlora_")]
    assert sorted(names) == sorted(hook_name(kind) for kind in KINDS)
    for name in names:
        assert f"## `{name}`" in page("hooks")


def test_every_kind_of_provider_is_documented_with_its_methods() -> None:
    for kind, base in KINDS.items():
        assert f"## {kind}\n" in page("providers")
        for method in base.__abstractmethods__:
            assert f"`{method}(" in page("hooks")


def test_every_key_of_the_configuration_is_documented(generator: ModuleType) -> None:
    for name in RunConfig.model_fields:
        assert f"| `{name}` |" in page("configuration")
    for section, model in generator.SECTIONS.items():
        assert RunConfig.model_fields[section].annotation is model
        for name in model.model_fields:
            assert f"| `{section}.{name}` |" in page("configuration")


def builtin() -> list[Provided]:
    """Return the providers of this distribution."""
    registry = Registry()
    return [found for kind in KINDS for found in registry.provided(kind) if found.plugin.distribution == "qlora-core"]


def test_every_builtin_option_is_documented() -> None:
    for found in builtin():
        _, _, text = page("providers").partition(f"### `{found.provider.name}` ({found.kind})")
        assert text
        for option in found.provider.Options.model_fields:
            assert f"| `{option}` |" in text.partition("\n### ")[0]


def test_every_builtin_provider_and_option_is_named_in_a_test() -> None:
    files = [path for path in sorted(TESTS.rglob("*.py")) if path != Path(__file__)]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = {f"{f.kind} {f.provider.name}": (f.provider.name, f.provider.__name__) for f in builtin()}
    names |= {f"option {f.provider.name}.{option}": (option,) for f in builtin() for option in f.provider.Options.model_fields}
    untested = [what for what, words in names.items() if not any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)]
    assert not untested


def test_every_check_of_the_kit_is_documented_under_its_kind(generator: ModuleType) -> None:
    kits = generator.kits()
    assert list(kits) == list(KINDS)
    sections = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", page("conformance"), re.MULTILINE | re.DOTALL))
    for kind, kit in kits.items():
        for name, check in inspect.getmembers(kit, lambda member: inspect.isfunction(member)):
            if name.startswith("test_"):
                section = sections[kind if name in vars(kit) else "every kind"]
                assert f"| `{name}` | {' '.join(check.__doc__.split())} |" in section


def test_every_kind_has_a_walk_through() -> None:
    text = (DOCS / "how-to" / "write-a-plugin.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"\n@hookimpl\ndef {hook_name(kind)}():\n" in text


def test_every_method_and_attribute_of_a_provider_is_documented() -> None:
    for base in (Provider, *KINDS.values()):
        for name, member in vars(base).items():
            if inspect.isfunction(getattr(base, name)) or isinstance(member, classmethod):
                assert name.startswith("_") or f"| `{name}(" in page("hooks"), name
        for name in set(vars(base).get("__annotations__", {})) - {"name", "options"}:
            assert f"| `{name}` |" in page("hooks")


def test_every_key_of_the_metrics_is_documented() -> None:
    for key in (*KEYS, "eval_loss", "perplexity", "eval_tokens"):
        assert f"`{key}`" in page("run-directory")


def test_every_command_and_its_options_are_documented() -> None:
    for path, command in commands(typer.main.get_command(app), "qlora"):
        _, _, text = page("cli").partition(f"## `{path}`\n")
        assert text, path
        described = text.partition("\n## ")[0]
        options = [option for parameter in command.params if not parameter.hidden for option in parameter.opts]
        missing = [o for o in options if o.startswith("-") and o not in ("-h", "--help") and o not in described]
        assert not missing, path


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_the_picture_fetches_nothing_and_shows_the_figures_of_the_text() -> None:
    picture = (DOCS / "images" / "demo.svg").read_text(encoding="utf-8")
    assert "@font-face" not in picture
    performance = (DOCS / "explanation" / "performance.md").read_text(encoding="utf-8")
    for figure in ("12.74", "8.19", "294"):
        assert figure in picture
        assert figure in performance
