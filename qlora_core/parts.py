"""The providers of one run: picking them by name, and letting each refuse what can't work. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_core.config import ProviderConfig, RunConfig
from qlora_core.errors import ConfigError, PluginError, Problem
from qlora_core.providers import Adapter, CallbackFactory, DatasetSource, Kernels, Provider, Quantizer
from qlora_core.registry import Registry
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    import transformers

__all__ = ["Parts", "build", "described", "resolve"]


@dataclass(frozen=True)
class Parts:
    """The providers of one run."""

    quantizer: Quantizer
    adapter: Adapter
    dataset: DatasetSource
    kernels: tuple[Kernels, ...] = ()
    """The candidates: the one that suits the device best is applied, none where none suits."""
    callbacks: tuple[CallbackFactory, ...] = ()

    def located(self) -> Iterator[tuple[tuple[str | int, ...], Provider]]:
        """Yield each provider with its place in the configuration."""
        yield ("quantizer",), self.quantizer
        yield ("adapter",), self.adapter
        yield ("dataset",), self.dataset
        for kernels in self.kernels:
            yield ("kernels",), kernels
        for index, callback in enumerate(self.callbacks):
            yield ("callbacks", index), callback

    def check(self, config: RunConfig) -> None:
        """Let each provider refuse the run; raise ConfigError with all refusals. Second stage, imports nothing heavy."""
        problems: list[Problem] = []
        if config.tokens.add and not self.adapter.trains_new_tokens:
            problems.append(Problem(("tokens", "add"), f"the adapter {self.adapter.name!r} can't train new tokens; use lora"))
        for where, provider in self.located():
            try:
                provider.check(config, self)
            except ConfigError as error:
                problems += error.under(*where).problems
        if problems:
            raise ConfigError(problems)

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Let the adapter refuse the model, known by its *skeleton* on the meta device; raise ConfigError."""
        try:
            self.adapter.check_model(skeleton)
        except ConfigError as error:
            raise error.under("adapter") from None

    def check_libraries(self) -> None:
        """Let each provider check options that it passes on to a library. Third stage, may import that library."""
        for where, provider in self.located():
            try:
                provider.check_libraries()
            except ConfigError as error:
                raise error.under(*where) from None


def build(registry: Registry, kind: str, choice: ProviderConfig, *where: str | int) -> tuple[ProviderConfig, Any]:
    """Return *choice* qualified and with its options filled in, and the provider of *kind* that it names.

    Raises ConfigError, located at *where*, for a name that is unknown or ambiguous and for options that do not validate.
    """
    try:
        found = registry.find(kind, choice.name)
        provider = found.provider(**choice.provider_options)
    except PluginError as error:
        raise ConfigError([Problem(where, str(error))]) from error
    except ConfigError as error:
        raise error.under(*where) from None
    return described(provider, found.qualified), provider


def resolve(config: RunConfig, registry: Registry) -> tuple[RunConfig, Parts]:
    """Return *config* with every provider qualified and its options filled in, and the providers themselves.

    Raises ConfigError listing the problems of all sections: unknown providers and options, and plugins that can't be used.
    """
    problems = _plugin_problems(config, registry)
    choices: dict[str, Any] = {}
    built: dict[str, Any] = {}
    sections: list[tuple[str, str, ProviderConfig, tuple[str | int, ...]]] = [
        ("quantizer", "quantizer", config.quantizer, ("quantizer",)),
        ("adapter", "adapter", config.adapter, ("adapter",)),
        ("dataset", "dataset", config.dataset, ("dataset",)),
    ]
    if config.kernels.name == "auto":
        problems += [
            Problem(("kernels", o), "unknown option; auto accepts no options") for o in config.kernels.provider_options
        ]
        built["kernels"] = tuple(found.provider() for found in registry.provided("kernels"))
    else:
        sections.append(("kernels", "kernels", config.kernels, ("kernels",)))
    for index, choice in enumerate(config.callbacks):
        sections.append((f"callback {index}", "callback", choice, ("callbacks", index)))
    for key, kind, choice, where in sections:
        try:
            choices[key], built[key] = build(registry, kind, choice, *where)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    callbacks = [f"callback {index}" for index in range(len(config.callbacks))]
    kernels = built["kernels"] if isinstance(built["kernels"], tuple) else (built["kernels"],)
    parts = Parts(
        built["quantizer"], built["adapter"], built["dataset"], kernels, tuple(built[callback] for callback in callbacks)
    )
    resolved: dict[str, Any] = {key: choices[key] for key in ("quantizer", "adapter", "dataset", "kernels") if key in choices}
    return config.model_copy(update={**resolved, "callbacks": tuple(choices[callback] for callback in callbacks)}), parts


def described(provider: Provider, name: str) -> ProviderConfig:
    """Return the configuration that makes *provider* again, under *name*, its defaults filled in."""
    return ProviderConfig(name=name, **provider.options.model_dump(mode="json"))


def _plugin_problems(config: RunConfig, registry: Registry) -> list[Problem]:
    """Return what is wrong with the plugins that *config* names itself."""
    by_name = {plugin.name: plugin for plugin in registry.plugins}
    problems = []
    for index, module in enumerate(config.plugins):
        if module in by_name and by_name[module].failure:
            problems.append(Problem(("plugins", index), f"{module!r} can't be used: {by_name[module].failure}"))
    for index, name in enumerate(config.disable_plugins):
        if name not in by_name:
            problems.append(Problem(("disable_plugins", index), f"no plugin {name!r}{did_you_mean(name, by_name)}"))
    return problems
