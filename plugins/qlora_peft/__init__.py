"""Adapters by PEFT: `lora` with its variants (DoRA, rsLoRA, PiSSA), and `peft`, any other method by name. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError, Problem
from qlora_core.hooks import hookimpl
from qlora_core.parts import Parts
from qlora_core.providers import Adapter, ProviderOptions
from qlora_peft.methods import NEVER, PROMPTS, UNMERGEABLE, why_not

if TYPE_CHECKING:
    import torch
    import transformers


class LoRAOptions(ProviderOptions):
    """What `lora` accepts."""

    r: int = Field(
        16,
        ge=1,
        description="rank, typically 8 to 64; adds r * (d_in + d_out) parameters to a layer, and their optimizer state",
    )
    alpha: float = Field(32.0, gt=0, description="scale (lora_alpha): B A is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout (lora_dropout) of the adapter's input while training")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="layers to adapt: names, one regular expression for whole paths, or all-linear but the head",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train too; they change the base model's output even with the adapter off"
    )
    init: Literal["default", "gaussian", "pissa"] = Field(
        "default",
        description="A is Kaiming-uniform or Gaussian, B zero; pissa takes the principal components, unquantised models only",
    )
    use_dora: bool = Field(False, description="learn magnitude and direction apart (DoRA): often better at low rank, slower")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (rsLoRA): for high ranks")
    modules_to_save: tuple[str, ...] = Field(
        (), description="modules to train whole and save with the adapter, such as lm_head; costs a full copy each"
    )

    @field_validator("target_modules")
    @classmethod
    def _real_pattern(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


class LoRA(Adapter):
    """W_eff = Q(W) + (alpha / r) * B @ A, A and B float32 (Hu et al. 2021; QLoRA, eq. 5-6)."""

    name = "lora"
    trains_new_tokens = True
    mergeable = True
    Options = LoRAOptions
    options: LoRAOptions

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse PiSSA on a quantised model, what PiSSA can't be combined with, and DoRA on int8."""
        if self.options.use_dora and parts.quantizer.name == "int8":
            what = "PEFT loses the scales of int8 layers on the CPU when DoRA dequantises them; use nf4, or use_dora: false"
            raise ConfigError([Problem(("use_dora",), what)])
        if self.options.init != "pissa":
            return
        if parts.quantizer.quantizes:
            what = f"pissa subtracts B A from the base weights, and {parts.quantizer.name} has packed them; use quantizer: none"
            raise ConfigError([Problem(("init",), what)])
        for option in ("use_dora", "use_rslora", "modules_to_save"):
            if getattr(self.options, option):
                what = "pissa can't be combined with it: the adapter could not be saved for the plain base; choose one"
                raise ConfigError([Problem((option,), what)])
        if config.tokens.add:
            raise ConfigError([Problem(("init",), "pissa can't train new tokens; use init: default")])

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Refuse target modules that match nothing, and a rank beyond what a layer can have."""
        from qlora_peft.injection import check_targets

        check_targets(skeleton, self.options)

    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return a PeftModel around *model*; new embedding rows are trained through PEFT's trainable tokens."""
        from qlora_peft.injection import inject

        return inject(model, self.options, new_token_ids)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write PEFT's own format; it loads with `peft.PeftModel.from_pretrained` on the plain base."""
        from qlora_peft.injection import save

        save(model, folder)

    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return a PeftModel with the adapter in *folder*."""
        from qlora_peft.injection import load

        return load(model, folder)

    def merge(self, model: torch.nn.Module) -> transformers.PreTrainedModel:
        """Return the plain model with the weights W + (alpha / r) * B @ A."""
        return model.merge_and_unload()  # type: ignore[operator, return-value]

    def may_train(self, name: str) -> bool:
        """Return whether *name* is a bias that the option `bias` asks to train."""
        return self.options.bias != "none" and name.endswith(".bias")


class AnyPEFTOptions(ProviderOptions):
    """What `peft` accepts."""

    method: str = Field(description="PEFT's name of the method: ia3, vera, boft, oft, randlora, prompt_tuning and others")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of that method's PEFT configuration, by their own names"
    )


class AnyPEFT(Adapter):
    """Any method of PEFT by its name: all linear layers but the head by default, its own fields in `config`.

    Most methods begin as the base model; c3a, fourierft, vblora and the prompts do not, unless `config` asks them to.
    """

    name = "peft"
    Options = AnyPEFTOptions
    options: AnyPEFTOptions

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether the method is a change of weights."""
        return self.options.method not in UNMERGEABLE

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return a method that works with every quantizer."""
        return {"method": "ia3"}

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse methods that need more than a text, and those that read weights which the quantizer has packed."""
        method, fields = self.options.method, self.options.config
        if method in NEVER:
            raise ConfigError([Problem(("method",), f"{method} can't be trained here: {NEVER[method]}")])
        what = why_not(method, parts.quantizer.name) if parts.quantizer.quantizes else ""
        if what:
            raise ConfigError([Problem(("method",), what)])
        if method in PROMPTS and config.data.packing:
            what = f"{method} puts a prompt before a block, which packed samples would share; set data.packing=false"
            raise ConfigError([Problem(("method",), what)])
        if fields.get("use_dora") and parts.quantizer.name == "int8":
            what = "PEFT loses the scales of int8 layers on the CPU when DoRA dequantises them; use nf4, or use_dora: false"
            raise ConfigError([Problem(("config", "use_dora"), what)])

    def check_libraries(self) -> None:
        """Refuse a method that PEFT has not, and fields that its configuration does not take."""
        from qlora_peft.anymethod import check_options

        check_options(self.options)

    def check_model(self, skeleton: transformers.PreTrainedModel) -> None:
        """Refuse names of modules that match nothing."""
        from qlora_peft.anymethod import check_names

        check_names(skeleton, self.options)

    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return a PeftModel around *model*."""
        from qlora_peft.anymethod import inject

        return inject(model, self.options)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write PEFT's own format; it loads with `peft.PeftModel.from_pretrained` on the plain base."""
        from qlora_peft.injection import save

        save(model, folder)

    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return a PeftModel with the adapter in *folder*."""
        from qlora_peft.anymethod import mend
        from qlora_peft.injection import load

        return mend(load(model, folder))

    def merge(self, model: torch.nn.Module) -> transformers.PreTrainedModel:
        """Return the plain model, or raise ModelError where the method does not change weights (prompts, lily)."""
        from qlora_peft.anymethod import merge

        return merge(model, self.options.method)

    def may_train(self, name: str) -> bool:
        """Return whether *name* is a bias that `config` asks to train; PEFT saves those of lora only."""
        lora = self.options.method == "lora"
        return lora and self.options.config.get("bias", "none") != "none" and name.endswith(".bias")


@hookimpl
def qlora_adapters() -> list[type[Adapter]]:
    """Provide `lora` and `peft`."""
    return [LoRA, AnyPEFT]
