"""Write and read the state of a training run without pickle: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qlora_core.errors import RunError

__all__ = ["load_tree", "load_weights", "restore_rng", "rng_state", "save_tree", "save_weights"]

WEIGHTS = "adapter.safetensors"


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write every trained parameter of *model*, by name, into *folder*."""
    trained = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Set the trained parameters of *model* from *folder*; raise RunError where names or shapes differ."""
    stored = load_file(_existing(folder / WEIGHTS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differ = sorted(set(stored) ^ set(trained)) or [n for n, p in trained.items() if p.shape != stored[n].shape]
    if differ:
        raise RunError(
            f"{folder}: holds another adapter than the configuration asks for ({differ[0]} differs); "
            "resume with the configuration of that run"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Write *tree*, nested containers of plain values, tensors and arrays, as `name.json` and `name.safetensors`."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(tree, tensors))
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def load_tree(folder: Path, name: str) -> Any:
    """Return what `save_tree` wrote, bit for bit and with the same types."""
    text = _existing(folder / f"{name}.json").read_text(encoding="utf-8")
    return _unpack(json.loads(text), load_file(_existing(folder / f"{name}.safetensors")))


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators of this process."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        key = str(len(tensors))
        tensor = torch.as_tensor(value).detach()
        tensors[key] = tensor.cpu().contiguous().clone()  # clone: safetensors refuses shared storage
        return {"tensor": key, "array": isinstance(value, np.ndarray)}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.numpy() if value["array"] else tensor
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value["dict"]}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RunError(f"{path.parent}: no complete checkpoint, {path.name} is missing; name another one")
    return path
