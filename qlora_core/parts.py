"""The providers of one run: picking them by name, and letting each refuse what can't work. Imports no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_core.calls import calling, reason, traced
from qlora_core.config import ProviderConfig, RunConfig, SourceConfig
from qlora_core.errors import ConfigError, PluginError, Problem, QLoRAError
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
from qlora_core.registry import Provided, Registry
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    import transformers

__all__ = ["Parts", "Weighted", "build", "described", "kernel_candidates", "made", "mixed", "resolve"]

logger = logging.getLogger("qlora_core")


class Weighted(NamedTuple):
    """A dataset, and how often each of its samples is seen in an epoch; 0.5 takes half of them."""

    source: DatasetSource
    weight: float = 1.0


def mixed(sources: Any) -> list[Weighted]:
    """Return *sources*, a dataset or a list of datasets and of pairs with weights, as a list with a weight each."""
    given = sources if isinstance(sources, list | tuple) else [sources]
    return [Weighted(*item) if isinstance(item, tuple) else Weighted(item) for item in given]


@dataclass(frozen=True)
class Parts:
    """The providers of one run."""

    quantizer: Quantizer
    adapter: Adapter
    datasets: tuple[Weighted, ...]
    """One, or several that are mixed; none where a finished run is read back."""
    kernels: tuple[Kernels, ...] = ()
    """The one to apply; with *auto_kernels* the candidates, of which the one that suits the device best is."""
    callbacks: tuple[CallbackFactory, ...] = ()
    exporters: tuple[Exporter, ...] = ()
    auto_kernels: bool = False

    def located(self) -> Iterator[tuple[tuple[str | int, ...], Provider]]:
        """Yield each provider with its place in the configuration."""
        yield ("quantizer",), self.quantizer
        yield ("adapter",), self.adapter
        for index, (source, _) in enumerate(self.datasets):
            yield ("dataset", index) if len(self.datasets) > 1 else ("dataset",), source
        for kernels in () if self.auto_kernels else self.kernels:
            yield ("kernels",), kernels
        for index, callback in enumerate(self.callbacks):
            yield ("callbacks", index), callback
        for index, exporter in enumerate(self.exporters):
            yield ("exports", index), exporter

    def check(self, config: RunConfig) -> None:
        """Let each provider refuse the run; raise ConfigError with all refusals. Second stage, imports nothing heavy."""
        problems: list[Problem] = []
        if config.tokens.add and not self.adapter.trains_new_tokens:
            problems.append(Problem(("tokens", "add"), f"the adapter {self.adapter.name!r} can't train new tokens; use lora"))
        if not self.adapter.trains:
            what = f"the adapter {self.adapter.name!r} leaves nothing to train; choose another, such as lora"
            problems.append(Problem(("adapter",), what))
        if config.data.streaming and config.training.max_steps is None:
            problems.append(
                Problem(("training", "max_steps"), "required with data.streaming: a stream has no end that is known")
            )
        if config.data.streaming and config.data.deduplicate:
            what = "a stream does not know what has passed; set it to false, or data.streaming=false"
            problems.append(Problem(("data", "deduplicate"), what))
        if config.data.streaming and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            what = "a stream is read by one process; start without torchrun, or set it to false"
            problems.append(Problem(("data", "streaming"), what))
        problems += _twice(self.exporters)
        for where, provider in self.located():
            try:
                with calling(provider, "check"):
                    provider.check(config, self)
            except ConfigError as error:
                problems += error.under(*where).problems
        if problems:
            raise ConfigError(problems)

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Let quantizer and adapter refuse the model, known by its *skeleton* on the meta device; raise ConfigError."""
        checked: list[tuple[str, Quantizer | Adapter]] = [("quantizer", self.quantizer), ("adapter", self.adapter)]
        for where, provider in checked:
            try:
                with calling(provider, "check_model"):
                    provider.check_model(skeleton)
            except ConfigError as error:
                raise error.under(where) from None

    def check_libraries(self) -> None:
        """Refuse a provider that this machine lacks something for, and let each check what it passes on to a library.

        Third stage, may import that library.
        """
        for where, provider in self.located():
            with calling(provider, "missing"):
                lacking = provider.missing()
            if lacking:
                raise ConfigError([Problem(where, f"{provider.name!r} needs {lacking}; this machine has it not")])
            try:
                with calling(provider, "check_libraries"):
                    provider.check_libraries()
            except ConfigError as error:
                raise error.under(*where) from None


def build(registry: Registry, kind: str, choice: ProviderConfig, *where: str | int) -> tuple[ProviderConfig, Any]:
    """Return *choice* qualified and with its options filled in, and the provider of *kind* that it names.

    Raises ConfigError, located at *where*, for a name that is unknown or ambiguous and for options that do not validate.
    """
    try:
        found = registry.find(kind, choice.name)
        provider = made(found, choice.provider_options)
    except PluginError as error:
        raise ConfigError([Problem(where, str(error))]) from error
    except ConfigError as error:
        raise error.under(*where) from None
    return described(provider, found.qualified), provider


