"""Find plugins and pick providers by name. Imports no torch, and no plugin unless it is installed and not blocked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

import pluggy

from qlora_core.calls import reason, traced
from qlora_core.errors import PluginError
from qlora_core.hooks import HOOK_API, PROJECT, ProviderHooks
from qlora_core.providers import (
    Adapter,
    CallbackFactory,
    DatasetSource,
    Exporter,
    Kernels,
    Provider,
    ProviderOptions,
    Quantizer,
)
from qlora_core.validation import did_you_mean

__all__ = ["KINDS", "Plugin", "Provided", "Registry", "hook_problems", "kind_of"]

P = TypeVar("P", bound=Provider)

KINDS: dict[str, type[Provider]] = {
    "quantizer": Quantizer,
    "adapter": Adapter,
    "dataset": DatasetSource,
    "kernels": Kernels,
    "callback": CallbackFactory,
    "exporter": Exporter,
}


def hook_name(kind: str) -> str:
    """Return the hook that provides *kind*: `qlora_quantizers` for "quantizer"."""
    return f"qlora_{kind if kind.endswith('s') else kind + 's'}"


def kind_of(provider: type[Provider]) -> str:
    """Return the kind of *provider*, "provider" for a class of none."""
    return next((kind for kind, base in KINDS.items() if issubclass(provider, base)), "provider")


def hook_problems(module: Any, hooks: type = ProviderHooks) -> list[str]:
    """Return what is wrong with the hook functions of *module*, a plugin, that pluggy itself would accept in silence.

    It never calls a function that is not marked, and never passes an argument that has a default.
    """
    known = [name for base in reversed(hooks.__mro__) for name in vars(base) if name.startswith("qlora_")]
    functions = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
    problems = []
    for name, function in functions.items():
        marked = hasattr(function, f"{PROJECT}_impl")
        if marked and name not in known:
            others = f"it has {', '.join(known)}{did_you_mean(name, known)}"
            problems.append(f"{name} is no hook of this qlora-core (hook API {HOOK_API}); {others}")
        elif name.startswith("qlora_") and not marked:
            problems.append(f"{name} is not marked; put @qlora_core.hookimpl above it, or give it another name")
        elif marked and getattr(function, f"{PROJECT}_impl").get("wrapper"):
            problems.append(f"{name} is a wrapper, and a hook here only provides; leave out wrapper=True")
        elif marked:
            problems += _argument_problems(name, function, set(inspect.signature(getattr(hooks, name)).parameters))
    return problems


def _argument_problems(name: str, function: Any, passed: set[str]) -> list[str]:
    problems = []
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            problems.append(f"{name}: the argument {argument!r} has a default and would never be passed; leave the default out")
        elif argument not in passed:
            problems.append(
                f"{name}: the argument {argument!r} is unknown to hook API {HOOK_API}; upgrade qlora-core, or drop it"
            )
    return problems


@dataclass(frozen=True)
class Plugin:
    """An installed or named plugin. `failure` says why it can't be used; a blocked one was never imported."""

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    blocked: bool = False
    failure: str = ""

    @property
    def status(self) -> str:
        """One of "ok", "failed" and "blocked"."""
        return "blocked" if self.blocked else "failed" if self.failure else "ok"

    @property
    def origin(self) -> str:
        """Where it comes from, for messages: "qlora-core 0.1.0" or "module my_plugin"."""
        return f"{self.distribution} {self.version}" if self.distribution else f"module {self.module}"


@dataclass(frozen=True)
class Provided:
    """A provider class and the plugin that it comes from."""

    kind: str
    plugin: Plugin
    provider: type[Provider]

    @property
    def qualified(self) -> str:
        """The name that is never ambiguous: "bitsandbytes:nf4"."""
        return f"{self.plugin.name}:{self.provider.name}"


