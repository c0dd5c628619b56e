"""One part of each kind for qlora-core, none of which wraps a library. Light: imports no torch."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator
from qlora_core import (
    Adapter,
    CallbackFactory,
    ConfigError,
    DatasetSource,
    Exporter,
    Kernels,
    Problem,
    ProviderOptions,
    Quantizer,
    hookimpl,
)

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers
    from qlora_core import Parts, Run, RunConfig, SavedRun

__all__ = ["MetricsCSV", "NFBlocks", "OneNorm", "SQLite", "StopFile", "TinyLoRA"]


class NFBlocks(Quantizer):
    """Blocks of NormalFloat weights (QLoRA, section 3) in plain PyTorch: 2, 3 or 4 bits, any device.

    Slower than a compiled kernel: each forward and each backward pass unpacks the whole matrix.
    """

    name = "nf_blocks"

    class Options(ProviderOptions):
        bits: Literal[2, 3, 4] = Field(
            4, description="bits of an index; a weight costs bits + 32 / block_size bits, 4.5 with the defaults, plus its error"
        )
        block_size: Literal[32, 64, 128] = Field(
            64, description="weights that share a float32 scale: 1, 0.5 or 0.25 bits more per weight; smaller is more exact"
        )

    options: Options

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Refuse a model without linear layers."""
        from qlora_example_parts.blocks import target_names

        if not target_names(skeleton):
            raise ConfigError(f"nf_blocks packs torch.nn.Linear layers and {type(skeleton).__name__} has none; use another")

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return nothing: weights are loaded plain, and packed by `prepare`."""
        return {}

    def prepare(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Return *model* with every torch.nn.Linear but the output head packed."""
        from qlora_example_parts.blocks import quantize

        return quantize(model, self.options.bits, self.options.block_size)

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return whether *module* is an NFLinear."""
        from qlora_example_parts.blocks import NFLinear

        return isinstance(module, NFLinear)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return Q(W), (out_features, in_features) float32."""
        return module.dequantized()

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of packed indices (whole blocks), one float32 scale per block, and the float32 levels."""
        bits, block = self.options.bits, self.options.block_size
        blocks = -(-shape[0] * shape[1] // block)
        return blocks * block * bits // 8 + 4 * blocks + 4 * 2**bits


class TinyLoRA(Adapter):
    """W_eff = Q(W) + (alpha / r) * B @ A on every linear layer but the output head, without PEFT (Hu et al. 2021)."""

    name = "tiny_lora"
    mergeable = True

    class Options(ProviderOptions):
        r: int = Field(
            8, ge=1, description="rank; adds r * (d_in + d_out) float32 parameters to a layer, and their optimizer state"
        )
        alpha: float = Field(16.0, gt=0, description="scale: B A is multiplied by alpha / r; free")

    options: Options

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Refuse a model without linear layers, and a rank that is larger than a layer's own."""
        from qlora_example_parts.lora import smallest_layer

        name, limit = smallest_layer(skeleton)
        if self.options.r > limit:
            what = f"{self.options.r} is larger than the layer {name} can have; at most {limit}"
            raise ConfigError([Problem(("r",), what)])

    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return *model* with A, Kaiming-uniform, and B, zero, beside each linear layer."""
        from qlora_example_parts.lora import add

        return add(model, self.options.r, self.options.alpha)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the matrices in safetensors, and r and alpha in JSON."""
        from qlora_example_parts.lora import save

        save(model, folder, self.options.r, self.options.alpha)

    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return *model* with the stored matrices, frozen; r and alpha are those of the file."""
        from qlora_example_parts.lora import load

        return load(model, folder)

    def merge(self, model: torch.nn.Module) -> transformers.PreTrainedModel:
        """Return the plain model, W + (alpha / r) * B @ A in each of its layers."""
        from qlora_example_parts.lora import merge

        return merge(model)


class SQLite(DatasetSource):
    """The rows of a query on an SQLite database, one document each, in the query's order."""

    name = "sqlite"

    class Options(ProviderOptions):
        path: str = Field(min_length=1, description="the database file; opened read-only")
        query: str = Field(
            min_length=1,
            description="SQL that gives one column, text; with ORDER BY, or the order is SQLite's. All rows are held in memory",
        )
        eval_query: str | None = Field(
            None, min_length=1, description="the same for evaluation; by default data.eval_fraction is held out"
        )

        @field_validator("path", mode="before")
        @classmethod
        def _absolute(cls, value: Any) -> Any:
            """Relative to the working directory; the resolved configuration must not depend on it."""
            given = isinstance(value, str | os.PathLike) and os.fspath(value)
            return os.path.abspath(os.path.expanduser(value)) if given else value

    options: Options

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return options for a written database of 400 notes, the last 100 of them for evaluation."""
        from qlora_example_parts.reading import write_example

        path = write_example(folder / "notes.db")
        query = "SELECT body AS text FROM notes WHERE id {} 300 ORDER BY id"
        return {"path": str(path), "query": query.format("<"), "eval_query": query.format(">=")}

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse a path that is no file."""
        path = self.options.path
        if not Path(path).is_file():
            what = f"no file {path!r}; name an SQLite database, relative to the working directory {os.getcwd()}"
            raise ConfigError([Problem(("path",), what)])

    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return rows of `text`; raise DataError for SQL that fails or gives other columns."""
        from qlora_example_parts.reading import read

        option = "query" if split == "train" else "eval_query"
        query = getattr(self.options, option)
        return None if query is None else read(self.options.path, query, option)


class OneNorm(Kernels):
    """Each RMS norm as one call of PyTorch's own instead of five operations."""

    name = "one_norm"

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return *model* with the norms that are known replaced."""
        from qlora_example_parts.norms import replace

        return replace(model)


class StopFile(CallbackFactory):
    """Stops training, after a checkpoint, once a file exists: `touch runs/mine/STOP`. Delete it before you resume."""

    name = "stop_file"

    class Options(ProviderOptions):
        path: str = Field(
            "STOP", min_length=1, description="the file, relative to the run's folder; looking costs one system call per step"
        )

    options: Options

    def build(self, run: Run) -> transformers.TrainerCallback:
        """Return a callback that looks for the file after each step."""
        from qlora_example_parts.stopping import StopOnFile

        return StopOnFile(run.folder / Path(self.options.path).expanduser())


class MetricsCSV(Exporter):
    """The run's metrics as one table, metrics.csv: a row per logged step, an empty cell where a value is missing."""

    name = "metrics_csv"

    def export(self, saved: SavedRun, folder: Path) -> None:
        """Write metrics.csv, its header all keys in the order in which they first come."""
        lines = saved.run.read_metrics()
        header = list(dict.fromkeys(key for line in lines for key in line))
        with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, header, lineterminator="\n")
            table.writeheader()
            table.writerows(lines)


@hookimpl
def qlora_quantizers() -> list[type[Quantizer]]:
    """Provide `nf_blocks`."""
    return [NFBlocks]


@hookimpl
def qlora_adapters() -> list[type[Adapter]]:
    """Provide `tiny_lora`."""
    return [TinyLoRA]


@hookimpl
def qlora_datasets() -> list[type[DatasetSource]]:
    """Provide `sqlite`."""
    return [SQLite]


@hookimpl
def qlora_kernels() -> list[type[Kernels]]:
    """Provide `one_norm`."""
    return [OneNorm]


@hookimpl
def qlora_callbacks() -> list[type[CallbackFactory]]:
    """Provide `stop_file`."""
    return [StopFile]


@hookimpl
def qlora_exporters() -> list[type[Exporter]]:
    """Provide `metrics_csv`."""
    return [MetricsCSV]
