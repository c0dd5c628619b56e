"""What touches PEFT itself for the adapter `peft`: configurations of any method, and mending what it leaves. Imported late."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from pydantic import TypeAdapter, ValidationError

from qlora_core.errors import ConfigError, ModelError, Problem
from qlora_core.validation import did_you_mean
from qlora_peft.injection import ALL_LINEAR, check_modules_to_save, first_line, refusals, without_own_warnings
from qlora_peft.methods import LENGTHENS, NEVER, OWN_TARGETS, OWNED, PLAIN_INIT, REQUIRED

if TYPE_CHECKING:
    import transformers

    from qlora_peft import AnyPEFTOptions

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def methods() -> dict[str, type[PeftConfig]]:
    """Return the configuration class of every method that the installed PEFT has, by name."""
    return {PeftType(kind).value.lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def check_options(options: AnyPEFTOptions) -> None:
    """Raise ConfigError with all that PEFT would not take: the method, fields that it has not, their values."""
    known = methods()
    method, given = options.method, options.config
    if method not in known:
        usable = ", ".join(sorted(set(known) - set(NEVER)))
        what = f"unknown method {method!r}; PEFT has {usable}{did_you_mean(method, known)}"
        raise ConfigError([Problem(("method",), what)])
    fields = {field.name for field in dataclasses.fields(known[method]) if field.init}
    accepted = sorted(fields - set(OWNED))
    hints = _hints(known[method])
    problems = []
    for name, value in given.items():
        if name in OWNED:
            problems.append(Problem(("config", name), f"can't be set here: {OWNED[name]}; leave it out"))
        elif name not in fields:
            what = f"unknown option; {method} accepts {', '.join(accepted)}{did_you_mean(name, accepted)}"
            problems.append(Problem(("config", name), what))
        elif name in hints and not _fits(hints[name], value):
            problems.append(Problem(("config", name), f"must be {_words(hints[name])} (got {value!r})"))
        elif name == "bias" and value != "none" and method != "lora":
            problems.append(Problem(("config", name), f"PEFT does not save the biases that {method} trains; use none"))
    if method == "lora" and given.get("init_lora_weights", True) not in PLAIN_INIT:
        what = "this initialisation changes the base weights; use true or gaussian, or the adapter lora with init: pissa"
        problems.append(Problem(("config", "init_lora_weights"), what))
    missing = [name for name in REQUIRED if name in fields and given.get(name) in (None, [])]
    if method == "prefix_tuning" and not given.get("prefix_projection"):
        missing = [name for name in missing if name != "encoder_hidden_size"]
    problems += [Problem(("config", name), f"required; {method} does not work without it") for name in missing]
    if problems:
        raise ConfigError(problems)
    try:
        peft_config(options)
    except ImportError as error:
        raise ConfigError([Problem(("method",), first_line(error))]) from error
    except Exception as error:
        raise ConfigError([Problem(("config",), f"{method} can't be made from it: {first_line(error)}")]) from error


def peft_config(options: AnyPEFTOptions) -> PeftConfig:
    """Return PEFT's configuration; all linear layers but the head where a method can have them and the user names none."""
    made = methods()[options.method]
    values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if options.method not in OWN_TARGETS and "target_modules" in {field.name for field in dataclasses.fields(made)}:
        values["target_modules"] = ALL_LINEAR
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in options.config.items()}
    return made(**values | given)


def check_names(skeleton: transformers.PreTrainedModel, options: AnyPEFTOptions) -> None:
    """Raise ConfigError where `target_modules` or `modules_to_save` name what the model has not."""
    given = options.config.get("target_modules")
    paths = [name for name, _ in skeleton.named_modules()]
    config = peft_config(options)
    if given and given != ALL_LINEAR and options.method != "adaption_prompt":
        for target in [given] if isinstance(given, str) else given:
            config.target_modules = target if isinstance(given, str) else [target]  # type: ignore[attr-defined]
            if not any(check_target_module_exists(config, path) for path in paths):
                parts = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()} - {""})
                what = f"{target!r} matches nothing; the model has {', '.join(parts)}"
                raise ConfigError([Problem(("config", "target_modules"), what)])
    check_modules_to_save(skeleton, options.config.get("modules_to_save") or (), "config", "modules_to_save")


def inject(model: transformers.PreTrainedModel, options: AnyPEFTOptions) -> PeftModel:
    """Return *model* with the adapter that *options* describe."""
    with refusals("peft"), without_own_warnings():
        adapted = get_peft_model(model, peft_config(options))
    return mend(adapted)


def mend(adapted: PeftModel) -> PeftModel:
    """Let *adapted* take and give what the plain model does: each layer its dtype, the whole as many logits as tokens."""
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, torch.nn.Module):
            module.register_forward_hook(_keep_dtype)
    if adapted.peft_type.value.lower() in LENGTHENS:
        adapted.register_forward_hook(_cut_logits, with_kwargs=True)
    return adapted


def merge(model: Any, method: str) -> transformers.PreTrainedModel:
    """Return the plain model that computes what *model* does; raise ModelError where *method* is no change of weights."""
    what = f"what is trained by the adapter 'peft' with {method} can't be merged into plain weights"
    if not hasattr(getattr(model, "base_model", None), "merge_and_unload"):
        raise ModelError(f"{what}; keep base and adapter apart")
    try:
        merged: transformers.PreTrainedModel = model.merge_and_unload()
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{what}: {first_line(error)}") from error
    return merged


def _keep_dtype(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Round *output* to the dtype of the input: ia3, randlora, pvera and road return float32 on packed layers."""
    if not (args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)):
        return output
    if torch.is_autocast_enabled(output.device.type) or not args[0].is_floating_point():
        return output
    return output.to(args[0].dtype)


def _cut_logits(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Drop the logits of virtual tokens: (B, virtual + T, V) to (B, T, V), one for each token of the text."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None and getattr(output, "logits", None) is not None:
        output.logits = output.logits[:, -ids.shape[1] :]
    return output


def _hints(made: type[PeftConfig]) -> dict[str, Any]:
    """Return the types of the fields of *made*, those that are plain enough to be checked."""
    try:
        hints = typing.get_type_hints(made)
    except Exception:  # names that PEFT imports for type checkers only
        return {}
    return {name: hint for name, hint in hints.items() if _plain(hint)}


def _plain(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, list, dict, tuple):
        return all(_plain(part) for part in typing.get_args(hint) if part is not Ellipsis)
    return origin in WORDS


def _fits(hint: Any, value: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(list(value) if isinstance(value, tuple) else value, strict=True)
    except ValidationError:
        return False
    return True


def _words(hint: Any) -> str:
    """Return *hint* in words: "a list or text or null"."""
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        # sorted: the order of a union is that of whichever equal one was made first in the process
        return " or ".join(sorted({_words(part) for part in typing.get_args(hint)}, key=lambda words: (words == "null", words)))
    return WORDS[origin]
