"""qlora-core: fine-tune a 4-bit language model with low-rank adapters; every part is a plugin.

The names below are imported when they are first used, so that `import qlora_core` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_core.config import DataConfig, ModelConfig, RunConfig, TokensConfig, TrainingConfig
    from qlora_core.data.encode import Encoded, encode, encode_split
    from qlora_core.errors import ConfigError, DataError, ModelError, PluginError, Problem, QLoRAError, RunError
    from qlora_core.evaluation import evaluate
    from qlora_core.footprint import Footprint
    from qlora_core.generation import generate
    from qlora_core.hooks import hookimpl
    from qlora_core.model import build_skeleton, inject_adapter, load_model, load_tokenizer
    from qlora_core.parts import Parts, resolve
    from qlora_core.pipeline import Finished, execute, finetune, train
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
    from qlora_core.registry import Registry
    from qlora_core.run import Run
    from qlora_core.saved import SavedRun

__version__ = "0.1.0"

_HOMES = {
    "config": ("DataConfig", "ModelConfig", "RunConfig", "TokensConfig", "TrainingConfig"),
    "data.encode": ("Encoded", "encode", "encode_split"),
    "errors": ("ConfigError", "DataError", "ModelError", "PluginError", "Problem", "QLoRAError", "RunError"),
    "evaluation": ("evaluate",),
    "footprint": ("Footprint",),
    "generation": ("generate",),
    "hooks": ("hookimpl",),
    "model": ("build_skeleton", "inject_adapter", "load_model", "load_tokenizer"),
    "parts": ("Parts", "resolve"),
    "pipeline": ("Finished", "execute", "finetune", "train"),
    "providers": (
        "Adapter",
        "CallbackFactory",
        "DatasetSource",
        "Exporter",
        "Kernels",
        "Provider",
        "ProviderOptions",
        "Quantizer",
    ),
    "registry": ("Registry",),
    "run": ("Run",),
    "saved": ("SavedRun",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "CallbackFactory",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DatasetSource",
    "Encoded",
    "Exporter",
    "Finished",
    "Footprint",
    "Kernels",
    "ModelConfig",
    "ModelError",
    "Parts",
    "PluginError",
    "Problem",
    "Provider",
    "ProviderOptions",
    "QLoRAError",
    "Quantizer",
    "Registry",
    "Run",
    "RunConfig",
    "RunError",
    "SavedRun",
    "TokensConfig",
    "TrainingConfig",
    "__version__",
    "build_skeleton",
    "encode",
    "encode_split",
    "evaluate",
    "execute",
    "finetune",
    "generate",
    "hookimpl",
    "inject_adapter",
    "load_model",
    "load_tokenizer",
    "resolve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
