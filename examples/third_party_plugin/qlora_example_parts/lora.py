"""LoRA without PEFT: y = layer(x) + (alpha / r) * (x A^T) B^T. Imported late."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from qlora_core import ModelError
from safetensors.torch import load_file, save_file

MATRICES, SETTINGS = "tiny_lora.safetensors", "tiny_lora.json"


class WithLoRA(torch.nn.Module):
    """A: (r, in) and B: (out, r), float32, beside a linear layer of any kind; its weight may be packed."""

    def __init__(self, layer: torch.nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale, device = layer, alpha / r, layer.weight.device
        self.A = torch.nn.Parameter(torch.empty(r, layer.in_features, dtype=torch.float32, device=device))
        self.B = torch.nn.Parameter(torch.zeros(layer.out_features, r, dtype=torch.float32, device=device))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight  # some models look at the dtype of a layer's weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y + (x @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype)).to(y.dtype) * self.scale


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def smallest_layer(model: Any) -> tuple[str, int]:
    sizes = {name: min(m.in_features, m.out_features) for name, m in linear_layers(model).items()}
    if not sizes:
        raise ModelError(f"adapter: tiny_lora adapts torch.nn.Linear layers and {type(model).__name__} has none; use lora")
    return min(sizes.items(), key=lambda pair: pair[1])


def add(model: Any, r: int, alpha: float) -> Any:
    for name, layer in linear_layers(model).items():
        model.set_submodule(name, WithLoRA(layer, r, alpha))
    return model


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, WithLoRA)]
    return {f"{name}.{key}": getattr(m, key) for name, m in wrapped for key in ("A", "B")}


def save(model: torch.nn.Module, folder: Path, r: int, alpha: float) -> None:
    save_file({name: matrix.detach().cpu().contiguous() for name, matrix in matrices(model).items()}, folder / MATRICES)
    (folder / SETTINGS).write_text(json.dumps({"r": r, "alpha": alpha}) + "\n", encoding="utf-8")


def load(model: Any, folder: Path) -> Any:
    model = add(model, **json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    stored, own = load_file(folder / MATRICES), matrices(model)
    if {name: m.shape for name, m in stored.items()} != {name: m.shape for name, m in own.items()}:
        raise ModelError(f"{folder}: the adapter was trained on a model with other layers; load it on that one")
    with torch.no_grad():
        for name, matrix in own.items():
            matrix.copy_(stored[name])
    return model.requires_grad_(False)


def merge(model: Any) -> Any:
    for name, wrapped in [(name, m) for name, m in model.named_modules() if isinstance(m, WithLoRA)]:
        wrapped.layer.weight.data += (wrapped.scale * wrapped.B @ wrapped.A).detach().to(wrapped.weight.dtype)
        model.set_submodule(name, wrapped.layer)
    return model
