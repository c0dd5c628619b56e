"""A run from configuration to saved adapter. `finetune` is the door for Python; `execute` reads top to bottom."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import answered, calling, watched
from qlora_core.config import DataConfig, ModelConfig, RunConfig, TokensConfig, TrainingConfig
from qlora_core.errors import ConfigError, Problem, QLoRAError, RunError
from qlora_core.footprint import Footprint, LinearWeights
from qlora_core.kernels import apply_kernels
from qlora_core.libraries import import_libraries
from qlora_core.model import add_tokens, build_skeleton, inject_adapter, load_model, load_tokenizer
from qlora_core.parts import Parts, described, mixed
from qlora_core.preflight import check_evaluates, check_positions, check_space, check_vocabulary
from qlora_core.provenance import plugin_of, provenance
from qlora_core.providers import Adapter, CallbackFactory, DatasetSource, Exporter, Kernels, Provider, Quantizer
from qlora_core.report import data_line, report_model
from qlora_core.resume import check_made_of, check_same_run, checkpoint_to_resume
from qlora_core.run import Run
from qlora_core.saved import SavedRun
from qlora_core.seal import fault

if TYPE_CHECKING:
    import torch
    import transformers

    from qlora_core.data.encode import Encoded
    from qlora_core.training.trainer import QLoRATrainer

__all__ = ["Finished", "Interrupted", "Prepared", "execute", "export", "finetune", "prepare", "train"]

logger = logging.getLogger("qlora_core")


class Interrupted(RunError):
    """A run that a signal ended after its checkpoint; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        self.signal = signal
        super().__init__(message)


@dataclass(frozen=True)
class Finished:
    """What a run leaves in memory; everything else is in `run.folder`."""

    run: Run
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    metrics: dict[str, float]
    """Of the last log and evaluation lines: loss, eval_loss, perplexity, tokens, ..."""


def finetune(
    model: str | Path | ModelConfig,
    quantizer: Quantizer,
    adapter: Adapter,
    dataset: DatasetSource | Sequence[tuple[DatasetSource, float]],
    *,
    output: str | Path,
    data: DataConfig | Mapping[str, Any] | None = None,
    training: TrainingConfig | Mapping[str, Any] | None = None,
    tokens: TokensConfig | Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    callbacks: Sequence[CallbackFactory | transformers.TrainerCallback] = (),
    exports: Sequence[Exporter] = (),
    overwrite: bool = False,
    resume: bool | str | Path = False,
) -> Finished:
    """Fine-tune *model* and return the finished run; needs no registry and no configuration file.

    *dataset* may be several, each with the times that its samples are seen in an epoch: `[(chats, 1.0), (text, 0.5)]`.
    The sections *data*, *training* and *tokens* take the keys of the configuration of the same name. *callbacks* may be
    providers or plain `transformers.TrainerCallback`s; the latter can't be written into the run's config.yaml.
    Raises a QLoRAError (ConfigError, DataError, ModelError, RunError) for what the caller can mend.
    """
    mix = mixed(dataset)
    if not mix:
        raise ConfigError([Problem(("dataset",), "the list is empty; nothing to train on")])
    for name, given, kind in (
        ("quantizer", quantizer, Quantizer),
        ("adapter", adapter, Adapter),
        *(("dataset", source, DatasetSource) for source, _ in mix),
    ):
        if not isinstance(given, kind):
            raise ConfigError(
                [Problem((name,), f"must be an instance of a {kind.__name__}, options in brackets (got {given!r})")]
            )
    factories = tuple(callback for callback in callbacks if isinstance(callback, CallbackFactory))
    plain = [callback for callback in callbacks if not isinstance(callback, CallbackFactory)]
    sections = {"data": data, "training": training, "tokens": tokens}
    config = RunConfig.parse(
        {
            "model": model.model_dump() if isinstance(model, ModelConfig) else str(model),
            "quantizer": _named(quantizer),
            "adapter": _named(adapter),
            "dataset": [_named(source) | {"weight": weight} for source, weight in mix]
            if len(mix) > 1 or mix[0].weight != 1
            else _named(mix[0].source),
            "kernels": _named(kernels) if kernels is not None else "reference",
            "callbacks": [_named(factory) for factory in factories],
            "exports": [_named(exporter) for exporter in exports],
            "output": str(output),
            **{key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in sections.items() if value},
        }
    )
    parts = Parts(quantizer, adapter, tuple(mix), (kernels,) if kernels is not None else (), factories, tuple(exports))
    return execute(config, parts, plain_callbacks=plain, overwrite=overwrite, resume=resume)


