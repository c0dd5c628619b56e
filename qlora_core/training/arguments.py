"""Map the `training:` section to transformers.TrainingArguments, and check what it passes on to that library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from qlora_core.config import TrainingConfig
from qlora_core.device import pick_device, pick_precision
from qlora_core.errors import ConfigError, Problem
from qlora_core.libraries import import_libraries
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    import transformers

__all__ = ["full_checkpointing", "training_arguments"]

# What the configuration has a place for, by TrainingArguments' names: refused under `training.extra`.
OWNED = {
    "output_dir": "output",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.scheduler",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "optim": "training.optimizer",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "seed": "training.seed",
    "load_best_model_at_end": "training.keep",
    "eval_strategy": "training.eval_steps",
    "eval_steps": "training.eval_steps",
    "eval_on_start": "training.eval_at_start",
    "save_strategy": "training.save_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "logging_steps": "training.logging_steps",
    "report_to": "callbacks: [{name: transformers, integration: ...}]",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "CUDA_VISIBLE_DEVICES= (empty) in the environment",
}
# What the run directory and the loss rely on.
FIXED = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "label_names": ["labels"],
    "disable_tqdm": True,
}

# A stream goes on where its own state says, in the process that trains.
STREAMING = {"ignore_data_skip": True, "accelerator_config": {"dispatch_batches": False}, "dataloader_num_workers": 0}

# What would train but break a promise of the run directory.
UNSUPPORTED = {
    "fsdp": "not supported: checkpoints of sharded parameters would not be complete; use torchrun without it",
    "deepspeed": "not supported: checkpoints of sharded parameters would not be complete; use torchrun without it",
    "auto_find_batch_size": "not supported: a run must say its batch size; set training.batch_size",
    "push_to_hub": "not supported; upload the run's adapter/ folder when it is done",
}


def training_arguments(
    training: TrainingConfig,
    *,
    output: Path,
    evaluates: bool,
    streams: bool = False,
    wanted: Mapping[str, Any] | None = None,
) -> transformers.TrainingArguments:
    """Return the Trainer's arguments for *training*; raise ConfigError for what that library would refuse.

    *evaluates* says whether there is evaluation data, *streams* whether the training data is a stream; *wanted* are
    arguments that callbacks declare.
    """
    import_libraries()
    import transformers

    _check_names(training, wanted or {}, streams)
    device = pick_device()
    precision = pick_precision(training.mixed_precision, device)
    arguments = {
        **FIXED,
        "output_dir": str(output / "checkpoints"),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size or training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optimizer,
        **(full_checkpointing() if training.gradient_checkpointing == "full" else {}),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device.type == "cpu",
        "seed": training.seed,
        "eval_strategy": ("steps" if training.eval_steps else "epoch") if evaluates else "no",
        "eval_steps": training.eval_steps if evaluates else None,
        "eval_on_start": training.eval_at_start and evaluates,
        "save_strategy": "steps" if training.save_steps else "epoch",
        "save_steps": training.save_steps or 500,
        "save_total_limit": training.save_total_limit,
        "logging_steps": training.logging_steps,
        "report_to": [],
        "ddp_find_unused_parameters": False,  # every trained parameter is used; looking for others costs a pass
        **(STREAMING if streams else {}),
        **(wanted or {}),
        **training.extra,
    }
    try:
        return transformers.TrainingArguments(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        where = ("training", "extra") if training.extra else ("training",)
        raise ConfigError([Problem(where, f"transformers refuses these arguments: {error}")]) from error


def full_checkpointing() -> dict[str, Any]:
    """Return the arguments for non-reentrant checkpointing, which needs no hook on the embeddings of a frozen model."""
    import transformers

    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _check_names(training: TrainingConfig, wanted: Mapping[str, Any], streams: bool) -> None:
    import transformers
    from transformers.training_args import OptimizerNames

    problems = []
    for key, value, known in (
        ("scheduler", training.scheduler, [str(s.value) for s in transformers.SchedulerType]),
        ("optimizer", training.optimizer, [str(o.value) for o in OptimizerNames]),
    ):
        if value not in known:
            guess = did_you_mean(value, known)
            problems.append(Problem(("training", key), f"unknown {key} {value!r}{guess}; one of {', '.join(known)}"))
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init}
    hints = get_type_hints(transformers.TrainingArguments)
    for name in training.extra:
        if name in OWNED:
            problems.append(Problem(("training", "extra", name), f"has its own place; set {OWNED[name]} instead"))
        elif name in FIXED:
            problems.append(Problem(("training", "extra", name), f"is fixed to {FIXED[name]!r}; leave it out"))
        elif name in UNSUPPORTED:
            problems.append(Problem(("training", "extra", name), UNSUPPORTED[name]))
        elif streams and name in STREAMING:
            what = f"is fixed to {STREAMING[name]!r} with data.streaming; leave it out"
            problems.append(Problem(("training", "extra", name), what))
        elif name not in fields:
            what = f"unknown option; no field of transformers.TrainingArguments{did_you_mean(name, fields)}"
            problems.append(Problem(("training", "extra", name), what))
        elif hints[name] in (int, float, bool, str):
            try:
                TypeAdapter(hints[name]).validate_python(training.extra[name])
            except ValidationError:
                what = f"must be {hints[name].__name__} (got {training.extra[name]!r})"
                problems.append(Problem(("training", "extra", name), what))
    for name in wanted:
        if name in OWNED or name in FIXED or name in UNSUPPORTED:
            place = OWNED.get(name) or "the run directory"
            problems.append(Problem(("callbacks",), f"one asks for the training argument {name}, which is up to {place}"))
        elif name not in fields:
            what = f"one asks for {name}, no field of transformers.TrainingArguments{did_you_mean(name, fields)}"
            problems.append(Problem(("callbacks",), what))
    if problems:
        raise ConfigError(problems)
