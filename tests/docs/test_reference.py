"""The reference is what the code says: generated regions are up to date, and nothing is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from qlora_core.config import RunConfig
from qlora_core.hooks import ProviderHooks
from qlora_core.registry import KINDS, Registry, hook_name
from qlora_core.run import KEYS

DOCS = Path(__file__).parents[2] / "docs"
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


def test_every_builtin_option_is_documented() -> None:
    registry = Registry()
    for kind in KINDS:
        for found in registry.provided(kind):
            if found.plugin.distribution == "qlora-core":
                _, _, text = page("providers").partition(f"### `{found.provider.name}` ({kind})")
                assert text
                for option in found.provider.Options.model_fields:
                    assert f"| `{option}` |" in text.partition("\n### ")[0]


def test_every_key_of_the_metrics_is_documented() -> None:
    for key in (*KEYS, "eval_loss", "perplexity", "eval_tokens"):
        assert f"`{key}`" in page("run-directory")


def test_every_command_is_documented() -> None:
    for command in ("train", "generate", "eval", "demo", "doctor", "plugins list", "plugins show", "config init"):
        assert f"## `qlora {command}`" in page("cli")


def test_the_picture_fetches_nothing_and_shows_the_figures_of_the_text() -> None:
    picture = (DOCS / "images" / "demo.svg").read_text(encoding="utf-8")
    assert "@font-face" not in picture
    performance = (DOCS / "explanation" / "performance.md").read_text(encoding="utf-8")
    for figure in ("12.74", "8.19", "294"):
        assert figure in picture
        assert figure in performance
