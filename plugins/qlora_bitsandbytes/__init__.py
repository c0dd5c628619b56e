"""Quantizers of bitsandbytes: `nf4` and `fp4` (4 bits, QLoRA) and `int8` (LLM.int8()). Light: imports no torch.

The block size is 64 throughout: transformers can load no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from qlora_core.hooks import hookimpl
from qlora_core.providers import ProviderOptions, Quantizer

if TYPE_CHECKING:
    import torch
    import transformers

BLOCK = 64
"""Weights that share one scale."""
SUPERBLOCK = 256
"""Scales that share one second-level scale in double quantisation."""


class FourBitOptions(ProviderOptions):
    """What `nf4` and `fp4` accept."""

    double_quant: bool = Field(
        True, description="quantise the scales too: 0.37 bits less per parameter, hardly any error (QLoRA, section 3)"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the matrix products; auto is the model's load dtype"
    )
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="dtype that the packed bytes are kept as; sharding with FSDP needs the model's own"
    )
    skip_modules: tuple[str, ...] = Field(
        (), description="modules to leave in the load dtype, by name; the output head always is"
    )


class _BitsAndBytes(Quantizer):
    """What 4 and 8 bits have in common: transformers saves and loads both packed."""

    def save(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write packed weights and their constants, safetensors, with the configuration that loads them."""
        model.save_pretrained(folder)

    def load(self, folder: Path) -> transformers.PreTrainedModel:
        """Return what `save` wrote, the same bits."""
        from qlora_bitsandbytes.layers import load_packed

        return load_packed(folder)


class _FourBit(_BitsAndBytes):
    """Blocks of 64 weights, each an index into 16 levels, times one scale per block."""

    Options = FourBitOptions
    options: FourBitOptions

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return the BitsAndBytesConfig for 4 bits."""
        from qlora_bitsandbytes.layers import four_bit_config

        return {"quantization_config": four_bit_config(self.name, self.options, skeleton)}

    def prepare(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Return *model* with the CPU repacking of bitsandbytes switched off on every layer: it ruins training."""
        from qlora_bitsandbytes.layers import keep_packing

        return keep_packing(model)

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return whether *module* is a Linear4bit."""
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return Q(W), (out_features, in_features), in the dtype that the weight had when it was quantised."""
        from qlora_bitsandbytes.layers import dequantize_4bit

        return dequantize_4bit(module)

    def constants(self, module: torch.nn.Module) -> list[torch.Tensor]:
        """Return scales and levels, of both quantisations."""
        from qlora_bitsandbytes.layers import quant_state_tensors

        return quant_state_tensors(module)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return half a byte per weight, and per block 4 bytes, or with double quantisation 1 byte and a share of 4.

        The tables of 16 and 256 levels (64 and 1024 bytes) are counted too: each layer holds its own.
        """
        packed = -(-shape[0] * shape[1] // 2)
        blocks = -(-shape[0] * shape[1] // BLOCK)
        if not self.options.double_quant:
            return packed + 4 * blocks + 64
        return packed + blocks + 4 * -(-blocks // SUPERBLOCK) + 4 + 64 + 1024


class NF4(_FourBit):
    """4-bit NormalFloat: levels at the quantiles of a normal distribution, which weights follow (QLoRA, section 3)."""

    name = "nf4"


class FP4(_FourBit):
    """4-bit floating point, 1 sign, 2 exponent and 1 mantissa bit; less exact than nf4 on normal weights."""

    name = "fp4"


class Int8Options(ProviderOptions):
    """What `int8` accepts."""

    threshold: float = Field(
        6.0, ge=0, description="inputs beyond this are multiplied in 16 bits (LLM.int8()); 0 switches that off, faster"
    )
    skip_modules: tuple[str, ...] = Field(
        (), description="modules to leave in the load dtype, by name; the output head always is"
    )


class Int8(_BitsAndBytes):
    """8 bits per weight, one scale per row (LLM.int8(), Dettmers et al. 2022)."""

    name: ClassVar[str] = "int8"
    Options = Int8Options
    options: Int8Options

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return the BitsAndBytesConfig for 8 bits."""
        from qlora_bitsandbytes.layers import eight_bit_config

        return {"quantization_config": eight_bit_config(self.options, skeleton)}

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return whether *module* is a Linear8bitLt."""
        from bitsandbytes.nn import Linear8bitLt

        return isinstance(module, Linear8bitLt)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return Q(W), (out_features, in_features), float32."""
        from qlora_bitsandbytes.layers import dequantize_8bit

        return dequantize_8bit(module)

    def constants(self, module: torch.nn.Module) -> list[torch.Tensor]:
        """Return the row scales."""
        from qlora_bitsandbytes.layers import row_scales

        return [row_scales(module)]

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return one byte per weight and 4 per row."""
        return shape[0] * shape[1] + 4 * shape[0]


@hookimpl
def qlora_quantizers() -> list[type[Quantizer]]:
    """Provide `nf4`, `fp4` and `int8`."""
    return [NF4, FP4, Int8]
