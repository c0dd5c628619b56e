"""A quantised model as a folder of its own, which transformers loads and a configuration can name as its model."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_core.calls import calling
from qlora_core.config import ModelConfig
from qlora_core.errors import ConfigError, ModelError, Problem, RunError
from qlora_core.fidelity import LayerError, layer_errors
from qlora_core.footprint import Footprint
from qlora_core.model import build_skeleton, load_model, load_tokenizer
from qlora_core.providers import Quantizer
from qlora_core.run import FULL

__all__ = ["check_target", "write_quantized"]

logger = logging.getLogger("qlora_core")

REMEDY = "name another folder"


def check_target(folder: Path, config: ModelConfig, *, overwrite: bool) -> None:
    """Raise RunError unless *folder* can be written; with *overwrite* a model there is replaced, and nothing else is."""
    target, source = folder.resolve(), Path(config.path).resolve()
    parent = next(path for path in target.parents if path.exists())
    if source.is_dir() and (target == source or target in source.parents):
        raise RunError(f"{folder} is where the model itself lies; {REMEDY}")
    if target.is_file() or not parent.is_dir():
        raise RunError(f"{target if target.is_file() else parent} is a file; {REMEDY}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"{parent} is not writable; {REMEDY}")
    if target.exists() and not overwrite:
        raise RunError(f"{folder} exists already; {REMEDY}, or replace the model in it with --overwrite")
    if target.exists() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise RunError(f"{folder} holds something else than a model, which --overwrite does not replace; {REMEDY}")


def write_quantized(config: ModelConfig, quantizer: Quantizer, folder: Path) -> tuple[Footprint, int, list[LayerError]]:
    """Write the model of *config*, quantised, with its tokenizer into *folder*, whole or not at all.

    Returns its size, the bytes that it had in the load dtype, and the error of each layer. What is there already is replaced.
    Raises ModelError for a quantizer whose weights transformers could not load by itself.
    """
    _check(quantizer)
    skeleton = build_skeleton(config)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ModelError(f"model.path: {config.path!r} is stored quantised already; use the original")
    with calling(quantizer, "check_model"), _placed():
        quantizer.check_model(skeleton)
    base = load_model(config, quantizer, skeleton=skeleton)
    if getattr(base.config, "quantization_config", None) is None:
        raise ModelError(
            f"quantizer: {quantizer.name!r} packs weights in a way that transformers can't load by itself; name the original "
            "model in the configuration and this quantizer beside it, or choose another, such as nf4"
        )
    size, layers = Footprint.of(base, quantizer), list(layer_errors(base, quantizer, skeleton, config))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with calling(quantizer, "save"), _storing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            quantizer.save(base, partial)
            try:
                load_tokenizer(config).save_pretrained(partial)
            except ModelError as error:
                logger.warning("%s; %s gets none", error, folder)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size, size.parameters * skeleton.dtype.itemsize, layers


def _check(quantizer: Quantizer) -> None:
    """Raise ConfigError where *quantizer* quantises nothing, or lacks something on this machine."""
    if not quantizer.quantizes:
        raise ConfigError(
            [Problem(("quantizer",), f"{quantizer.name!r} leaves weights as they are; choose another, such as nf4")]
        )
    with calling(quantizer, "missing"):
        lacking = quantizer.missing()
    if lacking:
        raise ConfigError([Problem(("quantizer",), f"{quantizer.name!r} needs {lacking}; this machine has it not")])
    with calling(quantizer, "check_libraries"), _placed():
        quantizer.check_libraries()


@contextlib.contextmanager
def _placed() -> Iterator[None]:
    """Put the place "quantizer" before those that a provider's ConfigError names."""
    try:
        yield
    except ConfigError as error:
        raise error.under("quantizer") from None


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a RunError."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os error (\d+)", str(error))  # how safetensors reports what the system said
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        if number is None:
            raise
        remedy = "free some space, or name another folder" if number in FULL else REMEDY
        raise RunError(f"{folder} can't be written: {os.strerror(number).lower()}; {remedy}") from error
