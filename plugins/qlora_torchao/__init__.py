"""Quantizer `ao_int8`: 8-bit weights by torchao, activations untouched. Light: imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qlora_core.hooks import hookimpl
from qlora_core.providers import ProviderOptions, Quantizer

if TYPE_CHECKING:
    import torch
    import transformers


class AOInt8Options(ProviderOptions):
    """What `ao_int8` accepts."""

    skip_modules: tuple[str, ...] = Field(
        (), description="modules to leave in the load dtype, by name; the output head always is"
    )


class AOInt8(Quantizer):
    """8 bits per weight, one scale per row, activations in the load dtype: more exact than int8, and differentiable."""

    name = "ao_int8"
    Options = AOInt8Options
    options: AOInt8Options

    def missing(self) -> str:
        """Return the package torchao where it is not installed; it is an optional dependency."""
        found = importlib.util.find_spec("torchao") is not None
        return "" if found else "the package torchao: pip install 'qlora-core[torchao]'"

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return a TorchAoConfig."""
        from qlora_torchao.layers import weight_only_config

        return {"quantization_config": weight_only_config(self.options, skeleton)}

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return whether the weight of *module* is one of torchao's."""
        from qlora_torchao.layers import is_packed

        return is_packed(module)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return Q(W), (out_features, in_features), in the dtype that the layer computes in."""
        return module.weight.dequantize()  # type: ignore[operator, union-attr, return-value]

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return one byte per weight, and per row a float32 scale and an int8 zero point."""
        return shape[0] * shape[1] + 5 * shape[0]

    def save(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write the packed weights as transformers does: it takes torchao's tensors apart for safetensors."""
        model.save_pretrained(folder)

    def load(self, folder: Path) -> transformers.PreTrainedModel:
        """Return what `save` wrote."""
        from transformers import AutoModelForCausalLM

        from qlora_core.device import pick_device

        device = pick_device()
        place = {"device_map": {"": device}} if device.type != "cpu" else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **place).requires_grad_(False)


@hookimpl
def qlora_quantizers() -> list[type[Quantizer]]:
    """Provide `ao_int8`."""
    return [AOInt8]
