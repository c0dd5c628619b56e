"""The public Python API: every name is there, from where it says, and costs nothing until it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import qlora_core

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


def names_for_type_checkers() -> dict[str, str]:
    """Return the name and the module of each import under `if TYPE_CHECKING:`."""
    tree = ast.parse(Path(qlora_core.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_all_the_lazy_homes_and_the_imports_for_type_checkers_agree() -> None:
    homes = {name: f"qlora_core.{module}" for module, names in qlora_core._HOMES.items() for name in names}
    assert homes == names_for_type_checkers()
    assert sorted([*homes, "__version__"]) == sorted(qlora_core.__all__)
    assert len(set(qlora_core.__all__)) == len(qlora_core.__all__)


@pytest.mark.parametrize("name", qlora_core.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    found = getattr(qlora_core, name)
    if name != "__version__":
        assert found is getattr(importlib.import_module(names_for_type_checkers()[name]), name)


@pytest.mark.parametrize("name", [name for name in qlora_core.__all__ if name != "__version__"])
def test_every_public_name_is_public_in_its_own_module_too(name: str) -> None:
    assert name in importlib.import_module(names_for_type_checkers()[name]).__all__


@pytest.mark.parametrize("name", [name for name in qlora_core.__all__ if name not in ("__version__", "hookimpl")])
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(qlora_core, name).__doc__ or "").strip()


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qlora_core' has no attribute 'finetun'"):
        qlora_core.finetun  # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert dir(qlora_core) == sorted(qlora_core.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert qlora_core.__version__ == version("qlora-core")


@pytest.mark.parametrize(
    "statement",
    [
        "import qlora_core; dir(qlora_core)",
        "from qlora_core import Quantizer, Registry, RunConfig, hookimpl, resolve, Run, ConfigError",
        "import qlora_bitsandbytes",
        "import qlora_peft",
        "import qlora_text",
        "import qlora_console",
        "import qlora_plain",
        "from qlora_core import RunConfig, Registry, resolve; "
        "resolve(RunConfig.parse({'model': 'm', 'dataset': {'name': 'text', 'path': 'x'}}), Registry())",
    ],
)
def test_what_a_plugin_or_a_configuration_needs_imports_nothing_heavy(statement: str) -> None:
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_core_never_imports_a_plugin() -> None:
    plugins = {entry.module for entry in entry_points(group="qlora_core")}
    for path in Path(qlora_core.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not plugins & {name.partition(".")[0] for name in imported}, path


def test_no_plugin_imports_another() -> None:
    ours = [e.module for e in entry_points(group="qlora_core") if e.dist]
    for own in ours:
        for path in Path(str(importlib.import_module(own).__file__)).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                imported += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not (set(ours) - {own}) & {name.partition(".")[0] for name in imported}, path
