"""Kernels `fused`: LoRA, MLPs, norms, rotary embeddings and attention as functions of their own. Light: imports no torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from pydantic import Field

from qlora_core.hooks import hookimpl
from qlora_core.providers import Kernels, ProviderOptions

if TYPE_CHECKING:
    import torch


def has_liger() -> bool:
    """Return whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


class FusedOptions(ProviderOptions):
    """What `fused` accepts: each part can be left out, to compare or to look for a fault."""

    linear: bool = Field(True, description="LoRA layers as one function that dequantises again in the backward pass")
    mlp: bool = Field(True, description="gated MLPs as one function that does not save the product of its halves")
    norm: bool = Field(True, description="norms in float32 with an output in the dtype of the products; float32 residuals")
    rotary: bool = Field(True, description="rotary embeddings without concatenation, rounded once")
    attention: bool = Field(
        True, description="on the CPU: causal attention that goes back in blocks of rows and keeps no probabilities"
    )
    loss: bool = Field(True, description="on the CPU: losses and their gradients in one pass over logits, written over these")
    liger: bool = Field(True, description="on CUDA: norms, MLPs and rotary embeddings of liger-kernel, where it is installed")
    compiled: bool = Field(True, description="on the CPU: what lies between matrix products in loops that numba compiles")
    tiles: bool = Field(True, description="on CPUs with AMX, with compiled loops: products, MLPs and attention by tiles")
    keep_pages: bool = Field(True, description="on the CPU: freed memory stays in the process, for the next step to use")


class Fused(Kernels):
    """The same computation with fewer passes over memory and fewer tensors saved, for any model with LoRA of PEFT."""

    name = "fused"
    Options = FusedOptions
    options: FusedOptions

    def suits(self, device: str) -> int:
        """Return a rank above that of `reference` on the CPU, and on CUDA with liger-kernel; elsewhere it must be named."""
        return 2 if device == "cpu" or (device == "cuda" and has_liger()) else 0

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return *model* itself, the parts that this knows replaced in place."""
        from qlora_fused.rewriting import rewrite

        rewrite(model, self.options)
        return model


@hookimpl
def qlora_kernels() -> list[type[Kernels]]:
    """Provide `fused`."""
    return [Fused]
