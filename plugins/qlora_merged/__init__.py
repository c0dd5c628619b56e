"""Exporter `merged`: base and adapter as one plain model that anything of transformers loads. Light: imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError
from qlora_core.hooks import hookimpl
from qlora_core.parts import Parts
from qlora_core.providers import Exporter, ProviderOptions

if TYPE_CHECKING:
    from qlora_core.saved import SavedRun


class MergedOptions(ProviderOptions):
    """What `merged` accepts."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the weights; auto is the dtype that the run loaded the model in, 2 or 4 bytes per parameter"
    )
    max_shard_size: str = Field(
        "5GB", pattern=r"^\d+\s*[KMG]I?B$", description="size of a file at most; larger models get several"
    )


class Merged(Exporter):
    """One folder with the weights Q(W) + (alpha / r) * B @ A, tokenizer and chat template; it needs neither PEFT nor us."""

    name = "merged"
    Options = MergedOptions
    options: MergedOptions

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse a quantizer or an adapter that can't be merged."""
        for provider in (parts.quantizer, parts.adapter):
            if not provider.mergeable:
                raise ConfigError(
                    f"{provider.name!r} can't be merged into plain weights; choose another, or leave this export out"
                )

    def export(self, saved: SavedRun, folder: Path) -> None:
        """Write a model folder as `save_pretrained` does."""
        import torch

        model = saved.merge()
        if self.options.dtype != "auto":
            model = model.to(getattr(torch, self.options.dtype))
        model.save_pretrained(folder, max_shard_size=self.options.max_shard_size)
        saved.load_tokenizer().save_pretrained(folder)


@hookimpl
def qlora_exporters() -> list[type[Exporter]]:
    """Provide `merged`."""
    return [Merged]
