"""The parts that plugins provide: one abstract class per kind. Light: imports no torch.

A provider is a class with a `name` (what users write), nested `Options` (what it accepts) and a few methods. In Python it
is made directly, `NF4(double_quant=True)`; from a configuration the registry finds the class by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from qlora_core.validation import validate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import datasets
    import torch
    import transformers

    from qlora_core.config import RunConfig
    from qlora_core.parts import Parts
    from qlora_core.run import Run
    from qlora_core.saved import SavedRun

__all__ = ["Adapter", "CallbackFactory", "DatasetSource", "Exporter", "Kernels", "Provider", "ProviderOptions", "Quantizer"]


class ProviderOptions(BaseModel):
    """Base of every provider's options: frozen, and an unknown option is an error. Describe each field with its cost.

    The key `name` is the provider's own in a configuration, so no option may have that name.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Provider(ABC):
    """What all kinds have in common: a name, options, and a say before anything expensive starts."""

    name: ClassVar[str]
    """What users write in a configuration."""

    class Options(ProviderOptions):
        """The options this provider accepts; override it with a subclass of ProviderOptions."""

    options: ProviderOptions

    def __init__(self, **options: Any) -> None:
        """Validate *options*; raise ConfigError that lists every problem."""
        self.options = validate(self.Options, options, owner=self.name)

    def check(self, config: RunConfig, parts: Parts) -> None:  # noqa: B027  (optional, not abstract)
        """Raise ConfigError where this provider can't work in this run. Second stage: imports nothing heavy.

        Locations in the error are relative to this provider's options.
        """

    def missing(self) -> str:
        """Return what this machine lacks for this provider ("a CUDA device", "the package torchao"), or an empty text.

        Third stage: may import a library. A run is refused, and the conformance kit skips, with this reason.
        """
        return ""

    def check_libraries(self) -> None:  # noqa: B027
        """Raise ConfigError where options don't fit the library they are passed on to. Third stage: may import it."""

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return options with which this provider works on a tiny Llama; it may write files into the empty *folder*.

        `qlora plugins check` and the conformance kit use them; override it where an option is required.
        """
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"


class Quantizer(Provider):
    """How the frozen base model is stored."""

    quantizes: ClassVar[bool] = True
    """False where weights stay as they are, so that adapters may rewrite them."""

    mergeable: ClassVar[bool] = True
    """False where `dequantize` can't stand for the layer, so that adding the adapter to it would give another model."""

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Raise ConfigError where this quantizer does not fit the model: it has no layer that can be packed, say.

        *skeleton* is on the meta device; this is called before any weight is loaded.
        """

    @abstractmethod
    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return arguments for `AutoModelForCausalLM.from_pretrained`.

        *skeleton* is the same model on the meta device, without weights; `skeleton.dtype` is the load dtype.
        """

    def prepare(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Return *model*, freshly loaded, ready for adapters; for quantizers that rewrite modules."""
        return model

    @abstractmethod
    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return whether this quantizer stores the weight of *module*."""

    @abstractmethod
    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return Q(W) of a quantised *module*, (out_features, in_features): what the forward pass really multiplies by."""

    def constants(self, module: torch.nn.Module) -> list[torch.Tensor]:
        """Return the tensors that *module* needs beside its parameters and buffers, such as quantisation scales."""
        return []

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes that a weight of *shape* (out_features, in_features) takes with its own constants."""

    def save(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write the quantised base *model* into *folder*, packed as it is; never a pickle.

        By default config.json and the state dict in safetensors, which suits a quantizer that rewrites modules.
        """
        from qlora_core.model import save_quantized

        save_quantized(model, folder)

    def load(self, folder: Path) -> transformers.PreTrainedModel:
        """Return the model that `save` wrote into *folder*, the same bits.

        By default a model of that configuration is made and passed to `prepare`, and then gets the stored tensors.
        """
        from qlora_core.model import load_quantized

        return load_quantized(self, folder)


class Adapter(Provider):
    """Which small set of parameters is trained, and how it is added to the frozen model."""

    trains_new_tokens: ClassVar[bool] = False
    """True where `inject` can train the embedding rows in *new_token_ids*."""

    trains: ClassVar[bool] = True
    """False where it adds nothing to train."""

    mergeable: ClassVar[bool] = False
    """True where `merge` can add what was trained to the weights of a plain model."""

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Raise ConfigError where this adapter does not fit the model: names that match nothing, a rank too large.

        *skeleton* is on the meta device; this is called before any weight is loaded.
        """

    @abstractmethod
    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return *model* with the adapter added. All parameters of *model* arrive frozen; the adapter's require grad.

        At the start the adapted model's outputs equal the base model's.
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the trained adapter of an injected *model* into *folder*; never a pickle."""

    @abstractmethod
    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return a plain base *model* with the adapter that `save` wrote into *folder*, for evaluation or generation."""

    def merge(self, model: torch.nn.Module) -> transformers.PreTrainedModel:
        """Return the plain model that computes what *model*, from `load` on a base that is not quantised, computes."""
        raise NotImplementedError(f"{type(self).__name__} sets mergeable without a merge")

    def may_train(self, name: str) -> bool:
        """Return whether the base parameter *name* is trained in place and saved with the adapter (biases, say)."""
        return False


class DatasetSource(Provider):
    """Where examples come from. The core turns them into tokens, the same way for all sources."""

    @abstractmethod
    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return the examples of *split*, or None where there is no separate "eval" split.

        The columns are one of these sets:

        - `text`, with an optional boolean `continues`: the row goes on the document of the row before
        - `prompt` and `completion`, with an optional `system`: text each
        - `messages`, with an optional `tools`: a list of turns in OpenAI's form, `{role, content, ...}`
        - `input_ids`, with optional `labels` (-100 where a token is not supervised)

        and in each an optional `origin`: where the row comes from ("chats.jsonl:17"), which messages about the row name.
        Raise DataError where the data can't be read.
        """

    def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the rows of the training split without storing them, each with the position after it, which JSON can hold.

        A later call with that *position* goes on from there. By default the rows of `examples`, by their index.
        """
        examples = self.examples("train")
        for index in range(position or 0, len(examples) if examples is not None else 0):
            yield examples[index], index + 1  # type: ignore[index]


class Kernels(Provider):
    """A rewriting of the adapted model in place that computes the same, faster."""

    def suits(self, device: str) -> int:
        """Return how well this suits *device* ("cpu", "cuda"): `kernels: auto` takes the highest, 0 is never taken."""
        return 0

    @abstractmethod
    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return *model* itself, its slow parts replaced in place; parts that don't apply are left alone.

        What computes losses of logits is left in the output head, as the attribute `losses_of_logits`: see LossesOfLogits in
        qlora_core.training.cross_entropy.
        """


class CallbackFactory(Provider):
    """Something that watches or steers the training loop."""

    needs_evaluation: ClassVar[bool] = False
    """True where the callback is of no use without evaluation data."""

    def training_arguments(self) -> dict[str, Any]:
        """Return the `transformers.TrainingArguments` that the callback needs, by their own names."""
        return {}

    @abstractmethod
    def build(self, run: Run) -> transformers.TrainerCallback:
        """Return the callback for *run*."""


class Exporter(Provider):
    """Writes a finished run in another format: `exports:` in a configuration, or `qlora export`."""

    @abstractmethod
    def export(self, saved: SavedRun, folder: Path) -> None:
        """Write *saved*, a finished run, into the empty *folder*; never a pickle.

        What can't work is refused in `check`, before training, where the exporter stands in the configuration.
        """
