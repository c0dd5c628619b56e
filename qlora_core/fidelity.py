"""How far quantised weights are from those that are stored: layer by layer, read from disk one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import calling
from qlora_core.config import ModelConfig
from qlora_core.footprint import held_bytes

if TYPE_CHECKING:
    import torch
    import transformers

    from qlora_core.providers import Quantizer

__all__ = ["LayerError", "layer_errors"]

CHUNK = 2**20  # weights that are compared together, in float32


@dataclass(frozen=True)
class LayerError:
    """What quantising did to one layer."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)"""
    bits: float
    """Per weight, the constants included."""
    error: float | None
    """||Q(W) - W|| / ||W||, Frobenius norms; None where W is not stored in safetensors under the layer's own name."""

    @property
    def kind(self) -> str:
        """The last part of the name: q_proj, up_proj, ..."""
        return self.name.rpartition(".")[2]


def layer_errors(
    base: transformers.PreTrainedModel, quantizer: Quantizer, skeleton: transformers.PreTrainedModel, config: ModelConfig
) -> Iterator[LayerError]:
    """Yield the error of each layer of *base* that *quantizer* stores, against the weights of the model *config* names.

    *skeleton* is the plain model. Holds the dequantised weight of one layer; the stored one stays on disk, mapped.
    """
    files, plain = _files(config), dict(skeleton.named_modules())
    for name, module in base.named_modules():
        if not quantizer.is_quantized(module):
            continue
        shape = int(module.out_features), int(module.in_features)
        with calling(quantizer, "dequantize"):
            weight = quantizer.dequantize(module)
        stored = _stored(files, name, skeleton.base_model_prefix)
        if stored is not None and type(plain.get(name)).__name__ == "Conv1D":  # GPT-2 stores (in_features, out_features)
            stored = stored.T
        error = _error(weight, stored) if stored is not None and tuple(stored.shape) == shape else None
        yield LayerError(name, shape, 8 * held_bytes(module, quantizer) / (shape[0] * shape[1]), error)


def _error(weight: torch.Tensor, stored: torch.Tensor) -> float:
    """Return ||weight - stored|| / ||stored||, both (out_features, in_features); 0 where both are 0."""
    rows = max(1, CHUNK // weight.shape[1])
    far = size = 0.0
    for start in range(0, len(weight), rows):
        w = stored[start : start + rows].to(weight.device).float()
        size += float(w.square().sum(dtype=_float64()))
        far += float((weight[start : start + rows].detach().float() - w).square().sum(dtype=_float64()))
    return float((far / size) ** 0.5) if size else 0.0 if far == 0 else float("inf")


def _float64() -> torch.dtype:
    import torch

    return torch.float64


def _stored(files: dict[str, Path], name: str, prefix: str) -> torch.Tensor | None:
    """Return the weight that is stored for the layer *name*, mapped from its file; None where no name is the like."""
    from safetensors import safe_open

    key = f"{name}.weight"
    for candidate in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"):
        if candidate in files:
            with safe_open(files[candidate], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(candidate)
                return tensor
    return None


def _files(config: ModelConfig) -> dict[str, Path]:
    """Return the file in which each tensor of the model lies; none for a model that is not stored in safetensors."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        options: dict[str, Any] = {"revision": config.revision or "main", "_raise_exceptions_for_missing_entries": False}
        found = cached_file(config.path, name, **options)
        return Path(found) if found else None

    index = find("model.safetensors.index.json")
    if index is not None:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {file: find(file) for file in set(places.values())}
        return {name: path for name, file in places.items() if (path := paths[file]) is not None}
    single = find("model.safetensors")
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
