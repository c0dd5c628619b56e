"""Every plugin that the scaffold writes works as it is, and names that can't be are refused before anything is written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from qlora_core import testing
from qlora_core.errors import PluginError
from qlora_core.registry import KINDS
from qlora_core.scaffold import new_plugin
from qlora_core.testing import run_checks

FILES = {
    "pyproject.toml",
    "README.md",
    "tests/test_conformance.py",
    "my_thing/__init__.py",
    "my_thing/implementation.py",
}
MAY_SKIP = {"dataset": {"no row stands in both splits"}}
KITS: dict[str, Any] = {kit.kind: kit for kit in vars(testing).values() if isinstance(kit, type) and hasattr(kit, "kind")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_every_kind_are_written_and_can_be_read(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "my-thing"
    written = new_plugin("my-thing", kind, folder)
    assert {str(path.relative_to(folder)) for path in written} == FILES
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    texts = {path.name: path.read_text(encoding="utf-8") for path in written}
    for path in written:
        if path.suffix == ".py":
            compile(path.read_text(encoding="utf-8"), str(path), "exec")
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["name"] == "my-thing"
    assert project["entry-points"]["qlora_core"] == {"my-thing": "my_thing"}
    assert f"{KITS[kind].__name__}" in texts["test_conformance.py"]
    assert not [name for name, text in texts.items() if "$" in text]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_clean(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    new_plugin("my-thing", kind, tmp_path)
    rules = ["--isolated", "--line-length=128", "--select=E,F,I,UP,B", "--no-cache", "--output-format=json"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert [f"{p['filename']}:{p['code']}" for p in json.loads(done.stdout)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_of_every_kind_passes_its_checks(kind: str, site: Path) -> None:
    new_plugin("my-thing", kind, site)
    importlib.invalidate_caches()
    outcomes = list(run_checks(type("Checked", (KITS[kind],), {"name": "my_thing", "plugins": ("my_thing",)})))
    assert {outcome.check: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}
    assert {outcome.check for outcome in outcomes if outcome.status == "skipped"} <= MAY_SKIP.get(kind, set())
    assert len(outcomes) > 7


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("x", "x"),
        ("my-3bit", "my_3bit"),
        ("acme.qlora-nf3", "acme_qlora_nf3"),
    ],
)
def test_dots_and_hyphens_become_underscores_in_the_package(name: str, package: str, tmp_path: Path) -> None:
    new_plugin(name, "kernels", tmp_path)
    assert (tmp_path / package / "__init__.py").is_file()
    entry_points = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert list(entry_points["qlora_core"].values()) == [package]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new_plugin("my-thing", "callback", tmp_path / "empty")


def refusal(name: str, kind: str, folder: Path) -> str:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(PluginError) as caught:
        new_plugin(name, kind, folder)
    assert sorted(folder.parent.rglob("*")) == before
    return str(caught.value)


def test_an_unknown_kind_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    message = refusal("my-thing", "quantiser", tmp_path / "my-thing")
    assert message == ("--kind quantiser: no such kind; one of quantizer, adapter, dataset, kernels, callback, exporter")


@pytest.mark.parametrize(
    "name", ["", "My-Thing", "3bit", "my thing", "-my", "my-", "my--thing", "../my", "class", "my/thing", "größe", "my-thing\n"]
)
def test_a_name_that_can_t_be_a_package_is_refused(name: str, tmp_path: Path) -> None:
    message = refusal(name, "adapter", tmp_path / "folder")
    assert message.startswith(
        f"{name!r} can't be a plugin's name; use lower-case letters, digits and hyphens, such as my-adapter"
    )


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.py").write_text("precious", encoding="utf-8")
    message = refusal("my-thing", "adapter", tmp_path / "full")
    assert message == f"{tmp_path / 'full'} exists already; name another folder with --output"
    assert (tmp_path / "full" / "work.py").read_text(encoding="utf-8") == "precious"


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    message = refusal("my-thing", "adapter", tmp_path / "file")
    assert message == f"{tmp_path / 'file'} exists already; name another folder with --output"


@pytest.mark.parametrize("name", ["json", "torch", "qlora-peft"])
def test_a_name_that_would_shadow_a_module_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f"^{name!r}: a module '{name.replace('-', '_')}' is installed already and would be"):
        new_plugin(name, "kernels", tmp_path / "new")
    assert not (tmp_path / "new").exists()
