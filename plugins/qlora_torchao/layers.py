"""What touches torchao itself. Imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchao.quantization import Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor
from transformers import TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert

if TYPE_CHECKING:
    import transformers

    from qlora_torchao import AOInt8Options


def weight_only_config(options: AOInt8Options, skeleton: transformers.PreTrainedModel) -> TorchAoConfig:
    """Return the configuration for 8-bit weights, one scale per row."""
    skipped = [*get_keys_to_not_convert(skeleton), *options.skip_modules]
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def is_packed(module: torch.nn.Module) -> bool:
    """Return whether the weight of *module* is a tensor of torchao's own."""
    return isinstance(module, torch.nn.Linear) and isinstance(module.weight, TorchAOBaseTensor)