class Registry:
    """The plugins that are installed, less the blocked ones, plus *modules* named by hand.

    Raises nothing while it discovers: a plugin that fails stays in `plugins` with the reason, and only asking for
    something it would have provided is an error.
    """

    hooks: ClassVar[type] = ProviderHooks

    def __init__(self, *, modules: Sequence[str] = (), disable: Collection[str] = ()) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(self.hooks)
        self._plugins: dict[str, Plugin] = {}
        self._provided: dict[str, list[Provided]] = {}
        found = entry_points(group=PROJECT)
        for name in sorted(found.names):
            self._add(name, list(found.select(name=name)), blocked=name in disable)
        for module in modules:
            self._add_module(module, blocked=module in disable)

    @property
    def plugins(self) -> list[Plugin]:
        """Every plugin, failed and blocked ones included, by name."""
        for kind in KINDS:  # a plugin may fail only when its hooks are called
            self.provided(kind)
        return sorted(self._plugins.values(), key=lambda plugin: plugin.name)

    def provided(self, kind: str) -> list[Provided]:
        """Return all providers of *kind*, in the order of their plugins' names."""
        if kind not in self._provided:
            self._provided[kind] = sorted(self._call(kind), key=lambda p: (p.provider.name, p.plugin.name))
        return self._provided[kind]

    def find(self, kind: str, name: str) -> Provided:
        """Return the provider of *kind* called *name* or *plugin:name*; raise PluginError where that is not exactly one."""
        plugin, _, short = name.rpartition(":")
        candidates = [p for p in self.provided(kind) if p.provider.name == short and plugin in ("", p.plugin.name)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = " or ".join(f"'{p.qualified}' (from {p.plugin.origin})" for p in candidates)
            raise PluginError(f"{kind} {name!r} is provided by more than one plugin; write {names}, or disable one of them")
        raise PluginError(self._unknown(kind, name))

    def _add_module(self, module: str, *, blocked: bool) -> None:
        """Add *module*, named by hand, unless an installed plugin is that module already."""
        if any(plugin.module == module and plugin.status == "ok" for plugin in self._plugins.values()):
            return
        other = self._plugins.get(module)
        if other is None:
            self._add(module, [EntryPoint(module, module, PROJECT)], blocked=blocked)
        elif other.module != module:
            failure = f"an installed plugin ({other.origin}) is called {module!r}, too; give the module another name"
            self._plugins[f"module {module}"] = Plugin(f"module {module}", module, failure=failure)

    def _add(self, name: str, found: list[EntryPoint], *, blocked: bool) -> None:
        entry = found[0]
        distributions = [_distribution(e) for e in found]
        plugin = Plugin(name, module_of(entry), *distributions[0], blocked=blocked)
        if len({(e.value, own) for e, own in zip(found, distributions, strict=True)}) > 1:
            owners = " and ".join(f"{own[0]} ({e.value})" for e, own in zip(found, distributions, strict=True))
            plugin = replace(
                plugin,
                failure=f"two distributions use the entry-point name {name!r}: {owners}; uninstall one of them, "
                f"or disable {name!r} and name the module to use with -p",
            )
        elif not blocked:
            try:
                with traced(f"import {plugin.module}", lambda: f"plugin {name!r}"):
                    module = _load(entry)
                self._register(name, module)
            except (Exception, SystemExit) as error:  # a stranger's module may fail in any way
                plugin = replace(plugin, failure=reason(error))
        self._plugins[name] = plugin

    def _register(self, name: str, module: Any) -> None:
        label = getattr(module, "__name__", name)
        if self._manager.has_plugin(name) or self._manager.is_registered(module):
            raise PluginError(f"{label} is registered already under another name")
        wanted = getattr(module, "qlora_hook_api", HOOK_API)
        if not isinstance(wanted, int):
            raise PluginError(f"{label}: qlora_hook_api must be a whole number (got {wanted!r})")
        if wanted > HOOK_API:
            raise PluginError(
                f"{label} was built for hook API {wanted} and this qlora-core has {HOOK_API}; upgrade qlora-core, "
                "or install an older version of the plugin"
            )
        problems = hook_problems(module, self.hooks) if hasattr(module, "__dict__") else []
        if problems:
            raise PluginError("; ".join(problems))
        try:
            self._manager.register(module, name)
            self._manager.check_pending()
        except Exception:
            if self._manager.is_registered(module):
                self._manager.unregister(module)  # registration is not atomic
            raise
        if not self._manager.get_hookcallers(module):
            self._manager.unregister(module)
            hooks = ", ".join(hook_name(kind) for kind in KINDS)
            raise PluginError(f"{label} implements no hook; mark one of {hooks} with qlora_core.hookimpl")

    def _call(self, kind: str) -> Iterator[Provided]:
        hook = hook_name(kind)
        plugins = dict(self._manager.list_name_plugin())
        for name in [impl.plugin_name for impl in getattr(self._manager.hook, hook).get_hookimpls()]:
            only = self._manager.subset_hook_caller(hook, [plugin for other, plugin in plugins.items() if other != name])
            found: list[Provided] = []
            try:
                with traced(hook, lambda: f"plugin {name!r}", lambda: ", ".join(p.provider.name for p in found)):  # noqa: B023
                    found += self._check(kind, name, next(iter(only(**self._arguments(kind))), None))
            except (Exception, SystemExit) as error:
                self._plugins[name] = replace(self._plugins[name], failure=f"{hook}: {reason(error)}")
            yield from found

    def _arguments(self, kind: str) -> dict[str, Any]:
        """Return what the hook of *kind* is called with; a plugin takes of it what it asks for. Nothing as yet."""
        return {}

    def _check(self, kind: str, plugin: str, answer: Any) -> list[Provided]:
        expected = KINDS[kind]
        if not isinstance(answer, (list, tuple)):
            raise PluginError(f"must return a list of {expected.__name__} classes (got {type(answer).__name__})")
        for provider in answer:
            if not (isinstance(provider, type) and issubclass(provider, expected)):
                raise PluginError(f"must return {expected.__name__} classes (got {provider!r})")
            if not isinstance(getattr(provider, "name", None), str):
                raise PluginError(f'{provider.__name__} has no name; set `name = "..."`, what users write')
            if not re.fullmatch(r"\w[\w.-]*", provider.name):
                raise PluginError(f"{provider.__name__} is named {provider.name!r}; use letters, digits, _, - and . only")
            if not (isinstance(provider.Options, type) and issubclass(provider.Options, ProviderOptions)):
                raise PluginError(f"{provider.__name__}.Options must be a subclass of qlora_core.ProviderOptions")
            if "name" in provider.Options.model_fields:
                raise PluginError(f"{provider.__name__} has an option called name, which is the provider's own; rename it")
            if inspect.isabstract(provider):
                missing = ", ".join(sorted(provider.__abstractmethods__))
                raise PluginError(f"{provider.__name__} does not implement {missing}")
        names = [provider.name for provider in answer]
        for name in names:
            if names.count(name) > 1:
                raise PluginError(f"it provides two called {name!r}; rename one")
        return [Provided(kind, self._plugins[plugin], provider) for provider in answer]

    def _unknown(self, kind: str, name: str) -> str:
        known = [n for p in self.provided(kind) for n in (p.provider.name, p.qualified)]
        guess = did_you_mean(name, known)
        message = f"unknown {kind} {name!r}{guess}; {self._installed(kind)}"
        for plugin in self.plugins:
            if plugin.status == "failed":
                message += f"; plugin {plugin.name!r} failed to load ({plugin.failure})"
            elif plugin.status == "blocked":
                message += f"; plugin {plugin.name!r} is disabled"
        return message

    def _installed(self, kind: str) -> str:
        names = ", ".join(p.provider.name for p in self.provided(kind))
        return f"installed: {names}" if names else f"no plugin provides a {kind}"


def module_of(entry: EntryPoint) -> str:
    """Return the module that *entry* names, or its whole value where that is no module's name."""
    try:
        return entry.module
    except (AttributeError, ValueError):
        return entry.value


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    if entry.dist is None:
        return "", ""
    metadata = entry.dist.metadata  # (read and parsed each time that it is asked for)
    return metadata["Name"], metadata["Version"]


def _load(entry: EntryPoint) -> Any:
    if entry.value.endswith(".py") or "/" in entry.value:
        raise PluginError(f"{entry.value!r} is a file; name the module, my_plugin for my_plugin.py, from the folder it lies in")
    if EntryPoint.pattern.match(entry.value) is None or entry.value.startswith("."):
        raise PluginError(f"{entry.value!r} is no name of a module; write it as in an import, my_package.my_plugin")
    return entry.load()
