"""Quantised base models on disk: the cache that `model.cache` switches, so that a model is quantised once. Not the quantising.

An entry is a folder that `Quantizer.save` wrote, with entry.json beside the weights: what the entry was made of, the size of
each file, and name, dtype and shape of each tensor. Its name is a hash of the first of these, so that another model, option
or version finds no entry and makes its own. An entry is complete or absent; one that is damaged is named and made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import answered, calling
from qlora_core.config import ModelConfig
from qlora_core.demo_model import cache_folder
from qlora_core.errors import QLoRAError
from qlora_core.footprint import Footprint
from qlora_core.providers import Quantizer

if TYPE_CHECKING:
    import torch
    import transformers

__all__ = ["Entry", "find_entry", "kept_entries", "quantized_folder"]

logger = logging.getLogger("qlora_core")

FORMAT = 1  # raise it when the same facts would give another model than before
WORTHWHILE = 32 * 2**20  # a packed model of fewer bytes is quantised about as fast as it is found
EDGE = 2**16  # so many bytes at both ends of a file of weights stand for its content, beside its size and date
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
ABANDONED = 24 * 3600  # seconds after which a folder that is not finished belongs to a process that died


def quantized_folder() -> Path:
    """Return the folder of all entries: $XDG_CACHE_HOME/qlora-core/quantized, by default in ~/.cache."""
    return cache_folder() / "quantized"


def kept_entries() -> list[tuple[Path, int]]:
    """Return the folder of each entry and its bytes, largest first."""
    folders = [file.parent for file in quantized_folder().glob("*/entry.json") if not file.parent.name.startswith(".")]
    sizes = [(folder, sum(size for _, size in _files(folder))) for folder in folders]
    return sorted(sizes, key=lambda item: (-item[1], item[0]))


def find_entry(
    config: ModelConfig, quantizer: Quantizer, skeleton: transformers.PreTrainedModel, arguments: dict[str, Any]
) -> Entry | None:
    """Return the entry for *config* as *quantizer* stores it, there or not yet; None where nothing can be kept.

    That is: a model whose code is not that of transformers, one that is stored quantised, one whose files are not known,
    and a quantizer that changes no weights, has no `load` of its own (the default quantises anew) or no source file.
    """
    kind = type(quantizer)
    ours = type(skeleton).__module__.startswith("transformers.")
    stored = getattr(skeleton.config, "quantization_config", None) is not None
    if not quantizer.quantizes or kind.load is Quantizer.load or not ours or stored:
        return None
    source, code, given = _source(config, skeleton), _code(kind), _given(arguments)
    if source is None or code is None or given is None:
        return None
    from qlora_core.device import pick_device

    facts = {
        "format": FORMAT,
        "model": source,
        "quantizer": f"{kind.__module__}.{kind.__qualname__}",
        "options": quantizer.options.model_dump(mode="json"),
        "load_kwargs": given,
        "dtype": str(skeleton.dtype),
        "trust_remote_code": config.trust_remote_code,
        "device": pick_device().type,
        "code": code,
        "packages": _versions(given),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return Entry(quantized_folder() / key, facts, config.path)


@dataclass(frozen=True)
class Entry:
    """A quantised model on disk, or the place where it will be."""

    folder: Path
    facts: dict[str, Any]
    path: str
    """The model as the configuration names it."""

    def load(self, quantizer: Quantizer) -> transformers.PreTrainedModel | None:
        """Return the model that `store` wrote, the same bits; None where there is none or it is damaged, which is logged."""
        import transformers

        if not self.folder.is_dir():
            return None
        problem, base = self._damage(), None
        if not problem:
            try:
                with calling(quantizer, "load"):
                    loaded = quantizer.load(self.folder)
                    base = answered(quantizer, "load", loaded, transformers.PreTrainedModel, "the model")
                problem = "" if _forms(base) == self._record()["tensors"] else "its tensors are not those that were stored"
            except QLoRAError as error:
                problem = str(error)
        if problem or base is None:
            logger.warning("the quantised model in %s can't be used: %s; it is made anew", self.folder, problem)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        logger.info("quantised before: loaded from %s", self.folder)
        base.requires_grad_(False)
        base.config._name_or_path = base.name_or_path = self.path  # what an adapter is saved with
        base.config._commit_hash = self.facts["model"].get("commit")
        return base

    def store(self, quantizer: Quantizer, model: transformers.PreTrainedModel) -> None:
        """Keep *model*, ready for adapters; where that fails, a full disk or a cache that is read-only, it is logged only."""
        size, home = Footprint.of(model, quantizer).bytes, self.folder.parent
        if size < WORTHWHILE or getattr(model, "_hf_peft_config_loaded", False):
            return  # the latter has the weights of an adapter in it, which are no files of this model
        try:
            home.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(home).free
            if free < 2 * size:
                raise OSError(
                    f"{free / 1e6:,.0f} MB are free, and it takes {size / 1e6:,.0f} MB, of which as many are left free"
                )
            _tidy(home)
            partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=home))
            try:
                self._write(quantizer, model, partial)
                partial.rename(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (OSError, QLoRAError) as error:
            if not self.folder.is_dir():  # else another process was first
                logger.warning("the quantised model can't be kept in %s: %s; model.cache=false stops trying", home, error)
            return
        logger.info("the quantised model is kept in %s (%.0f MB)", self.folder, size / 1e6)

    def _write(self, quantizer: Quantizer, model: transformers.PreTrainedModel, folder: Path) -> None:
        dtype = model.config.dtype
        with calling(quantizer, "save"):
            quantizer.save(model, folder)
        model.config.dtype = dtype  # save_pretrained leaves its name there
        record = {"made_of": {"path": self.path, **self.facts}, "files": dict(_files(folder)), "tensors": _forms(model)}
        (folder / "entry.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "entry.json").read_text(encoding="utf-8"))
        return record

    def _damage(self) -> str:
        """Return what is wrong with the entry's files, or an empty text."""
        try:
            files, _ = self._record()["files"], self._record()["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"entry.json can't be read ({type(error).__name__})"
        found = dict(_files(self.folder))
        for name, size in files.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != size:
                return f"{name} has {found[name]} bytes, not {size}"
        return ""


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of each file in *folder* but entry.json."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "entry.json":
            yield str(file.relative_to(folder)), file.stat().st_size


def _tidy(home: Path) -> None:
    """Delete what processes that died have left half-written."""
    for partial in home.glob(".*-*"):
        if partial.is_dir() and time.time() - partial.stat().st_mtime > ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)


