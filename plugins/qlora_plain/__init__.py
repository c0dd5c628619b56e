"""The parts that change nothing: quantizer `none` (16-bit LoRA), adapter `none` (the base as it is), kernels `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.hooks import hookimpl
from qlora_core.providers import Adapter, Kernels, Quantizer

if TYPE_CHECKING:
    import torch
    import transformers


class NoQuantizer(Quantizer):
    """Weights stay in the load dtype: LoRA on a 16-bit model."""

    name = "none"
    quantizes = False

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return nothing to add."""
        return {}

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return False: nothing is."""
        return False

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return the weight of *module* itself."""
        return module.weight  # type: ignore[return-value]

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return two bytes per weight, as in bfloat16 and float16."""
        return 2 * shape[0] * shape[1]


class NoAdapter(Adapter):
    """The base model as it is, to evaluate or generate with; there is nothing to train."""

    name = "none"
    trains = False

    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return *model* itself."""
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write nothing."""

    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return *model* itself."""
        return model


class Reference(Kernels):
    """Leaves the model to transformers, peft and the quantizer's own layers: what all others are compared with."""

    name = "reference"

    def suits(self, device: str) -> int:
        """Return the lowest rank that `auto` takes: any real kernels go first."""
        return 1

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return *model* itself."""
        return model


@hookimpl
def qlora_quantizers() -> list[type[Quantizer]]:
    """Provide `none`."""
    return [NoQuantizer]


@hookimpl
def qlora_adapters() -> list[type[Adapter]]:
    """Provide `none`."""
    return [NoAdapter]


@hookimpl
def qlora_kernels() -> list[type[Kernels]]:
    """Provide `reference`."""
    return [Reference]
