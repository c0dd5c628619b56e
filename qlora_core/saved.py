"""A finished run, read back from its folder: to generate, to evaluate, to merge, to export. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import answered, calling
from qlora_core.config import ModelConfig
from qlora_core.errors import ModelError
from qlora_core.kernels import apply_kernels
from qlora_core.parts import Parts, build, kernel_candidates
from qlora_core.registry import Registry
from qlora_core.run import Run

if TYPE_CHECKING:
    import torch
    import transformers

    from qlora_core.providers import Adapter, Quantizer

__all__ = ["SavedRun"]


@dataclass(frozen=True)
class SavedRun:
    """A finished run with the providers that its model needs; its dataset and callbacks need not be installed."""

    run: Run
    quantizer: Quantizer
    adapter: Adapter
    registry: Registry | None = None
    """Where kernels are looked for; without it there are none."""

    @classmethod
    def open(cls, folder: str | Path, registry: Registry, *, trust_remote_code: bool = False) -> SavedRun:
        """Return the run in *folder*; raise RunError where it is none, ConfigError where its plugins are not installed."""
        run = Run.open(folder)
        if run.config.model.trust_remote_code and not trust_remote_code:
            raise ModelError(
                f"{run.folder}: its configuration asks to run Python code that comes with the model {run.config.model.path!r}; "
                "if you trust that code, say so with --trust-remote-code"
            )
        _, quantizer = build(registry, "quantizer", run.config.quantizer, "quantizer")
        _, adapter = build(registry, "adapter", run.config.adapter, "adapter")
        return cls(run, quantizer, adapter, registry)

    def load_tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Return the tokenizer that was saved with the adapter, new tokens included."""
        from qlora_core.model import load_tokenizer

        config = self.run.config.model
        return load_tokenizer(ModelConfig(path=str(self.run.adapter), trust_remote_code=config.trust_remote_code))

    def load_base(self) -> transformers.PreTrainedModel:
        """Return the frozen base model as the run's quantizer stores it."""
        from qlora_core.model import load_model

        return load_model(self.run.config.model, self.quantizer, tokenizer=self.load_tokenizer())

    def add_adapter(self, base: transformers.PreTrainedModel) -> torch.nn.Module:
        """Return *base* with the trained adapter, frozen."""
        import torch

        with calling(self.adapter, "load"):
            adapted = self.adapter.load(base, self.run.adapter)
            return answered(self.adapter, "load", adapted, torch.nn.Module, "the adapted model")  # type: ignore[no-any-return]

    def apply_kernels(self, adapted: torch.nn.Module) -> torch.nn.Module:
        """Return *adapted*, rewritten in place by the kernels that the run's configuration names.

        Raises ConfigError where they are not installed.
        """
        config = self.run.config
        if self.registry is not None:
            auto = config.kernels.name == "auto"
            kernels = (
                tuple(kernel_candidates(self.registry))
                if auto
                else (build(self.registry, "kernels", config.kernels, "kernels")[1],)
            )
            apply_kernels(adapted, config, Parts(self.quantizer, self.adapter, (), kernels, auto_kernels=auto))
        return adapted

    def merge(self) -> transformers.PreTrainedModel:
        """Return a plain model with the weights Q(W) + adapter, computed in float32 and rounded once to the load dtype.

        Q(W), not W: the adapter was trained on the quantised weights and makes up for their error.
        Raises ModelError where quantizer or adapter can't be merged. Takes 4 bytes per parameter beside the packed base.
        """
        for provider, what in ((self.quantizer, "stored by the quantizer"), (self.adapter, "trained by the adapter")):
            if not provider.mergeable:
                raise ModelError(
                    f"what is {what} {provider.name!r} can't be merged into plain weights; keep base and adapter apart"
                )
        import transformers

        from qlora_core.model import load_model

        base = self.load_base()
        config = self.run.config.model.model_copy(update={"dtype": "float32", "upcast": False})
        plain = load_model(config, None, tokenizer=self.load_tokenizer())
        _copy_quantized(base, plain, self.quantizer)
        dtype = base.dtype
        del base
        adapted = self.add_adapter(plain)
        with calling(self.adapter, "merge"):
            merged = self.adapter.merge(adapted)
            answered(self.adapter, "merge", merged, transformers.PreTrainedModel, "the plain model")
        return merged.to(dtype)


def _copy_quantized(base: Any, plain: Any, quantizer: Quantizer) -> None:
    """Set the weight of each layer of *plain* whose namesake in *base* is quantised to what that one multiplies by."""
    import torch

    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if quantizer.is_quantized(module):
                with calling(quantizer, "dequantize"):
                    weight = quantizer.dequantize(module)
                target = layers[name].weight
                transposed = type(layers[name]).__name__ == "Conv1D"  # GPT-2 stores (in_features, out_features)
                target.copy_(weight.T if transposed else weight)