def made(found: Provided, options: Mapping[str, Any]) -> Any:
    """Return the provider *found*, made with *options*; raise ConfigError for those, PluginError where its code fails."""
    try:
        with traced(f"{found.provider.__name__}()", lambda: f"{found.kind} {found.qualified!r}"):
            provider = found.provider(**options)
        if not isinstance(getattr(provider, "options", None), ProviderOptions):
            raise TypeError("its __init__ must call super().__init__(**options)")
        provider.options.model_dump(mode="json")  # what config.yaml will hold
        return provider
    except QLoRAError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {found.plugin.name!r} ({found.plugin.origin}) failed to make {found.provider.name!r}: {reason(error)}"
        ) from error


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
    ]
    several = isinstance(config.dataset, tuple)
    for index, source in enumerate(config.sources):
        choice = ProviderConfig(name=source.name, **source.provider_options)
        sections.append((f"dataset {index}", "dataset", choice, ("dataset", index) if several else ("dataset",)))
    if config.kernels.name == "auto":
        problems += [
            Problem(("kernels", o), "unknown option; auto accepts no options") for o in config.kernels.provider_options
        ]
        built["kernels"] = tuple(kernel_candidates(registry))
    else:
        sections.append(("kernels", "kernels", config.kernels, ("kernels",)))
    for index, choice in enumerate(config.callbacks):
        sections.append((f"callback {index}", "callback", choice, ("callbacks", index)))
    for index, choice in enumerate(config.exports):
        sections.append((f"exporter {index}", "exporter", choice, ("exports", index)))
    for key, kind, choice, where in sections:
        try:
            choices[key], built[key] = build(registry, kind, choice, *where)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    sources = [f"dataset {index}" for index in range(len(config.sources))]
    callbacks = [f"callback {index}" for index in range(len(config.callbacks))]
    exporters = [f"exporter {index}" for index in range(len(config.exports))]
    kernels = built["kernels"] if isinstance(built["kernels"], tuple) else (built["kernels"],)
    parts = Parts(
        built["quantizer"],
        built["adapter"],
        tuple(Weighted(built[key], source.weight) for key, source in zip(sources, config.sources, strict=True)),
        kernels,
        tuple(built[callback] for callback in callbacks),
        tuple(built[exporter] for exporter in exporters),
        auto_kernels=isinstance(built["kernels"], tuple),
    )
    resolved: dict[str, Any] = {key: choices[key] for key in ("quantizer", "adapter", "kernels") if key in choices}
    mixed = [
        SourceConfig(weight=source.weight, **choices[key].model_dump(mode="json"))
        for key, source in zip(sources, config.sources, strict=True)
    ]
    resolved["dataset"] = tuple(mixed) if several else choices["dataset 0"]
    resolved["callbacks"] = tuple(choices[callback] for callback in callbacks)
    resolved["exports"] = tuple(choices[exporter] for exporter in exporters)
    return config.model_copy(update=resolved), parts


def described(provider: Provider, name: str) -> ProviderConfig:
    """Return the configuration that makes *provider* again, under *name*, its defaults filled in."""
    return ProviderConfig(name=name, **provider.options.model_dump(mode="json"))


def _twice(exporters: Sequence[Exporter]) -> Iterator[Problem]:
    """Yield a problem for each exporter whose folder an earlier one writes already."""
    names = [exporter.name.casefold() for exporter in exporters]  # some disks don't tell A from a
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(("exports", index), f"{name!r} stands there twice and both would write exports/{name}; leave one out")


def kernel_candidates(registry: Registry) -> Iterator[Kernels]:
    """Yield what `kernels: auto` may choose from; kernels that can't be made without options, or fail, are not."""
    for found in registry.provided("kernels"):
        try:
            yield made(found, {})
        except QLoRAError as error:
            logger.warning("kernels: auto leaves out %r: %s", found.qualified, error)


def _plugin_problems(config: RunConfig, registry: Registry) -> list[Problem]:
    """Return what is wrong with the plugins that *config* names itself."""
    by_name = {plugin.name: plugin for plugin in registry.plugins}
    problems = []
    for index, module in enumerate(config.plugins):
        for plugin in (by_name.get(module), by_name.get(f"module {module}")):
            if plugin is not None and plugin.failure:
                problems.append(Problem(("plugins", index), f"{module!r} can't be used: {plugin.failure}"))
    for index, name in enumerate(config.disable_plugins):
        if name not in by_name:
            problems.append(Problem(("disable_plugins", index), f"no plugin {name!r}{did_you_mean(name, by_name)}"))
    return problems
