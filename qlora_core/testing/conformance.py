"""What every provider must keep, whatever its kind, and running checks without pytest. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from qlora_core.errors import ConfigError, PluginError
from qlora_core.parts import made
from qlora_core.registry import Provided, Registry, hook_problems
from qlora_core.validation import validate

__all__ = ["HEAVY", "Conformance", "Outcome", "check_no_pickle", "conformance_of", "run_checks"]

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


class Conformance:
    """The checks of all kinds. Subclass the one of a kind, and set `name`."""

    kind: ClassVar[str]
    name: ClassVar[str]
    """The provider, as users write it: "mine", or "plugin:mine"."""
    options: Mapping[str, Any] | None = None
    """Options to check it with; by default what its `example` returns."""
    plugins: ClassVar[Sequence[str]] = ()
    """Modules to use without installing them, as with -p."""

    def found(self) -> Provided:
        """Return the provider with the plugin that it comes from."""
        return Registry(modules=self.plugins).find(self.kind, self.name)

    def provider(self) -> Any:
        """Return a new provider with the options to check."""
        found = self.found()
        return made(found, self.__options(found))

    def usable(self) -> Any:
        """Return a new provider; skip the check where this machine lacks something for it."""
        provider = self.provider()
        lacking = provider.missing()
        if lacking:
            raise unittest.SkipTest(f"needs {lacking}")
        provider.check_libraries()
        return provider

    def __options(self, found: Provided) -> Mapping[str, Any]:
        if self.options is not None:
            return self.options
        self.__folder = tempfile.TemporaryDirectory(prefix="qlora-example-")
        return found.provider.example(Path(self.__folder.name))

    def test_it_is_found_and_its_plugin_is_sound(self) -> None:
        """found by its name; its plugin is listed as ok"""
        found = self.found()
        listed = {plugin.name: plugin for plugin in Registry(modules=self.plugins).plugins}
        plugin = listed[found.plugin.name]
        assert plugin.status == "ok", f"the plugin {plugin.name!r} is {plugin.status}: {plugin.failure}"

    def test_its_entry_module_is_light(self) -> None:
        """importing its plugin imports none of torch, transformers, peft, bitsandbytes, datasets, numpy"""
        module = self.__module()
        code = f"import sys; import {module}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
        path = [str(Path(entry)) for entry in sys.path if entry]
        code = f"import sys; sys.path[:] = {path!r}; {code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{module} can't be imported by itself: {done.stderr.strip().splitlines()[-1]}"
        assert not done.stdout.strip(), f"importing {module} imports {done.stdout.strip()}; import it late, in the methods"

    def test_its_hooks_are_what_pluggy_calls(self) -> None:
        """hook functions are marked, spelt as specified, and have no arguments with defaults"""
        problems = hook_problems(importlib.import_module(self.__module()))
        assert not problems, "; ".join(problems)

    def test_it_says_what_it_is(self) -> None:
        """the class has a docstring; `qlora plugins show` prints it"""
        provider = self.found().provider
        assert (provider.__doc__ or "").strip(), f"{provider.__name__} has no docstring"

    def test_unknown_options_are_refused(self) -> None:
        """an option that it does not have is refused, and options can't be changed later"""
        options = self.found().provider.Options
        try:
            validate(options, {"no_such_option": 1})
        except ConfigError as error:
            refused = any(problem.where == ("no_such_option",) for problem in error.problems)
        else:
            refused = False
        assert refused, 'it takes an option "no_such_option"; let model_config keep extra="forbid"'
        assert options.model_config.get("frozen"), "options can be changed after validation; let model_config keep frozen=True"

    def test_every_option_is_described(self) -> None:
        """every option has a description"""
        bare = [name for name, field in self.found().provider.Options.model_fields.items() if not field.description]
        assert not bare, f"no description: {', '.join(bare)}; write Field(..., description=...), or a docstring below the field"

    def test_options_survive_json(self) -> None:
        """options written as JSON and read again are the same, and have a JSON Schema"""
        try:
            provider = self.provider()
            text = json.dumps(provider.options.model_dump(mode="json"))
            again = type(provider.options).model_validate_json(text)
            type(provider.options).model_json_schema()
        except (TypeError, ValueError, ValidationError, PluginError) as error:
            raise AssertionError(f"options can't be written to config.yaml and read again: {error}") from error
        assert again == provider.options, f"read again they are {again!r}, not {provider.options!r}"

    def __module(self) -> str:
        """Return the module of the provider's plugin; where nothing provides it, the first one named by hand."""
        try:
            return self.found().plugin.module
        except PluginError:
            if not self.plugins:
                raise
            return self.plugins[0]


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    check: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    seconds: float


def conformance_of(found: Provided, plugins: Sequence[str] = ()) -> type[Conformance]:
    """Return the kit for the provider *found*, to be passed to `run_checks`."""
    from qlora_core import testing

    kinds = {kit.kind: kit for kit in vars(testing).values() if inspect.isclass(kit) and hasattr(kit, "kind")}
    return type("Checked", (kinds[found.kind],), {"name": found.qualified, "plugins": tuple(plugins)})


def run_checks(kit: type[Conformance]) -> Iterator[Outcome]:
    """Run every check of *kit* and yield what came of it, in the order in which they are written."""
    methods = {
        name: method for base in reversed(kit.__mro__) for name, method in vars(base).items() if name.startswith("test_")
    }
    for name, method in methods.items():
        started = time.perf_counter()
        status: Literal["passed", "failed", "skipped"] = "passed"
        detail = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is the report's
                getattr(kit(), name)()
        except unittest.SkipTest as skipped:
            status, detail = "skipped", str(skipped)
        except AssertionError as failure:
            status, detail = "failed", str(failure)
        except (Exception, SystemExit) as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
        label = " ".join((method.__doc__ or name).split())
        yield Outcome(label, status, detail, time.perf_counter() - started)


def check_no_pickle(folder: Path) -> None:
    """Raise AssertionError where a file below *folder* is a pickle or an archive of one."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            head = stream.read(2)
        pickled = head[:1] == b"\x80" or (head == b"PK" and any(n.endswith(".pkl") for n in zipfile.ZipFile(path).namelist()))
        assert not pickled, (
            f"{path.relative_to(folder)} is a pickle, which runs code when it is loaded; write safetensors or JSON"
        )
