"""The configuration of a run: its sections, reading it and overriding it. What it names is picked in `parts`.

Validation has three stages. First the sections below validate, with each provider as `{name, options}`; then each
provider validates its own options (`parts.resolve`); both before torch is imported. Options that belong to another
library are checked last (`Parts.check_libraries`), still before a model is loaded.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import to_jsonable_python

from qlora_core import yaml_file
from qlora_core.errors import ConfigError
from qlora_core.validation import ONE, SEVERAL, validate

__all__ = ["DataConfig", "ModelConfig", "ProviderConfig", "RunConfig", "SourceConfig", "TokensConfig", "TrainingConfig"]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The base model. `model: NAME` is short for `model: {path: NAME}`."""

    path: str = Field(min_length=1, description="a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or a folder")
    revision: str | None = Field(None, description="branch, tag or commit on the hub; a commit makes runs repeatable")
    dtype: Dtype = Field(
        "auto",
        description="of the weights that are not quantised; auto is bfloat16 where the device has it, else float32",
    )
    upcast: bool = Field(
        False,
        description="cast norms, embeddings and head to float32, as prepare_model_for_kbit_training does; "
        "slower, and 4 bytes per parameter instead of 2",
    )
    cache: bool = Field(
        True,
        description="keep the quantised model on disk and load it from there next time; takes half a byte per quantised "
        "parameter and 2 per other one, in ~/.cache/qlora-core/quantized",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; only if you trust it")

    @field_validator("path")
    @classmethod
    def _absolute_folder(cls, value: str) -> str:
        folder = os.path.abspath(os.path.expanduser(value))
        _check_path(folder)
        if not os.path.isdir(folder) and value.startswith("~") and os.path.expanduser(value) == value:
            raise ValueError(f"there is no home folder {value.partition('/')[0]!r}; name a model folder or a hub id")
        return folder if os.path.isdir(folder) else value


class ProviderConfig(BaseModel):
    """A provider by name with its options. `quantizer: nf4` is short for `quantizer: {name: nf4}`."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str = Field(min_length=1, description="the provider's name, or plugin:name")

    @property
    def provider_options(self) -> dict[str, Any]:
        """Everything but the name: what the provider itself validates."""
        return dict(self.model_extra or {})


class SourceConfig(ProviderConfig):
    """A dataset in a list of several, with its weight."""

    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="times that each sample is seen in an epoch; 0.5 takes half of them",
    )


Sources = Annotated[
    Annotated[ProviderConfig, Tag(ONE)] | Annotated[tuple[SourceConfig, ...], Tag(SEVERAL), Field(min_length=1)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list | tuple) else ONE),
]
"""One dataset, or a list of several. `validate` takes the tags out of the places in messages."""


class DataConfig(Section):
    """How examples become tokens and blocks; the same for every dataset source."""

    sequence_length: int = Field(
        512, ge=2, description="tokens per block (max_length, block_size); memory and attention grow with it"
    )
    packing: bool = Field(
        True,
        description="fill blocks with several samples, none of which sees another; false: one sample per block, "
        "batches of similar length, padded",
    )
    eval_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the samples held out for evaluation: the end of a text, rows spread over all of them; "
        "unused with a separate file",
    )
    train_on: Literal["auto", "all", "completion", "assistant", "last_turn"] = Field(
        "auto",
        description="tokens that are supervised; auto: all of a text, the completion of a prompt, "
        "what the assistant says in a chat",
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="chat template: a name (chatml, llama3, mistral, gemma, phi, plain), a Jinja file, or none to join prompt "
        "and completion as they are; by default the tokenizer's own, else plain",
    )
    truncate: bool = Field(
        False, description="cut samples at sequence_length; false: one that is longer is a problem. Raw text is split, not cut"
    )
    on_problem: Literal["error", "skip", "warn"] = Field(
        "error",
        description="rows with a problem: error stops before training, skip leaves them out, warn keeps what can be kept",
    )
    deduplicate: bool = Field(
        False, description="leave out rows that repeat an earlier one, and training rows that are also held out"
    )
    pad_to_multiple_of: int = Field(
        32,
        ge=1,
        description="batches are padded to a multiple of so many tokens; a CPU compiles bfloat16 kernels for each length and "
        "keeps them, so fewer lengths take less memory",
    )
    streaming: bool = Field(
        False, description="read while training and store nothing; needs training.max_steps, and eval_fraction: 0"
    )
    gate_rows: int = Field(10_000, ge=1, description="with streaming: rows that are checked before the model is loaded")
    buffer: int = Field(1_000, ge=1, description="with streaming: samples that are packed and shuffled together")

    @field_validator("template")
    @classmethod
    def _absolute_file(cls, value: str | None) -> str | None:
        """A file is found from the working directory; the resolved configuration must not depend on it."""
        path = os.path.abspath(os.path.expanduser(value or ""))
        return path if value and os.path.isfile(path) else value


class TokensConfig(Section):
    """Tokens that the vocabulary lacks."""

    add: tuple[str, ...] = Field(
        (), description="new tokens; the embeddings grow and only the new rows are trained, saved with the adapter"
    )

    @field_validator("add")
    @classmethod
    def _real_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not token.strip() for token in value):
            raise ValueError("a token can't be empty or only spaces")
        if len(set(value)) != len(value):
            raise ValueError("the same token stands twice")
        return value


class TrainingConfig(Section):
    """How the adapter is trained; the engine is the Hugging Face Trainer."""

    epochs: float = Field(1.0, gt=0, description="passes over the training blocks (num_train_epochs)")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(
        2, ge=1, description="blocks per forward pass and device (per_device_train_batch_size); memory grows with it"
    )
    eval_batch_size: int | None = Field(None, ge=1, description="blocks per forward pass in evaluation; default batch_size")
    gradient_accumulation: int = Field(
        1, ge=1, description="forward passes per optimizer step (gradient_accumulation_steps); costs no memory"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate (lr); 1e-4 to 1e-3 is usual for LoRA")
    scheduler: str = Field("linear", description="learning-rate schedule, by the Trainer's names (lr_scheduler_type)")
    warmup: float = Field(
        0.03, ge=0, description="warm-up steps (warmup_steps, warmup_ratio); below 1 it is a share of all steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay of the trained matrices")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm to this; 0 switches clipping off")
    optimizer: str = Field(
        "adamw_torch_fused",
        description="by the Trainer's names (optim); 8-bit ones keep 2.4 bytes per trained weight, not 8, and are slow on CPUs",
    )
    gradient_checkpointing: Literal["none", "selective", "full", "auto"] = Field(
        "auto",
        description="compute activations again in the backward pass: full those of whole layers (on a CPU a quarter to a third "
        "slower and 60 % less memory per step), selective those of the parts that give back most for their time (a tenth, and "
        "25 %); auto takes the first of none, selective and full that there is memory for",
    )
    mixed_precision: Literal["auto", "bf16", "fp16", "none"] = Field(
        "auto", description="autocast of the forward pass; auto is bf16 where the device has it (fp16 on older GPUs)"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initialisation, shuffling and dropout")
    keep: Literal["last", "best"] = Field(
        "last", description="which weights become adapter/: the last, or the best by evaluation loss"
    )
    eval_steps: int | None = Field(None, ge=1, description="evaluate every so many steps; default: at the end of each epoch")
    eval_at_start: bool = Field(False, description="evaluate before the first step as well")
    save_steps: int | None = Field(None, ge=1, description="checkpoint every so many steps; default: after each epoch")
    save_total_limit: int | None = Field(
        2, ge=1, description="checkpoints to keep, the newest (and with keep: best the best) always among them"
    )
    logging_steps: int = Field(10, ge=1, description="log every so many steps")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="anything else that transformers.TrainingArguments knows, by its own name"
    )

    @field_validator("extra")
    @classmethod
    def _moments(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The library refuses these only when it makes the optimizer, with the weights loaded."""
        for name, end in (("adam_beta1", 1.0), ("adam_beta2", 1.0), ("adam_epsilon", math.inf)):
            given = value.get(name)
            if isinstance(given, int | float) and not 0 <= given < end:
                raise ValueError(f"{name} must be at least 0 and less than {end:g} (got {given})")
        return value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _checkpointing_in_words(cls, value: Any) -> Any:
        """Older configurations say true or false."""
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class RunConfig(Section):
    """Everything that a run is made of."""

    model: ModelConfig = Field(description="the base model")
    quantizer: ProviderConfig = Field(ProviderConfig(name="nf4"), description="how the frozen base model is stored")
    adapter: ProviderConfig = Field(ProviderConfig(name="lora"), description="which small set of parameters is trained")
    dataset: Sources = Field(description="where examples come from; a list mixes several, each with a weight (1 by default)")
    data: DataConfig = Field(DataConfig(), description="how examples become tokens and blocks")
    tokens: TokensConfig = Field(TokensConfig(), description="tokens that the vocabulary lacks")
    kernels: ProviderConfig = Field(
        ProviderConfig(name="auto"),
        description="rewriting of the model for speed; auto picks by device, reference none",
    )
    callbacks: tuple[ProviderConfig, ...] = Field(
        (ProviderConfig(name="progress"),), description="what watches or steers the training loop; only those named run"
    )
    training: TrainingConfig = Field(TrainingConfig(), description="how the adapter is trained")
    exports: tuple[ProviderConfig, ...] = Field(
        (), description="formats that the finished run is written in too, each into exports/NAME of its folder"
    )
    output: str = Field("runs/run", min_length=1, validate_default=True, description="the folder that the run is written to")
    plugins: tuple[str, ...] = Field((), description="modules to use as plugins although they are not installed as such")
    disable_plugins: tuple[str, ...] = Field((), description="installed plugins that are not even imported, by name")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The datasets, one or several."""
        if isinstance(self.dataset, tuple):
            return self.dataset
        return (SourceConfig(name=self.dataset.name, weight=1.0, **self.dataset.provider_options),)

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("quantizer", "adapter", "dataset", "kernels", mode="before")
    @classmethod
    def _short_provider(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("dataset", "callbacks", "exports", mode="before")
    @classmethod
    def _short_list(cls, value: Any) -> Any:
        return [cls._short_provider(item) for item in value] if isinstance(value, list | tuple) else value

    @field_validator("output")
    @classmethod
    def _absolute_output(cls, value: str) -> str:
        folder = os.path.abspath(os.path.expanduser(value))
        _check_path(folder)
        return folder

    @classmethod
    def parse(cls, data: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """Return *data* with the `key.path=value` *overrides* applied; raise ConfigError that lists every problem."""
        merged = dict(data)
        for override in overrides:
            merged = _override(merged, override)
        return validate(cls, merged)

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the configuration in the YAML file at *path*; raise ConfigError with the line of each problem."""
        data, lines = yaml_file.read(Path(path))
        try:
            return cls.parse(data, overrides)
        except ConfigError as error:
            raise error.located(str(path), lines, overrides) from None

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `RunConfig.read` reads back."""
        return yaml_file.dump(self.model_dump(mode="json"))


def _check_path(path: str) -> None:
    """Raise ValueError for what no system takes as a path: one that is too long, or has a NUL in it."""
    try:
        os.stat(path)
    except ValueError as error:
        raise ValueError(f"{path!r:.80} can be no path ({error}); name another one") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{path!r:.80}... can be no path (it is too long); name another one") from None
        if error.errno == errno.EACCES:
            raise ValueError(f"{path!r} is in a folder that is not yours to read; name another one") from None


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write key=value, such as training.learning_rate=1e-4")
    return dict(_put(data, path, yaml_file.scalar(text), override))


def _put(data: Any, path: list[str], value: Any, override: str, where: tuple[str, ...] = ()) -> Any:
    """Return a copy of *data* with *value* at *path*; short forms on the way (`quantizer: nf4`) become long ones."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if data is None and len(where) == 1:
        field = RunConfig.model_fields.get(where[0])
        if field is not None and not field.is_required():
            data = to_jsonable_python(field.get_default())  # start from the default
    if isinstance(data, Sequence) and not isinstance(data, str):
        if not head.isdecimal() or int(head) >= len(data):
            raise ConfigError(f"--set {override}: {'.'.join(where)} is a list of {len(data)}; write its index, from 0")
        index = int(head)
        return [_put(v, rest, value, override, (*where, head)) if i == index else v for i, v in enumerate(data)]
    if isinstance(data, str):
        data = {"path" if where == ("model",) else "name": data}
    if not isinstance(data, Mapping | None):
        raise ConfigError(f"--set {override}: {'.'.join(where)} is a value, not a section")
    inner = dict(data or {})
    inner[head] = _put(inner.get(head), rest, value, override, (*where, head))
    return inner