def _forms(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Return dtype, shape and device of each parameter and buffer, ready for JSON."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: [str(tensor.dtype), list(tensor.shape), tensor.device.type] for name, tensor in tensors}


def _source(config: ModelConfig, skeleton: transformers.PreTrainedModel) -> dict[str, Any] | None:
    """Return what identifies the weights: the commit on the hub, or size, date and edges of each file of a folder."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        commit = getattr(skeleton.config, "_commit_hash", None)
        return {"name": config.path, "commit": commit} if commit else None
    digest, weights = hashlib.sha256(), 0
    for file in sorted(path for path in folder.iterdir() if path.suffix in (*WEIGHTS, ".json") and path.is_file()):
        facts = file.stat()
        weights += file.suffix in WEIGHTS
        digest.update(f"{file.name} {facts.st_size}\n".encode())
        with file.open("rb") as stream:
            if file.suffix == ".json":
                digest.update(stream.read())
                continue
            digest.update(f"{facts.st_mtime_ns}\n".encode() + stream.read(EDGE))
            stream.seek(max(0, facts.st_size - EDGE))
            digest.update(stream.read(EDGE))
    return {"files": digest.hexdigest()} if weights else None


def _code(kind: type[Quantizer]) -> str | None:
    """Return a hash over the source files of the package that *kind* comes from; None where it has none."""
    top = sys.modules.get(kind.__module__.partition(".")[0])
    try:
        file = Path(inspect.getfile(top if top is not None else kind))
        files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    except (OSError, TypeError):
        return None


def _given(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return *arguments* of a quantizer ready for JSON; None where one has no content that could be compared."""
    given = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in arguments.items()}
    text = json.dumps(given, sort_keys=True, default=repr)
    return None if " at 0x" in text else json.loads(text)


def _versions(given: dict[str, Any]) -> dict[str, str | None]:
    """Return the versions of torch, transformers and the library that quantises, as transformers names it."""
    method = (given.get("quantization_config") or {}).get("quant_method") if given else None
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", *([str(method)] if method else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
