"""Whether loss and gradients depend on what they must not depend on, measured on a run's own model and first samples.

`verify` writes nothing but a temporary folder, and runs no callbacks. Imports no torch.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.config import RunConfig
from qlora_core.errors import ModelError
from qlora_core.kernels import apply_kernels
from qlora_core.libraries import import_libraries
from qlora_core.model import inject_adapter, load_model
from qlora_core.parts import Parts
from qlora_core.pipeline import Interrupted, Prepared, prepare, train
from qlora_core.providers import Kernels
from qlora_core.run import Run

if TYPE_CHECKING:
    import torch

    from qlora_core.data.layouts import Layouts
    from qlora_core.measured import Difference, Measured, Subject

__all__ = ["Check", "Verified", "verify"]

logger = logging.getLogger("qlora_core")

ROWS = 4  # samples, where nobody says how many
SPREAD = 0.02  # of the values that matrices of zeros get: with B = 0 no gradient would reach A
STEPS, SAVED = 4, 2  # of training, and the one after which the checkpoint is written that is resumed from
RESUME = "save and resume"
CLOCK = {"tokens_per_second", "peak_memory_bytes"}  # readings that no two runs share


@dataclass(frozen=True)
class Check:
    """One line of the table: what was varied, and how far the results are apart, relative to them."""

    name: str
    result: Literal["pass", "FAIL", "skipped"]
    note: str
    loss: float | None = None
    gradients: float | None = None
    """||g - g'|| / ||g'|| over the gradients of all trained parameters as one vector."""
    loss_limit: float | None = None
    gradients_limit: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the check for JSON, which has no NaN and no infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return {("check" if key == "name" else key): value for key, value in finite.items()}


@dataclass(frozen=True)
class Verified:
    """All checks, and what they were made on."""

    checks: tuple[Check, ...]
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    dtype: str
    """In which products are computed."""

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return all(check.result != "FAIL" for check in self.checks)


def verify(config: RunConfig, parts: Parts, *, rows: int = ROWS) -> Verified:
    """Check the run of *config* and *parts* on its first *rows* samples; raise a QLoRAError where training would."""
    parts.check(config)
    short = _shortened(config, rows)
    prepared = prepare(config, parts)
    from qlora_core.data.collate import Collator
    from qlora_core.data.layouts import Layouts, first_samples
    from qlora_core.measured import limit_of

    data, packed = config.data, prepared.encoded.train.packed
    samples = first_samples(prepared.encoded.train, rows)
    lengths = tuple(len(sample["input_ids"]) for sample in samples)
    logger.info("verifying on %d samples of %s tokens", len(samples), ", ".join(f"{length:,}" for length in lengths))
    collator = Collator(prepared.tokenizer.pad_token_id or 0, data.pad_to_multiple_of, longest=data.sequence_length)
    layouts = Layouts(samples, collator)
    subject, kernels = _subject(config, parts, prepared)
    dtype = str(subject.dtype).removeprefix("torch.")
    logger.info("checking the layouts of a batch in %s", dtype)
    reference = subject.measure(layouts.padded)
    rounding = subject.rounding(layouts.padded, reference)
    limit = limit_of(subject.resolution, rounding)
    trained = subject.measure(layouts.packed) if packed else reference
    checks = [_split(subject, layouts, reference, limit), _padding(subject, layouts, reference, limit)]
    checks.insert(1, _packing(subject, layouts, reference, limit, trained if packed else None))  # last: it changes the model
    del subject  # one model at a time
    checks.append(_kernels(config, parts, prepared, layouts, kernels, trained, rounding))
    finite = math.isfinite(reference.loss)  # or else training stops
    checks.append(_resume(short, parts, prepared) if finite else Check(RESUME, "skipped", f"the loss is {reference.loss}"))
    return Verified(tuple(checks), lengths, dtype)


def _loaded(
    config: RunConfig, parts: Parts, prepared: Prepared, *, kernels: bool = True
) -> tuple[torch.nn.Module, Kernels | None]:
    """Return the adapted model as training begins with it, the same bits each time, and its kernels, if wanted."""
    import transformers

    transformers.set_seed(config.training.seed)
    base = load_model(config.model, parts.quantizer, skeleton=prepared.skeleton, tokenizer=prepared.tokenizer)
    model = inject_adapter(base, parts.adapter, new_token_ids=prepared.new_token_ids)
    return model, apply_kernels(model, config, parts) if kernels else None


def _subject(config: RunConfig, parts: Parts, prepared: Prepared, *, kernels: bool = True) -> tuple[Subject, Kernels | None]:
    """Return the model to be measured, no matrix of its adapter all zeros, and its kernels, if wanted."""
    import torch

    from qlora_core.measured import Subject

    model, chosen = _loaded(config, parts, prepared, kernels=kernels)
    generator = torch.Generator().manual_seed(config.training.seed)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            if not parameter.any():
                parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=generator))
    packed = prepared.encoded.train.packed
    return Subject(model, parts.quantizer, config.training.mixed_precision, packed=packed), chosen


# Layouts of a batch


def _split(subject: Subject, layouts: Layouts, reference: Measured, limit: Difference) -> Check:
    count = len(layouts.samples)
    sizes = [size for size in (1, 2) if size < count]
    note = " and ".join(f"{-(-count // size)} batches of {size}" for size in sizes)
    found = [subject.measure(layouts.split(size)) for size in sizes]
    return _judged("micro-batch split", found, reference, limit, f"{note} against one of {count}")


def _packing(subject: Subject, layouts: Layouts, reference: Measured, limit: Difference, found: Measured | None) -> Check:
    """Return how far packed samples are from padded ones; *found* is measured already where training packs."""
    try:
        if found is None:
            subject.take_packed()
            found = subject.measure(layouts.packed)
    except ModelError as error:
        return Check("packing", "skipped", f"training without packing is not concerned; {error}")
    rows = len(layouts.packed[0]["input_ids"])
    note = f"{len(layouts.samples)} samples in {rows} {'row' if rows == 1 else 'rows'} against padded ones"
    return _judged("packing", [found], reference, limit, note)


def _padding(subject: Subject, layouts: Layouts, reference: Measured, limit: Difference) -> Check:
    share = 100 * (1 - float(layouts.left[0]["attention_mask"].float().mean()))
    note = f"padded on the left against the right; {share:.0f} % is padding"
    return _judged("padding side", [subject.measure(layouts.left)], reference, limit, note)


def _kernels(
    config: RunConfig,
    parts: Parts,
    prepared: Prepared,
    layouts: Layouts,
    kernels: Kernels | None,
    trained: Measured,
    rounding: Difference,
) -> Check:
    """Return how far what *trained* has measured, in the layout of training, is from a model without kernels."""
    from qlora_core.measured import limit_of

    if kernels is None or kernels.name == "reference":
        return Check("kernels", "skipped", "the run has none but the reference")
    logger.info("checking the kernels %s", kernels.name)
    packed = prepared.encoded.train.packed
    batches = layouts.packed if packed else layouts.padded
    plain, _ = _subject(config, parts, prepared, kernels=False)
    reference = plain.measure(batches)
    limit = limit_of(plain.resolution, rounding, plain.rounding(batches, reference))
    note = f"{kernels.name} against reference, {'packed' if packed else 'padded'} as in training"
    return _judged("kernels", [trained], reference, limit, note)


def _judged(name: str, found: Sequence[Measured], reference: Measured, limit: Difference, note: str) -> Check:
    """Return the check whose results are those *found*."""
    from qlora_core.measured import Difference

    far = Difference.largest(*(Difference.between(one, reference) for one in found))
    passes = far.within(limit)
    if not passes and far.where:
        note = f"{note}; most of it in {far.where}"
    return Check(name, "pass" if passes else "FAIL", note, far.loss, far.gradients, limit.loss, limit.gradients)


# Save and resume


def _shortened(config: RunConfig, rows: int) -> RunConfig:
    """Return *config* for a few steps with a checkpoint among them, all else as configured; raise ConfigError early."""
    import_libraries()
    from qlora_core.training.arguments import training_arguments

    training = config.training
    changes: dict[str, Any] = {"max_steps": STEPS, "save_steps": SAVED, "save_total_limit": None, "logging_steps": 1}
    changes |= {"keep": "last", "eval_steps": None, "eval_at_start": False}  # nothing is evaluated
    # accumulating at all is what matters, not how often
    changes |= {"batch_size": min(training.batch_size, rows), "gradient_accumulation": min(training.gradient_accumulation, 2)}
    short = config.model_copy(update={"training": training.model_copy(update=changes)})
    streams = config.data.streaming
    training_arguments(short.training, output=Path(config.output), evaluates=False, streams=streams)  # or refuses
    return short


def _resume(short: RunConfig, parts: Parts, prepared: Prepared) -> Check:
    """Train, then train again from the checkpoint with a model loaded anew, and compare bits."""
    logger.info("checking save and resume: %d steps, then again from step %d", STEPS, SAVED)
    encoded = replace(prepared.encoded, eval=None)
    lines: list[list[dict[str, Any]]] = []
    weights: list[dict[str, torch.Tensor]] = []
    with tempfile.TemporaryDirectory(prefix="qlora-verify-") as folder:
        run = Run(Path(folder) / "run", short, quiet=True)
        run.create()
        for start in (None, run.checkpoint(SAVED)):
            model, _ = _loaded(short, parts, prepared)
            try:
                train(model, prepared.tokenizer, encoded, run, resume_from=start)
            except Interrupted as error:
                raise Interrupted("stopped", error.signal) from None  # there is nothing to be resumed
            lines.append([line for line in run.read_metrics() if line["step"] > SAVED])
            weights.append({n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad})
            del model
    return _same_bits(lines, weights)


def _same_bits(lines: Sequence[list[dict[str, Any]]], weights: Sequence[dict[str, torch.Tensor]]) -> Check:
    """Return the check of two runs: their lines of metrics after the checkpoint, and their last weights."""
    import torch

    timeless = [[{k: v for k, v in line.items() if k not in CLOCK} for line in run] for run in lines]
    pairs = list(itertools.zip_longest(*timeless, fillvalue={}))
    differ = sorted({key for a, b in pairs for key in {*a, *b} if a.get(key) != b.get(key)})
    moved = [name for name, weight in weights[0].items() if not torch.equal(weight, weights[1][name])]
    what = [f"metrics differ in {', '.join(differ)}"] if differ else []
    what += [f"{len(moved)} of {len(weights[0])} trained tensors differ, {moved[0]} first"] if moved else []
    note = f"steps {SAVED + 1} to {STEPS} after a checkpoint; "
    note += "; ".join(what) or f"metrics and {len(weights[0])} trained tensors are the same bits"
    loss, gradients = (_farthest([(a.get(key), b.get(key)) for a, b in pairs]) for key in ("loss", "grad_norm"))
    return Check(RESUME, "FAIL" if what else "pass", note, loss, gradients, 0.0, 0.0)


def _farthest(pairs: Sequence[tuple[float | None, float | None]]) -> float:
    """Return the largest relative difference of *pairs*, not a number where one is missing."""
    far = [0.0 if a == b else abs(b - a) / abs(a) if a and b is not None else math.nan for a, b in pairs]
    return math.nan if any(math.isnan(one) for one in far) else max(far, default=0.0)
