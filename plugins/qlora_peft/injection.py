"""What touches PEFT itself: its LoraConfig, injection, saving and loading, and its refusals. Imported late."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers.pytorch_utils import Conv1D

from qlora_core.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    import transformers

    from qlora_peft import LoRAOptions

ALL_LINEAR = "all-linear"


def lora_config(options: LoRAOptions, token_rows: dict[str, list[int]] | None = None) -> LoraConfig:
    """Return PEFT's configuration for *options*; *token_rows* gives the rows to train of each embedding layer."""
    init: Any = {"default": True}.get(options.init, options.init)
    targets = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        bias=options.bias,
        init_lora_weights=init,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        modules_to_save=list(options.modules_to_save) or None,
        trainable_token_indices=token_rows,
    )


def check_targets(skeleton: transformers.PreTrainedModel, options: LoRAOptions) -> None:
    """Raise ConfigError where `target_modules` or `modules_to_save` match nothing, or `r` is beyond a layer's rank."""
    linear = {n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    config = lora_config(options)
    if options.target_modules == ALL_LINEAR:
        head = skeleton.get_output_embeddings()
        matched = {name: module for name, module in linear.items() if module is not head}
    else:
        matched = {name: module for name, module in linear.items() if check_target_module_exists(config, name)}
        wanted = [options.target_modules] if isinstance(options.target_modules, str) else options.target_modules
        for target in wanted if matched else ():
            one = LoraConfig(target_modules=target if isinstance(options.target_modules, str) else [target])
            if not any(check_target_module_exists(one, name) for name, _ in skeleton.named_modules()):
                raise ConfigError([Problem(("target_modules",), f"{target!r} matches nothing; {_names(linear)}")])
    if not matched:
        raise ConfigError([Problem(("target_modules",), f"{options.target_modules!r} matches nothing; {_names(linear)}")])
    check_modules_to_save(skeleton, options.modules_to_save, "modules_to_save")
    name, limit = min(((n, min(m.weight.shape)) for n, m in matched.items()), key=lambda pair: pair[1])
    if options.r > limit:
        shape = " x ".join(str(side) for side in matched[name].weight.shape)
        what = f"{options.r} is larger than the layer {name} ({shape}) can have; at most {limit}"
        raise ConfigError([Problem(("r",), what)])


def check_modules_to_save(skeleton: transformers.PreTrainedModel, names: Sequence[str], *where: str) -> None:
    """Raise ConfigError, located at *where*, for the first of *names* that matches no module."""
    paths = [path for path, _ in skeleton.named_modules()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()} - {""})
            raise ConfigError([Problem(where, f"{name!r} matches nothing; the model has {', '.join(known)}")])


@contextlib.contextmanager
def without_own_warnings() -> Iterator[None]:
    """Hide what PEFT warns of that is between it and transformers, and nothing to a user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # Conv1D: PEFT mends the setting itself
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT uses the name from before
        yield


@contextlib.contextmanager
def refusals(adapter: str) -> Iterator[None]:
    """Turn what PEFT raises, for a model or options that it can't work with, into a ModelError that names *adapter*."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # NotImplementedError is a RuntimeError
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"adapter {adapter!r} can't be added to this model: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, which is often a page long."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def inject(model: transformers.PreTrainedModel, options: LoRAOptions, new_token_ids: Sequence[int]) -> PeftModel:
    """Return *model* with LoRA layers, A and B in float32."""
    config = lora_config(options, _token_rows(model, new_token_ids) if new_token_ids else None)
    with refusals("lora"), without_own_warnings():
        adapted = get_peft_model(model, config)
        if options.init == "pissa":
            # PiSSA has changed the base weights. With its initial A and B the trained adapter becomes a LoRA of twice the
            # rank for the plain base: B A - B0 A0 (PiSSA, appendix C).
            adapted.initial_adapter = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    return adapted


def save(model: Any, folder: Path) -> None:
    """Write the adapter of *model* in PEFT's format into *folder*."""
    initial = getattr(model, "initial_adapter", None)
    if initial is None:
        # never whole embeddings: new rows are trainable tokens, and looking whether they grew would ask a hub
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in initial}
        config = model.peft_config["default"]
        mode, config.init_lora_weights = config.init_lora_weights, True
        _set(model, initial)
        model.save_pretrained(scratch, save_embedding_layers=False)
        _set(model, trained)
        config.init_lora_weights = mode
        model.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=scratch)


def load(model: transformers.PreTrainedModel, folder: Path) -> PeftModel:
    """Return *model* with the adapter in *folder*, frozen; raise ModelError for one that could execute code when it is read."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder}: adapter_model.safetensors is missing; weights in another format, such as pickle, are not read"
        )
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("megatron_config") is not None:  # for it PEFT imports the module that `megatron_core` names
        raise ModelError(f"{folder}: adapter_config.json sets megatron_config, for which code would be imported; remove it")
    with without_own_warnings():
        return PeftModel.from_pretrained(model, str(folder))


def _set(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _token_rows(model: transformers.PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """Return the rows to train of the input embeddings, and of the head where it has weights of its own."""
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    return {names[layer]: list(ids) for layer in layers}


def _names(linear: dict[str, torch.nn.Module]) -> str:
    """Return the last parts of the names of the linear layers: what people write as target modules."""
    return f"the model's linear layers are {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
