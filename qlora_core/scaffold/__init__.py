"""Write a new plugin: a working distribution with one provider and its conformance test. Imports no torch."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from qlora_core import __version__
from qlora_core.errors import PluginError
from qlora_core.registry import KINDS

__all__ = ["new_plugin"]

USE = {
    "quantizer": "quantizer: {name}",
    "adapter": "adapter: {name}",
    "dataset": "dataset: {{name: {name}, path: lines.txt}}",
    "kernels": "kernels: {name}",
    "callback": "callbacks: [progress, {name}]",
    "exporter": "exports: [{name}]",
}


def new_plugin(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the distribution *name*, which provides one part of *kind*, into *folder*, and return its files.

    Raises PluginError for a kind that does not exist, a name that can't be one, and a folder that holds something.
    """
    if kind not in KINDS:
        raise PluginError(f"--kind {kind}: no such kind; one of {', '.join(KINDS)}")
    package = re.sub(r"[-.]+", "_", name)
    if not re.fullmatch(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*", name) or keyword.iskeyword(package):
        raise PluginError(f"{name!r} can't be a plugin's name; use lower-case letters, digits and hyphens, such as my-{kind}")
    if package in sys.stdlib_module_names or find_spec(package) is not None:
        raise PluginError(f"{name!r}: a module {package!r} is installed already and would be shadowed; take another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{folder} exists already; name another folder with --output")
    values = {
        "distribution": name,
        "package": package,
        "kind": kind,
        "Kit": KINDS[kind].__name__.removesuffix("Source").removesuffix("Factory") + "Conformance",
        "Class": "".join(part.capitalize() for part in package.split("_")),
        "use": USE[kind].format(name=package),
        "version": __version__,
    }
    targets = {
        "pyproject.toml": files(__name__) / "common" / "pyproject.toml.txt",
        "README.md": files(__name__) / "common" / "README.md.txt",
        "tests/test_conformance.py": files(__name__) / "common" / "test_conformance.py.txt",
        f"{package}/__init__.py": files(__name__) / kind / "provider.py.txt",
        f"{package}/implementation.py": files(__name__) / kind / "implementation.py.txt",
    }
    written = []
    for target, template in targets.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
        written.append(path)
    return written
