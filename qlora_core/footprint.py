"""How much memory a model really takes, what part of it is quantised, and what part got an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qlora_core.providers import Quantizer

__all__ = ["Coverage", "Footprint", "LinearWeights", "held_bytes"]


@dataclass(frozen=True)
class Footprint:
    """The size of a model. Bytes count packed weights *and* quantisation constants, each storage once."""

    parameters: int
    """Logical parameters: a packed 4-bit weight counts out_features * in_features."""
    bytes: int
    quantized_parameters: int
    quantized_bytes: int
    left_out: tuple[tuple[str, int], ...]
    """Weights of two and more dimensions that are not quantised, with their parameters, largest first."""

    @classmethod
    def of(cls, model: torch.nn.Module, quantizer: Quantizer) -> Footprint:
        """Return the size of *model*, whose quantised layers *quantizer* made."""
        seen: set[int] = set()

        def size(tensor: torch.Tensor) -> int:
            new = {key: held for key, held in storages(tensor).items() if key not in seen}
            seen.update(new)
            return sum(new.values())

        parameters = total = quantized = quantized_bytes = 0
        left_out: dict[str, int] = {}
        counted: set[int] = set()
        for prefix, module in model.named_modules():
            packed = quantizer.is_quantized(module)
            for name, tensor in _own_tensors(module):
                if id(tensor) in counted:
                    continue  # a tied weight
                counted.add(id(tensor))
                is_weight = packed and name == "weight"
                numel = _logical_size(module, tensor, packed=is_weight)
                stored = size(tensor) + (sum(size(c) for c in quantizer.constants(module)) if is_weight else 0)
                total += stored
                if not _is_parameter(module, name):
                    quantized_bytes += stored if packed else 0  # scales that are buffers
                    continue
                parameters += numel
                if is_weight:
                    quantized += numel
                    quantized_bytes += stored
                elif tensor.ndim >= 2:
                    left_out[f"{prefix}.{name}"] = tensor.numel()
        return cls(parameters, total, quantized, quantized_bytes, _largest(left_out))

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole model."""
        return 8 * self.bytes / self.parameters

    @property
    def quantized_bits(self) -> float:
        """Bits per quantised parameter, its constants included; 0 where none is quantised."""
        return 8 * self.quantized_bytes / self.quantized_parameters if self.quantized_parameters else 0.0

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that are stored quantised, 0 to 1."""
        return self.quantized_parameters / self.parameters


@dataclass(frozen=True)
class Coverage:
    """Which of the weights that matrix products use got an adapter."""

    weights: int
    adapted: int
    left_out: tuple[tuple[str, int], ...]
    """Names of weights without an adapter, with their parameters, largest first."""

    @property
    def share(self) -> float:
        """Share of those parameters whose layer got an adapter, 0 to 1."""
        return self.adapted / self.weights if self.weights else 0.0


class LinearWeights:
    """The weights of a model that matrix products use, the output head excepted; made before an adapter is injected.

    These are the weights of linear layers (and GPT-2's Conv1D) and the 3-D parameters in which some mixture models hold
    their experts, which quantizers and adapters for linear layers silently skip.
    """

    def __init__(self, model: torch.nn.Module, quantizer: Quantizer) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self._modules = {id(module) for module in model.modules()}
        self._layers: dict[str, tuple[torch.nn.Module, torch.nn.Parameter]] = {}
        self._sizes: dict[str, int] = {}
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        for prefix, module in model.named_modules():
            if module is head:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                linear = isinstance(module, (torch.nn.Linear, Conv1D)) and name == "weight"
                experts = parameter.ndim >= 3 and not isinstance(module, torch.nn.modules.conv._ConvNd)
                if linear or experts:
                    packed = linear and quantizer.is_quantized(module)
                    self._layers[f"{prefix}.{name}"] = module, parameter
                    self._sizes[f"{prefix}.{name}"] = _logical_size(module, parameter, packed=packed)

    def covered_by(self, adapted: torch.nn.Module) -> Coverage:
        """Return what part of the weights has an adapter in the *adapted* model.

        A weight has one when its layer, or a new module wrapped around its layer, holds parameters that are trained.
        The layer is the old one, or where an adapter has replaced it the one that holds the same weight now.
        """
        present = {id(module) for module in adapted.modules()}
        parents = {id(child): parent for parent in adapted.modules() for child in parent.children()}
        owners = {id(p): m for m in adapted.modules() for p in m.parameters(recurse=False)}
        left_out: dict[str, int] = {}
        for name, (layer, weight) in self._layers.items():
            owner = layer if id(layer) in present else owners.get(id(weight))
            around = parents.get(id(owner))
            wrapper = around if id(around) not in self._modules else None
            if not any(p.requires_grad for m in (owner, wrapper) if m is not None for p in m.parameters()):
                left_out[name] = self._sizes[name]
        total = sum(self._sizes.values())
        return Coverage(total, total - sum(left_out.values()), _largest(left_out))


def storages(tensor: torch.Tensor) -> dict[int, int]:
    """Return address and bytes of the memory that *tensor* holds; a subclass may hold several tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return {key: held for name in inner for key, held in storages(getattr(tensor, name)).items()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


def held_bytes(module: torch.nn.Module, quantizer: Quantizer) -> int:
    """Return the bytes that the weight of a quantised *module* takes: packed, with its buffers and other constants."""
    tensors = [t for name, t in _own_tensors(module) if name != "bias"] + quantizer.constants(module)
    return sum({key: held for tensor in tensors for key, held in storages(tensor).items()}.values())


def _logical_size(module: Any, tensor: torch.Tensor, *, packed: bool) -> int:
    """Return the parameters of *tensor*; those of a packed weight are not to be seen in its shape."""
    return int(module.out_features * module.in_features) if packed else tensor.numel()


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _is_parameter(module: torch.nn.Module, name: str) -> bool:
    return name in module._parameters


def _largest(sizes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))