def execute(
    config: RunConfig,
    parts: Parts,
    *,
    plain_callbacks: Sequence[transformers.TrainerCallback] = (),
    overwrite: bool = False,
    resume: bool | str | Path = False,
    quiet: bool = False,
) -> Finished:
    """Run *config* with *parts*: check, encode, load, inject, train, save. All that can fail early fails early."""
    run = Run(Path(config.output), config, quiet)
    if not parts.datasets:
        raise ConfigError([Problem(("dataset",), "required; nothing to train on")])
    parts.check(config)
    run.check_folder(overwrite=overwrite, resume=bool(resume))
    start = checkpoint_to_resume(run, resume)
    if start is not None:
        check_same_run(run)
    wanted = _wanted(config, parts, run)
    prepared = prepare(config, parts, run.day() if start is not None else None)
    commit = getattr(prepared.skeleton.config, "_commit_hash", None)
    made_of: dict[str, Any] = {"data_fingerprint": prepared.encoded.fingerprint, "commit": commit}
    if start is not None:
        check_made_of(run, provenance(parts, config.model, **made_of))
    logger.info("%s", data_line(prepared.encoded, config))
    check_evaluates(prepared.encoded, config, parts)
    model, kernels = _build(config, parts, prepared)
    check_space(run, model, config.training)

    from accelerate import PartialState

    processes = PartialState()  # one process, or those of torchrun, of which the first one writes
    processes.wait_for_everyone()
    with run.writing() if processes.is_main_process else contextlib.nullcontext():
        if processes.is_main_process:
            _begin(run, provenance(parts, config.model, kernels=kernels, **made_of) if start is None else None)
        processes.wait_for_everyone()
        callbacks = [*(_callback(factory, run) for factory in parts.callbacks), *plain_callbacks]
        metrics = train(model, prepared.tokenizer, prepared.encoded, run, callbacks, wanted=wanted, resume_from=start)
        if processes.is_main_process:
            _end(run, parts, model, prepared.tokenizer)
    return Finished(run, model, prepared.tokenizer, metrics)


def _begin(run: Run, record: Mapping[str, Any] | None) -> None:
    """Write what is known before the first step; *record* is the provenance of a new run."""
    if record is not None:
        run.create()
        run.write("provenance.json", json.dumps(record, indent=2) + "\n")
    run.write("config.yaml", run.config.to_yaml())  # of a resumed run, too: how long and how often may differ


