"""What touches bitsandbytes itself: the configurations, and reading its layers. Imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes.functional
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_bitsandbytes.packing import install_packing
from qlora_core.device import pick_device

if TYPE_CHECKING:
    from pathlib import Path

    import transformers

    from qlora_bitsandbytes import FourBitOptions, Int8Options


def four_bit_config(name: str, options: FourBitOptions, skeleton: transformers.PreTrainedModel) -> BitsAndBytesConfig:
    """Return the configuration for `nf4` or `fp4`, by *name*; from now on the CPU packs them by `pack_4bit`."""
    install_packing()
    compute = skeleton.dtype if options.compute_dtype == "auto" else getattr(torch, options.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=getattr(torch, options.storage_dtype),
        llm_int8_skip_modules=_skipped(options.skip_modules, skeleton),
    )


def eight_bit_config(options: Int8Options, skeleton: transformers.PreTrainedModel) -> BitsAndBytesConfig:
    """Return the configuration for `int8`."""
    return BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=options.threshold,
        llm_int8_skip_modules=_skipped(options.skip_modules, skeleton),
    )


def keep_packing(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Switch off, on every Linear4bit of *model*, the repacking for AVX512-bf16 CPUs.

    bitsandbytes 0.50 does it in the first forward pass in eval mode: it drops double quantisation and rounds the scales to
    bfloat16, the way back is lossy, and every gradient afterwards is wrong though the loss hardly changes; layers whose
    out_features is no multiple of 32 crash.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load_packed(folder: Path) -> transformers.PreTrainedModel:
    """Return the model that `save_pretrained` wrote packed into *folder*; config.json says how."""
    device = pick_device()
    place = {"device_map": {"": device}} if device.type != "cpu" else {}
    model: transformers.PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **place)
    return keep_packing(model.requires_grad_(False))


def dequantize_4bit(module: Any) -> torch.Tensor:
    """Return Q(W), (out_features, in_features)."""
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def dequantize_8bit(module: Any) -> torch.Tensor:
    """Return Q(W) = int8 * scale / 127, (out_features, in_features), float32."""
    return bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, row_scales(module))


def row_scales(module: Any) -> torch.Tensor:
    """Return the scale of each row, (out_features,) float32; the first forward pass moves it to the layer's state."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    assert isinstance(scales, torch.Tensor)
    return scales


def quant_state_tensors(module: Any) -> list[torch.Tensor]:
    """Return the scales and levels of a Linear4bit, of both quantisations."""
    state = module.weight.quant_state
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def _skipped(names: tuple[str, ...], skeleton: transformers.PreTrainedModel) -> list[str] | None:
    """Return *names* and what is skipped anyway (the output head); None leaves that to transformers."""
    return [*get_keys_to_not_convert(skeleton), *names] if names else None