def _end(run: Run, parts: Parts, model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    with calling(parts.adapter, "save"):
        run.write_adapter(lambda folder: _save(parts.adapter, model, tokenizer, folder))
    logger.info("adapter saved in %s", run.adapter)
    for exporter in parts.exporters:
        export(SavedRun(run, parts.quantizer, parts.adapter), exporter)


def export(saved: SavedRun, exporter: Exporter, folder: Path | None = None) -> Path:
    """Let *exporter* write *saved* into *folder* (default exports/NAME of the run), whole or not at all; return it."""
    run = saved.run
    with calling(exporter, "export"):
        written = run.export(exporter.name, lambda partial: exporter.export(saved, partial), folder)
    logger.info("exported as %s in %s", exporter.name, written)
    return written


def _callback(factory: CallbackFactory, run: Run) -> transformers.TrainerCallback:
    import transformers

    with calling(factory, "build"):
        kind, words = transformers.TrainerCallback, "a transformers.TrainerCallback"
        return watched(answered(factory, "build", factory.build(run), kind, words), factory)


@dataclass(frozen=True)
class Prepared:
    """What is known about a run before any weight is loaded."""

    tokenizer: transformers.PreTrainedTokenizerBase
    new_token_ids: list[int]
    skeleton: transformers.PreTrainedModel
    """The model on the meta device."""
    encoded: Encoded


def prepare(config: RunConfig, parts: Parts, day: date | None = None) -> Prepared:
    """Return tokenizer, skeleton and encoded data of *config*; refuse what does not fit together. Loads no weights.

    *day* is that on which a run that is resumed began: see `encode`.
    """
    import_libraries()
    from qlora_core.data.encode import encode
    from qlora_core.data.template import ChatTemplate

    parts.check_libraries()
    tokenizer = load_tokenizer(config.model)
    template = None
    with contextlib.suppress(ConfigError):  # `encode` says what is wrong with it, if the data need one
        template = ChatTemplate.choose(tokenizer, config.data.template) if config.tokens.add else None
    special = [token for token in config.tokens.add if template is not None and template.controls(token)]
    new_token_ids = add_tokens(tokenizer, config.tokens.add, special=special)
    skeleton = build_skeleton(config.model)
    check_vocabulary(tokenizer, skeleton, new_token_ids)
    check_positions(skeleton, config.data)
    parts.check_model(skeleton)
    encoded = encode(parts.datasets, tokenizer, config.data, seed=config.training.seed, day=day)
    if encoded.template is not None and encoded.template.name != "tokenizer":
        tokenizer.chat_template = encoded.template.source  # saved with the adapter: inference sees what training saw
    return Prepared(tokenizer, new_token_ids, skeleton, encoded)


def _wanted(config: RunConfig, parts: Parts, run: Run) -> dict[str, Any]:
    """Return the training arguments that callbacks declare; refuse early what the Trainer would refuse."""
    import_libraries()
    from qlora_core.training.arguments import training_arguments

    wanted: dict[str, Any] = {}
    for callback in parts.callbacks:
        with calling(callback, "training_arguments"):
            wanted |= answered(callback, "training_arguments", callback.training_arguments(), dict, "a dict")
    streams = config.data.streaming
    training_arguments(config.training, output=run.folder, evaluates=False, streams=streams, wanted=wanted)
    return wanted


def _build(config: RunConfig, parts: Parts, prepared: Prepared) -> tuple[torch.nn.Module, Kernels | None]:
    """Load the base model, inject the adapter, apply kernels, and say what came of it."""
    import transformers

    from qlora_core.training.shortage import explained

    transformers.set_seed(config.training.seed)
    with explained(config, "loading the model"):
        base = load_model(config.model, parts.quantizer, skeleton=prepared.skeleton, tokenizer=prepared.tokenizer)
        linears, size = LinearWeights(base, parts.quantizer), Footprint.of(base, parts.quantizer)
        model = inject_adapter(base, parts.adapter, new_token_ids=prepared.new_token_ids)
    kernels = apply_kernels(model, config, parts)
    report_model(size, linears.covered_by(model), parts)
    return model, kernels


def _save(adapter: Adapter, model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    adapter.save(model, folder)
    tokenizer.save_pretrained(folder)


def train(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    encoded: Encoded,
    run: Run,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    *,
    wanted: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> dict[str, float]:
    """Train *model*, which has an adapter, as `run.config.training` says, and return the last metrics.

    Writes metrics.jsonl and checkpoints/ of *run*; with `keep: best` the model ends with the best weights.
    Raises Interrupted after a checkpoint where SIGINT or SIGTERM came.
    """
    import_libraries()
    from qlora_core.training.arguments import training_arguments
    from qlora_core.training.callbacks import KeepBest
    from qlora_core.training.checkpoint import load_weights
    from qlora_core.training.shortage import explained
    from qlora_core.training.signals import StopOnSignal
    from qlora_core.training.trainer import QLoRATrainer

    settings = run.config.training
    arguments = training_arguments(
        settings, output=run.folder, evaluates=encoded.eval is not None, streams=run.config.data.streaming, wanted=wanted
    )
    stop = StopOnSignal()
    own = [KeepBest(), stop] if settings.keep == "best" else [stop]
    with _refusing(settings):
        trainer = QLoRATrainer(model, tokenizer, encoded, arguments, run, [*callbacks, *own])
    if resume_from is not None and trainer.is_world_process_zero():
        load_weights(model, resume_from)  # refuses another adapter, before anything is dropped
        run.go_back(json.loads((resume_from / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
        logger.info("resuming from %s", resume_from)
    with stop.listening(), explained(run.config, "training", run.saved):
        try:
            with _refusing(settings, trainer):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
        except KeyboardInterrupt:
            if not stop.received:
                raise
            raise Interrupted(f"stopped at once; {run.saved()}; continue with --resume", stop.received) from None
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # accelerate has wrapped forward for autocast
    if stop.received:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; continue with --resume", stop.received)
    if settings.keep == "best" and trainer.state.best_global_step:
        best = run.checkpoint(trainer.state.best_global_step)
        if (what := fault(best)) is not None:
            raise RunError(f"{best}, the best by evaluation loss, is damaged: {what}; resume with training.keep: last")
        load_weights(model, best)
        logger.info("kept the weights after step %d, the best by evaluation loss", trainer.state.best_global_step)
    metrics: dict[str, float] = {}
    for line in run.read_metrics():
        metrics |= line
    return metrics


@contextlib.contextmanager
def _refusing(settings: TrainingConfig, trainer: QLoRATrainer | None = None) -> Iterator[None]:
    """Blame `training.extra`, where it is used, for what libraries refuse before the first step of *trainer*."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        began = trainer is not None and trainer.state.global_step > 0
        if isinstance(error, QLoRAError) or began or not settings.extra:
            raise
        raise ConfigError([Problem(("training", "extra"), f"the libraries refuse these arguments: {error}")]) from error


def _named(provider: Provider) -> dict[str, Any]:
    plugin, _, _ = plugin_of(type(provider))
    return described(provider, f"{plugin}:{provider.name}" if plugin else provider.name).model_dump(mode="json")
